import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from slimclr_hub.errors import InputError
from slimclr_hub.runs.checkpoints import Checkpoints, newest


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def layer(accelerator):
    return accelerator.prepare(torch.nn.Linear(2, 1))


def set_weight(layer, value: float) -> None:
    torch.nn.init.constant_(layer.weight, value)


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def test_round_trip(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    assert checkpoints.find().path is None
    set_weight(layer, 3.0)
    torch.manual_seed(5)
    own = {'position': {'first': 1, 'consumed': [3, 4]}, 'meter': {'totals': [torch.ones(2)]}}
    path = checkpoints.save({'step': 20, 'more': 'yes'}, own)
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
        checkpoints.save({'step': step}, {})
    assert names(tmp_path) == ['step-00000030', 'step-00000040']
    checkpoints.load(checkpoints.find())
    assert (layer.weight == 40).all()


def test_unfinished_one_is_passed_over(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=2)
    path = checkpoints.save({'step': 10}, {})
    # What a kill leaves before the rename.
    shutil.copytree(path, path.with_name('step-00000020.partial'))
    found = checkpoints.find()
    assert (found.step, found.skipped) == (10, ())
    checkpoints.save({'step': 20}, {})
    assert names(tmp_path) == ['step-00000010', 'step-00000020']


def test_damaged_one_is_put_aside(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=3)
    set_weight(layer, 1.0)
    checkpoints.save({'step': 10}, {})
    set_weight(layer, 2.0)
    path = checkpoints.save({'step': 20}, {})
    (path / 'process_0.pt').write_bytes(b'nothing')
    assert newest(tmp_path).step == 10
    ((skipped, why),) = checkpoints.find().skipped
    assert skipped == path
    assert why == 'process_0.pt is not what was written'
    assert names(tmp_path) == ['step-00000010', 'step-00000020.damaged']
    # The step is written again, rather than the damaged one believed to be it.
    checkpoints.save({'step': 20}, {})
    assert checkpoints.find().step == 20


def test_older_one_outlives_a_failed_one(tmp_path, accelerator, layer, monkeypatch):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    set_weight(layer, 1.0)
    checkpoints.save({'step': 10}, {})

    def full_disk(*_):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full_disk)
        with pytest.raises(OSError, match='No space'):
            checkpoints.save({'step': 20}, {})
    set_weight(layer, 0.0)
    assert checkpoints.find().step == 10
    checkpoints.load(checkpoints.find())
    assert (layer.weight == 1.0).all()


def test_of_another_network(tmp_path, accelerator, layer):
    checkpoints = Checkpoints(tmp_path, accelerator, keep=1)
    checkpoints.save({'step': 10}, {})
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
