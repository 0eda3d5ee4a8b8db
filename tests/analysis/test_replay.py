"""Replays of checkpoints equal what runs recorded; records are the same after an interruption."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimclr_hub.analysis.gradients import GradientsConfig, gradients_of
from slimclr_hub.analysis.replay import Replay, saved_weights
from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.train.diagnostics import NormRecord, Records, last_linear, layer_slices, mean_norms
from tests.analysis.runs import ANALYZE, pretrain, run_script, small_place
from tests.train.runs import make_place

DATA = Path(__file__).parents[1] / 'data'
DIAGNOSTICS = ['--diagnostics.every', '2', '--diagnostics.gradients', '1', '--diagnostics.snapshots', '4']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Twelve steps, the first six at the full width alone, with checkpoints after 5, 6, 10 and 12."""
    place = small_place(tmp_path_factory.mktemp('hook'))
    pretrain(place, '--run.name', 'whole', *DIAGNOSTICS)
    return place / 'runs' / 'whole'


@pytest.fixture(scope='module')
def replay(run):
    return Replay(run, 'cpu')


def test_records_of_the_steps_that_are_due(run):
    records = Records(run)
    assert [(record.step, record.widths, record.width) for record in records.norms()] == [
        *((step, 1, 0.25) for step in (0, 2, 4)),
        *((step, 4, 0.25) for step in (6, 8, 10)),
    ]
    steps, gradients = records.gradients()
    assert steps.tolist() == list(range(12))
    assert gradients.shape == (12, 16 * 64)
    assert sorted(saved_weights(run)) == [0, 4, 5, 6, 8, 10, 12]


@pytest.mark.parametrize('step', [5, 6, 10])
def test_replay_gives_the_recorded_gradients(run, replay, step):
    """Bit for bit: the same images, views, momentum encoder, queue and shuffled keys, in two microbatches."""
    replay.load(step)
    replay.losses(replay.next_steps(), backward=True)
    norms = {record.step: record for record in Records(run).norms()}
    steps, gradients = Records(run).gradients()
    assert torch.equal(last_linear(replay.method).grad.flatten(), gradients[steps == step][0])
    if step in norms:
        recorded = norms[step]
        found = mean_norms(layer_slices(replay.method, 0.25)).tolist()
        assert found == [recorded.smallest, recorded.all, recorded.rest]


def test_replay_gives_the_logged_loss(run, replay):
    replay.load(10)
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    (logged,) = (line for line in lines if line['step'] == 11)
    assert replay.losses(replay.next_steps())['loss'].item() == pytest.approx(logged['loss'], rel=1e-5)


def test_replay_moves_nothing(replay):
    replay.load(10)
    before = {name: tensor.clone() for name, tensor in replay.method.state_dict().items()}
    generator = torch.get_rng_state()
    steps = replay.next_steps(2)
    first, second = replay.losses(steps), replay.losses(steps, backward=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(dict(replay.method.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


def test_losses_depend_on_weights_widths_and_momentum(replay):
    replay.load(10)
    steps = replay.next_steps()
    everything = replay.losses(steps)
    assert {name for name in everything if name.startswith('loss/')} == {
        f'loss/{w}' for w in ('1', '0.75', '0.5', '0.25')
    }
    alone = replay.losses(steps, (1.0,))
    # To the last bit on most CPUs, but not on one without AVX-512.
    torch.testing.assert_close(alone['info_nce/1'], everything['info_nce/1'])
    assert alone['loss'] != everything['loss']
    assert replay.losses(steps, momentum=False)['loss'] != everything['loss']
    with torch.no_grad():
        last_linear(replay.method).mul_(-1)
    assert replay.losses(steps)['loss'] != everything['loss']


def test_gradient_of_several_batches_is_that_of_their_mean_loss(replay):
    """One step of two, or each alone with the momentum encoder at rest and the queue as it was."""
    replay.load(10)
    steps = replay.next_steps(2)
    weight = last_linear(replay.method)
    assert torch.equal(replay.next_steps()[0][0].views[0], steps[0][0].views[0])
    replay.losses(steps, backward=True, momentum=False)
    both = weight.grad.clone()
    replay.losses(steps[:1], backward=True, momentum=False)
    assert not torch.allclose(both, weight.grad)
    assert torch.nn.functional.cosine_similarity(both.flatten(), weight.grad.flatten(), dim=0) > 0.5


@pytest.mark.parametrize('given', ['recipe', 'launcher'])
def test_replay_in_the_precision_of_the_run(tmp_path, monkeypatch, given):
    """In bfloat16, which the recipe asks for or the launcher; float32 gives other gradients."""
    place = make_place(tmp_path, model={'widths': [1.0, 0.25]}, optim={'epochs': 1}, knn={'every': 0}, data={'size': 8})
    options = ['--run.precision', 'bf16']
    if given == 'launcher':
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
        options = []
    pretrain(place, *options, '--run.name', 'half', '--run.checkpoint_steps', '5', '--diagnostics.gradients', '1')
    monkeypatch.delenv('ACCELERATE_MIXED_PRECISION', raising=False)
    replay = Replay(place / 'runs' / 'half', 'cpu')
    replay.load(5)
    replay.losses(replay.next_steps(), backward=True)
    steps, gradients = Records(place / 'runs' / 'half').gradients()
    found = last_linear(replay.method).grad.flatten()
    assert torch.equal(found, gradients[steps == 5][0])
    replay.config = replace(replay.config, run=replace(replay.config.run, precision='no'))
    replay.losses(replay.next_steps(), backward=True)
    assert not torch.equal(last_linear(replay.method).grad.flatten(), found)


def test_run_of_before(tmp_path, capsys):
    """A run whose recipe has keys that are gone has the losses that it had; by commands, with points added to it."""
    run = Path(shutil.copytree(DATA / 'run_before', tmp_path / 'before'))
    replay = Replay(run, 'cpu')
    replay.load(20)
    losses = {name: value.item() for name, value in replay.losses(replay.next_steps(2), backward=True).items()}
    expected = {'loss': 90.535461, 'loss/0.5': 7.508443, 'info_nce/0.25': 6.094223, 'distillation/0.25': 159.959808}
    assert {name: losses[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert replay.method.backbone.conv1.weight.grad.norm().item() == pytest.approx(0.148876, rel=1e-3)
    for number, step in enumerate((18, 19)):
        copy = Path(shutil.copytree(run / 'checkpoints' / 'step-00000020', run / 'checkpoints' / f'step-{step:08d}'))
        state = json.loads((copy / 'state.json').read_text())
        tensors = load_file(copy / 'model.safetensors')
        tensors['backbone.conv1.weight'][number] += 1
        save_file(tensors, copy / 'model.safetensors')
        state['files']['model.safetensors'] = file_hash(copy / 'model.safetensors')
        (copy / 'state.json').write_text(json.dumps({**state, 'step': step}))
    run_script(ANALYZE, 'gradients', str(run))
    of_loss = ('--quantity', 'full', '--normalise', 'filter')
    run_script(ANALYZE, 'surface', str(run), '--resolution', '3', '--batches', '1', *of_loss)
    assert 'before' in capsys.readouterr().out
    (surface,) = json.loads((run / 'analysis' / 'loss-surface.json').read_text())['runs']
    assert surface['values']['loss'][1][1] == pytest.approx(91.006927, rel=1e-4)
    assert len((run / 'analysis' / 'gradients.csv').read_text().splitlines()) == 1 + 3


def test_processes_are_splits_of_a_batch(run, replay, tmp_path):
    """Two processes normalise and shuffle as one does that splits its batch in two."""
    copy = Path(shutil.copytree(run, tmp_path / 'copy'))
    checkpoint = copy / 'checkpoints' / 'step-00000010'
    shutil.copy(checkpoint / 'process_0.pt', checkpoint / 'process_1.pt')
    state = json.loads((checkpoint / 'state.json').read_text())
    del state['sha256']  # as in those of before, which may be edited
    state['files']['process_1.pt'] = state['files']['process_0.pt']
    (checkpoint / 'state.json').write_text(json.dumps({**state, 'processes': 2}))
    recipe = (copy / 'recipe.yaml').read_text()
    (copy / 'recipe.yaml').write_text(recipe.replace('bn_splits: 2', 'bn_splits: 1'))
    divided = Replay(copy, 'cpu')
    divided.load(10)
    replay.load(10)
    torch.testing.assert_close(divided.losses(divided.next_steps()), replay.losses(replay.next_steps()), rtol=0, atol=0)
    divided.load(12)
    assert divided.method.bn_splits == 1
    assert divided.notes == ()


def test_after_the_last_epoch_comes_a_further_one(replay):
    replay.load(12)
    (step,) = replay.next_steps()
    assert len(step) == 2
    assert replay.losses([step])['loss'].isfinite()


def test_resumed_run_leaves_the_same_records(run):
    """Killed somewhere after its checkpoint at step 5, with records beyond it and a line cut off."""
    copy = Path(shutil.copytree(run, run.parent / 'resumed'))
    for step in 6, 10, 12:
        shutil.rmtree(copy / 'checkpoints' / f'step-{step:08d}')
    for path in copy.glob('diagnostics/*-00000008.safetensors'):
        path.unlink()
    with (copy / 'diagnostics' / 'gradients.jsonl').open('a') as file:
        file.write('{"step": 12, "wid')
    pretrain(run.parents[1], '--resume', str(copy))
    for path in (run / 'diagnostics').iterdir():
        assert (copy / 'diagnostics' / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((copy / 'diagnostics').iterdir())) == len(list((run / 'diagnostics').iterdir()))


def test_snapshot_holds_the_trained_weights(run):
    """Tensors of a checkpoint without the momentum encoder and the queue; in slow start only the full width moves."""
    snapshot = load_file(run / 'diagnostics' / 'weights-00000004.safetensors')
    checkpoint = load_file(run / 'checkpoints' / 'step-00000005' / 'model.safetensors')
    assert set(snapshot) == {name for name in checkpoint if not name.startswith(('key_', 'queue'))}
    assert all(snapshot[name].shape == checkpoint[name].shape for name in snapshot)
    start = load_file(run / 'diagnostics' / 'weights-00000000.safetensors')
    moved = {name.split('.')[-2] for name in start if not torch.equal(start[name], snapshot[name])}
    assert {'w100', 'conv1', 'fc2'} <= moved
    assert moved.isdisjoint({'w075', 'w050', 'w025'})


def test_dropped_records_are_those_from_a_step_on(tmp_path):
    records = Records(tmp_path)
    records.drop_from(0)
    assert records.norms() == []
    records.add_norms([NormRecord(step, 0.25, 1.0, 2.0, 3.0, 4) for step in range(6)])
    records.add_gradients([0, 1, 2], torch.arange(6.0).view(3, 2))
    records.add_gradients([3, 4, 5], torch.arange(6.0, 12.0).view(3, 2))
    records.add_weights(0, {'a': torch.zeros(1)})
    records.add_weights(4, {'a': torch.ones(1)})
    records.drop_from(4)
    assert [record.step for record in records.norms()] == [0, 1, 2, 3]
    steps, gradients = records.gradients()
    assert steps.tolist() == [0, 1, 2, 3]
    assert gradients.flatten().tolist() == list(range(8))
    assert list(saved_weights(tmp_path)) == [0]
    records.drop_from(3)
    assert records.gradients()[0].tolist() == [0, 1, 2]


def test_records_are_preferred_and_checkpoints_stand_in(run):
    recorded = gradients_of(run, GradientsConfig())
    assert (recorded.norms_from, recorded.gradients_from) == ('records', 'records')
    assert (recorded.steps_per_epoch, recorded.slow_start) == (6, 2 / 2)
    replayed = gradients_of(run, GradientsConfig(from_checkpoints=True, smallest=0.5))
    assert (replayed.norms_from, replayed.gradients_from) == ('checkpoints', 'checkpoints')
    assert [record.step for record in replayed.norms] == replayed.steps.tolist() == [5, 6, 10, 12]
    assert {record.width for record in replayed.norms} == {0.5}
    with pytest.raises(InputError, match=r'has recorded the share of width 0\.25, not of 0\.5'):
        gradients_of(run, GradientsConfig(smallest=0.5))


@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_damaged_checkpoint(run, tmp_path, damage):
    copy = Path(shutil.copytree(run, tmp_path / 'copy'))
    file = copy / 'checkpoints' / 'step-00000010' / 'model.safetensors'
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    replay = Replay(copy, 'cpu')
    with pytest.raises(InputError, match=r'step-00000010 cannot be read .*take another'):
        replay.load(10)


def test_step_without_a_checkpoint(replay):
    with pytest.raises(InputError, match='no checkpoint after step 7; there are: 5, 6, 10, 12'):
        replay.load(7)


def test_not_a_run():
    with pytest.raises(InputError, match='not the folder of a run'):
        Replay(Path(sys.prefix))
