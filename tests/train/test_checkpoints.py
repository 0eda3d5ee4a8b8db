import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.runs.checkpoints import Checkpoints, newest, read_state


@pytest.fixture
def layer(accelerator):
    return accelerator.prepare(torch.nn.Linear(2, 1))


def set_weight(layer, value: float) -> None:
    torch.nn.init.constant_(layer.weight, value)


def at(step: int, **more) -> dict:
    """What a job shares after a step."""
    return {'step': step, 'steps_per_epoch': 10, 'evaluated': True, **more}


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def test_round_trip(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    assert checkpoints.find().path is None
    set_weight(layer, 3.0)
    torch.manual_seed(5)
    own = {'position': {'first': 1, 'consumed': [3, 4]}, 'meter': {'totals': [torch.ones(2)]}}
    path = checkpoints.save(at(20, more='yes'), own)
    drawn = torch.rand(3)
    set_weight(layer, 0.0)
    found = checkpoints.find()
    assert (found.path, found.step, found.state['more'], found.skipped) == (path, 20, 'yes', ())
    loaded = checkpoints.load(found)
    assert (layer.weight == 3.0).all()
    # The generators go on where they were.
    assert torch.rand(3).equal(drawn)
    assert loaded['position'] == own['position']
    assert loaded['meter']['totals'][0].equal(torch.ones(2))


def test_only_the_last_are_kept(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    for step in range(10, 50, 10):
        set_weight(layer, step)
        checkpoints.save(at(step), {})
    assert names(tmp_path) == ['step-00000030', 'step-00000040']
    checkpoints.load(checkpoints.find())
    assert (layer.weight == 40).all()


def test_unfinished_one_is_passed_over(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    path = checkpoints.save(at(10), {})
    # What a kill leaves before the rename.
    shutil.copytree(path, path.with_name('step-00000020.partial'))
    found = checkpoints.find()
    assert (found.step, found.skipped) == (10, ())
    checkpoints.save(at(20), {})
    assert names(tmp_path) == ['step-00000010', 'step-00000020']


def test_damaged_one_is_put_aside(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=3)
    set_weight(layer, 1.0)
    checkpoints.save(at(10), {})
    set_weight(layer, 2.0)
    path = checkpoints.save(at(20), {})
    (path / 'process_0.pt').write_bytes(b'nothing')
    assert newest(tmp_path).step == 10
    ((skipped, why),) = checkpoints.find().skipped
    assert skipped == path
    assert why == 'process_0.pt is not what was written'
    # Nothing moves until the run goes on; then it writes the step again, rather than believe the damaged one to be it.
    assert names(tmp_path) == ['step-00000010', 'step-00000020']
    checkpoints.save(at(20), {})
    assert names(tmp_path) == ['step-00000010', 'step-00000020', 'step-00000020.damaged']
    assert checkpoints.find().step == 20


@pytest.mark.parametrize('kind', ['an earlier damaged one there', 'a link', 'a link to nothing', 'a file'])
def test_damaged_one_stops_nothing(tmp_path, accelerator, layer, kind):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    checkpoints.save(at(10), {})
    path = tmp_path / 'checkpoints' / 'step-00000020'
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    if kind == 'an earlier damaged one there':
        path.mkdir()
        (path.with_suffix('.damaged') / 'kept').mkdir(parents=True)
    elif kind == 'a file':
        path.write_text('no folder')
    else:
        path.symlink_to(elsewhere if kind == 'a link' else tmp_path / 'nowhere')
    found = checkpoints.find()
    assert (found.step, [skipped for skipped, _ in found.skipped]) == (10, [path])
    checkpoints.save(at(20), {})
    aside = 'step-00000020.damaged' + ('-2' if kind == 'an earlier damaged one there' else '')
    assert {'step-00000020', aside} <= set(names(tmp_path))
    assert checkpoints.find().step == 20


def test_linked_ones_are_whole_and_outlive_their_links(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    path = checkpoints.save(at(10), {})
    elsewhere = path.rename(tmp_path / 'elsewhere')
    path.symlink_to(elsewhere)
    assert checkpoints.find().path == path
    checkpoints.save(at(20), {})
    assert names(tmp_path) == ['step-00000020']
    assert (elsewhere / 'state.json').is_file()


def test_bits_of_the_state_count(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    path = checkpoints.save(at(20, history=[{'loss': [0.1, None]}]), {})
    written, state = (path / 'state.json').read_bytes(), read_state(path)
    for bit in range(0, 8 * len(written), 9):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / 'state.json').write_bytes(flipped)
        try:
            found = read_state(path)
        except ValueError:
            continue
        assert {name: found[name] for name in state} == state  # the name of the hash, or a blank


@pytest.mark.parametrize(
    'changed',
    [
        {'step': 21},
        {'step': 20.0},
        {'steps_per_epoch': 0},
        {'evaluated': 1},
        {'processes': 0},
        {'processes': 2},
        {'files': {}},
        {'files': {'process_0.pt': None}},
        {'files': {'../step-00000010/process_0.pt': '0'}},
        {'files': []},
    ],
    ids=str,
)
def test_state_that_no_job_writes(tmp_path, accelerator, layer, changed):
    """Also one without a hash of itself, as earlier versions wrote it."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    checkpoints.save(at(10), {})
    path = checkpoints.save(at(20), {})
    state = read_state(path)
    (path / 'state.json').write_text(json.dumps(state))
    assert newest(tmp_path).step == 20
    (path / 'state.json').write_text(json.dumps({**state, **changed}))
    assert newest(tmp_path).step == 10


@pytest.mark.parametrize('content', [b'[]', b'{}', b'null', b'3', b'', b'\xff{', b'[' * 100_000], ids=repr)
def test_state_that_is_none(tmp_path, accelerator, layer, content):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    checkpoints.save(at(10), {})
    path = checkpoints.save(at(20), {})
    (path / 'state.json').write_bytes(content)
    ((skipped, _),) = newest(tmp_path).skipped
    assert skipped == path
    assert newest(tmp_path).step == 10


@pytest.mark.parametrize('name', ['random_states_0.pkl', 'process_0.pt', 'optimizer.bin'])
def test_file_that_does_not_load(tmp_path, accelerator, layer, name):
    """Random states, too, without which accelerate would go on."""
    accelerator.prepare(torch.optim.SGD(layer.parameters()))
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    checkpoints.save(at(10), {})
    path = checkpoints.save(at(20), {})
    (path / name).write_bytes(b'cos\nsystem\n(S"false"\ntR.')
    state = read_state(path)
    state['files'][name] = file_hash(path / name)
    (path / 'state.json').write_text(json.dumps(state))
    ((skipped, why),) = newest(tmp_path).skipped
    assert (skipped, why.partition(':')[0]) == (path, f'{name} cannot be loaded')
    if name.startswith('random'):
        states = torch.load(path.with_name('step-00000010') / name, weights_only=False)
        torch.save({**states, 'torch_manual_seed': states['torch_manual_seed'][:-1]}, path / name)
        state['files'][name] = file_hash(path / name)
        (path / 'state.json').write_text(json.dumps(state))
        assert newest(tmp_path).step == 10


@pytest.mark.parametrize('place', ['checkpoints', 'checkpoints/step-00000020/state.json'])
@pytest.mark.parametrize('trouble', ['loop', 'nothing', 'file'])
def test_trouble_with_the_disk_is_no_damage(tmp_path, accelerator, layer, place, trouble):
    """A loop of links stands for a disk that does not answer: root may read everything."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    checkpoints.save(at(10), {})
    checkpoints.save(at(20), {})
    path = tmp_path / place
    path.rename(tmp_path / 'away')
    if trouble == 'file':
        path.write_text('something else')
    else:
        path.symlink_to(path if trouble == 'loop' else tmp_path / 'not mounted')
    if place == 'checkpoints' or trouble == 'loop':
        with pytest.raises(InputError, match=r'cannot be read .*move it away'):
            checkpoints.find()
    else:
        assert checkpoints.find().step == 10


def test_older_one_outlives_a_failed_one(tmp_path, accelerator, layer, monkeypatch):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    set_weight(layer, 1.0)
    checkpoints.save(at(10), {})

    def full_disk(*_):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full_disk)
        with pytest.raises(OSError, match='No space'):
            checkpoints.save(at(20), {})
    set_weight(layer, 0.0)
    assert checkpoints.find().step == 10
    checkpoints.load(checkpoints.find())
    assert (layer.weight == 1.0).all()


def test_of_another_network(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    checkpoints.save(at(10), {})
    accelerator._models.clear()
    accelerator.prepare(torch.nn.Linear(3, 1))
    with pytest.raises(InputError, match=r'step-00000010 does not fit this configuration: .*size mismatch.*; start a'):
        checkpoints.load(checkpoints.find())


def test_aside(tmp_path, accelerator, layer):
    """What is kept for inspection is nothing to resume from."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    path = checkpoints.save_aside('kept', {'step': 3}, {'views': [torch.zeros(2)]})
    assert path == tmp_path / 'kept'
    assert torch.load(path / 'process_0.pt')['views'][0].equal(torch.zeros(2))
    assert checkpoints.find().path is None


def test_file_of_a_process_that_writes_elsewhere(tmp_path, accelerator, layer, monkeypatch):
    """Folders of one name on two machines; such a checkpoint could never be loaded."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    checkpoints.save(at(10), {})
    monkeypatch.setattr(type(accelerator), 'num_processes', 2)
    with pytest.raises(OSError, match=r'the file of process 1 is not in .* all machines have to share the folder'):
        checkpoints.save(at(20), {})
    assert names(tmp_path) == ['step-00000010']


def test_older_one_that_cannot_be_removed(tmp_path, accelerator, layer, monkeypatch):
    """One that is protected, or open on another machine, stops nothing."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    checkpoints.save(at(10), {})

    remove = shutil.rmtree

    def refuse(path, *more, **options):
        if Path(path).name.startswith('step-'):
            raise PermissionError('protected')
        remove(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'rmtree', refuse)
        assert checkpoints.save(at(20), {}) == tmp_path / 'checkpoints' / 'step-00000020'
    assert checkpoints.find().step == 20
    checkpoints.save(at(30), {})
    assert names(tmp_path) == ['step-00000030']
