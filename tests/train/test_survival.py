"""Runs that are killed, stopped, damaged or diverge, and go on.

`whole` is a run that nothing happened to. It logs every four of six steps an epoch, so that means have to survive, too,
and writes a checkpoint after every step, so that many a kill falls into the writing.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data_room.files import write_shards
from tests.scripts import TIMEOUT, end_well
from tests.train.runs import SCRIPT, SHALLOW, environment, make_place, read_metrics, start, start_two

EPOCHS, STEPS = 4, 6
TOTAL = EPOCHS * STEPS
KILLS = 10
LAST = f'step-{TOTAL:08d}'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return make_place(
        tmp_path_factory.mktemp('survival'),
        model=SHALLOW,
        data={'num_workers': 2},
        optim={'epochs': EPOCHS},
        knn={'every': 2},
        run={'log_every': 4, 'checkpoint_steps': 1},
    )


def run_well(place: Path, *arguments: str) -> str:
    return end_well(start(place, *arguments))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / 'checkpoints').glob('step-????????'))


def assert_same_run(folder: Path, whole: Path, last: str = LAST) -> None:
    """Bit for bit: the result, the whole state at the end, and the metrics."""
    assert (folder / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert read_metrics(folder) == read_metrics(whole)
    ours, theirs = folder / 'checkpoints' / last, whole / 'checkpoints' / last
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    state, expected = load_file(ours / 'model.safetensors'), load_file(theirs / 'model.safetensors')
    assert {'queue', 'queue_pointer', 'key_backbone.conv1.weight'} <= expected.keys()
    assert state.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in state.items())
    for name in 'optimizer.bin', *(path.name for path in theirs.glob('process_*.pt')):
        assert_equal(torch.load(ours / name), torch.load(theirs / name))


def assert_equal(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.equal(theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert_equal(value, theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


@pytest.fixture(scope='module')
def whole(place):
    run_well(place, '--config', 'tiny.yaml', '--run.name', 'whole')
    return place / 'runs' / 'whole'


@pytest.fixture
def stopped(place, whole) -> Iterator[Path]:
    """A copy of a run that was killed in the middle of the third epoch."""
    half = place / 'runs' / 'half'
    if not half.exists():
        run = start(place, '--config', 'tiny.yaml', '--run.name', 'half', '--run.keep_checkpoints', '6')
        assert run.wait_for((half / 'checkpoints' / 'step-00000015' / 'state.json').exists)
        run.kill()
    copy = place / 'runs' / 'stopped'
    shutil.copytree(half, copy)
    yield copy
    shutil.rmtree(copy)


# Kills


def test_ten_kills(place, whole):
    folder, chance = place / 'runs' / 'killed', random.Random(0)
    arguments = ['--config', 'tiny.yaml', '--run.name', 'killed']
    kills = writing = 0
    while True:
        run = start(place, *arguments)
        reached = checkpoints(folder)[-1:]
        # Each start gets at least one step further, or the run would never end.
        if run.wait_for(lambda reached=reached: checkpoints(folder)[-1:] > reached) and kills < KILLS:
            if kills % 2:
                run.wait_for(lambda: any((folder / 'checkpoints').glob('*.partial')))
            time.sleep(chance.uniform(0, 0.05))
            run.send(signal.SIGKILL)
            writing += any((folder / 'checkpoints').glob('*.partial'))
            kills += run.end() == -signal.SIGKILL
        if run.end() == 0:
            break
        assert run.end() == -signal.SIGKILL, run.stderr
        arguments = ['--resume', str(folder)]
    assert kills == KILLS
    assert writing > 0
    assert_same_run(folder, whole)
    assert not list(folder.rglob('*.partial'))
    assert checkpoints(folder) == checkpoints(whole)


def test_kill_of_two_processes(place):
    several = ['--method.bn_splits', '1', '--data.num_workers', '1', '--optim.epochs', '2']
    finished, folder = place / 'runs' / 'two', place / 'runs' / 'two-killed'
    end_well(*start_two(place, '--config', 'tiny.yaml', '--run.name', 'two', *several))
    runs = start_two(place, '--config', 'tiny.yaml', '--run.name', 'two-killed', *several)
    assert runs[0].wait_for(lambda: checkpoints(folder)[-1:] >= ['step-00000005'])
    for run in runs:
        run.kill()
    end_well(*start_two(place, '--resume', str(folder)))
    last = f'step-{2 * STEPS:08d}'
    assert_same_run(folder, finished, last)
    assert {path.name for path in (folder / 'checkpoints' / last).glob('process_*')} == {'process_0.pt', 'process_1.pt'}
    # Each process normalises by its own images, which the checkpoint remembers of each.
    first, second = (torch.load(folder / 'checkpoints' / last / f'process_{rank}.pt') for rank in range(2))
    assert not first['statistics']['backbone.bn1.w100.running_mean'].equal(
        second['statistics']['backbone.bn1.w100.running_mean']
    )


# Signals


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signal_saves_and_says_so(place, whole, stopped, number, status):
    before = checkpoints(stopped)
    # Without checkpoints in between, so that what is there afterwards is the signal's.
    run = start(place, '--resume', str(stopped), '--run.checkpoint_steps', 'null')
    assert run.wait_for(lambda: 'Resuming' in run.stdout)
    reached = int(before[-1].removeprefix('step-'))
    assert run.wait_for(lambda: any(record['step'] > reached for record in read_metrics(stopped, 'train')))
    run.send(number)  # to the workers as well, as the keyboard and schedulers do
    assert run.end() == status
    (line,) = (line for line in run.stderr.splitlines() if line.startswith('error: '))
    assert re.search(rf'stopped by {number.name} after step \d+ of {TOTAL}; .* --resume {stopped} goes on', line)
    assert 'Traceback' not in run.stderr
    assert checkpoints(stopped)[-1] > before[-1]
    if number == signal.SIGTERM:  # the others save the same
        run_well(place, '--resume', str(stopped), '--run.checkpoint_steps', '1')
        assert_same_run(stopped, whole)


def test_signal_through_the_launcher(place, whole, stopped):
    """As under SLURM: the notice goes to every process, and the launcher must not die of it."""
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '-q', str(SCRIPT), '--resume', str(stopped)]
    process = subprocess.Popen(
        ['bash', '-c', 'trap "" USR1; exec "$@"', 'bash', *launcher, '--run.checkpoint_steps', 'null'],
        env=environment(place),
        cwd=place,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while 'Resuming' not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert 'stopped by SIGUSR1' in errors
    assert 'Traceback' not in errors


# Damage


def truncate(path: Path) -> None:
    (path / 'model.safetensors').write_bytes((path / 'model.safetensors').read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray((path / 'optimizer.bin').read_bytes())
    content[len(content) // 2] ^= 1
    (path / 'optimizer.bin').write_bytes(content)


def remove(path: Path) -> None:
    (path / 'random_states_0.pkl').unlink()


def forget(path: Path) -> None:
    (path / 'state.json').unlink()


def garble(path: Path) -> None:
    (path / 'state.json').write_text('{"step": 2')


def test_damaged_checkpoints_are_skipped_and_named(place, whole, stopped):
    """The last five are damaged, each in another way."""
    damages = [truncate, flip, remove, forget, garble]
    before, *last = checkpoints(stopped)[-1 - len(damages) :]
    for name, damage in zip(last, damages, strict=True):
        damage(stopped / 'checkpoints' / name)
    printed = run_well(place, '--resume', str(stopped))
    skipped = [line for line in printed.splitlines() if 'Skipped a damaged checkpoint' in line]
    assert len(skipped) == len(damages)
    assert all(str(stopped / 'checkpoints' / name) in line for name, line in zip(reversed(last), skipped, strict=True))
    assert f'{stopped / "checkpoints" / before}' in printed
    assert_same_run(stopped, whole)


def test_nothing_but_damaged_checkpoints(place, whole, stopped):
    names = checkpoints(stopped)
    for name in names:
        truncate(stopped / 'checkpoints' / name)
    printed = run_well(place, '--resume', str(stopped))
    assert printed.count('Skipped a damaged checkpoint') == len(names)
    assert 'starting from the beginning' in printed
    assert_same_run(stopped, whole)


# Resuming by itself, and with changes


def test_auto_starts_and_then_goes_on(place, whole):
    arguments = ['--config', 'tiny.yaml', '--resume', 'auto', '--run.output', str(place / 'auto')]
    run = start(place, *arguments)
    (folder,) = iter_until(lambda: list((place / 'auto').glob('*')))
    assert run.wait_for((folder / 'checkpoints' / 'step-00000008' / 'state.json').exists)
    run.send(signal.SIGTERM)
    assert run.end() == 75
    # Another recipe is another run.
    run = start(place, *arguments, '--optim.lr', '0.01')
    assert run.wait_for(lambda: len(list((place / 'auto').iterdir())) == 2)
    run.kill()
    printed = run_well(place, *arguments)
    assert 'Resuming after epoch' in printed
    assert str(folder) in printed
    assert_same_run(folder, whole)


def iter_until(find: Callable[[], list[Path]]) -> list[Path]:
    deadline = time.monotonic() + TIMEOUT
    while not find():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return find()


def test_auto_by_name_refuses_another_configuration(place, stopped):
    arguments = ['--config', 'tiny.yaml', '--resume', 'auto', '--run.name', 'stopped', '--optim.lr', '0.01']
    run = start(place, *arguments)
    assert run.end() == 2
    assert 'optim.lr 0.06 -> 0.01' in run.stderr
    assert 'Traceback' not in run.stderr


def test_allowed_change(place, whole, stopped):
    step = int(checkpoints(stopped)[-1].removeprefix('step-'))
    run_well(place, '--resume', str(stopped), '--allow_changes', 'true', '--optim.lr', '0.01')
    assert 'lr: 0.01' in (stopped / 'recipe.yaml').read_text()
    assert 'lr: 0.06' in (stopped / f'recipe-until-step-{step}.yaml').read_text()
    before = [record for record in read_metrics(whole, 'train') if record['step'] <= step]
    ours = read_metrics(stopped, 'train')
    assert ours[: len(before)] == before
    assert ours[-2]['lr'] < read_metrics(whole, 'train')[-2]['lr'] / 5
    # What cannot be: the position within an epoch has no meaning for other batches.
    arguments = ['--data.batch_size', '32', '--optim.lr', '0.01', '--allow_changes', 'true']
    run = start(place, '--resume', str(stopped), *arguments)
    assert run.end() == 2
    assert '6 steps an epoch, and now there are 3' in run.stderr


# Divergence


def test_divergence_keeps_the_state_that_led_to_it(place):
    folder = place / 'runs' / 'diverging'
    arguments = ['--optim.lr', '1e30', '--method.slow_start_epochs', '0', '--knn.every', '0']
    run = start(place, '--config', 'tiny.yaml', '--run.name', 'diverging', *arguments)
    assert run.end() == 2
    (line,) = (line for line in run.stderr.splitlines() if line.startswith('error: '))
    assert 'Lower optim.lr 1e+30' in line
    (kept,) = folder.glob('diverged-at-step-*')
    assert str(kept) in line
    state = json.loads((kept / 'state.json').read_text())
    assert checkpoints(folder)[-1:] == [f'step-{state["step"]:08d}']
    assert not (folder / 'model.safetensors').exists()
    # The optimizer has not moved: the parameters are those of the last step, and with the batch give the same loss.
    last = load_file(folder / 'checkpoints' / checkpoints(folder)[-1] / 'model.safetensors')
    parameters = {
        name: tensor for name, tensor in load_file(kept / 'model.safetensors').items() if 'running' not in name
    }
    backbone = [name for name in parameters if name.startswith(('backbone', 'head')) and 'tracked' not in name]
    assert all(parameters[name].equal(last[name]) for name in backbone)
    own = torch.load(kept / 'process_0.pt')
    assert [view.shape for view in own['views'][0]] == [(16, 1, 16, 16)] * 2
    assert own['features'] == [[]]  # of no teacher
    assert not own['output']['loss'].isfinite()
    # What the message proposes.
    arguments = [
        '--allow_changes',
        'true',
        '--optim.lr',
        '0.01',
        '--optim.epochs',
        '1',
        '--method.slow_start_epochs',
        '0',
    ]
    shutil.rmtree(folder / 'checkpoints')  # where only the first step is of use, the beginning is the last checkpoint
    run_well(place, '--resume', str(folder), *arguments)
    assert (folder / 'model.safetensors').exists()


# Accumulation


def test_accumulated_steps_are_whole_steps(place, whole):
    """Two parts in turn are one batch normalised in two parts: momentum, queue and schedule move once a step."""
    # Small steps, since training magnifies the rounding of sums in another order.
    common = ['--config', 'tiny.yaml', '--optim.epochs', '1', '--optim.lr', '0.001', '--knn.every', '0']
    common += ['--method.shuffle_keys', 'false', '--run.log_every', '1']
    run_well(place, *common, '--run.name', 'at-once')
    run_well(place, *common, '--run.name', 'in-parts', '--method.bn_splits', '1', '--optim.accumulation_steps', '2')
    ours, theirs = (read_metrics(place / 'runs' / name, 'train') for name in ('in-parts', 'at-once'))
    assert len(ours) == len(theirs)
    for record, expected in zip(ours, theirs, strict=True):
        assert record.keys() == expected.keys()
        assert (record['lr'], record['momentum']) == (expected['lr'], expected['momentum'])
        for name in (name for name in record if name.startswith(('loss', 'info_nce'))):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    assert ours[0]['grad_norm'] == pytest.approx(theirs[0]['grad_norm'], rel=1e-5)
    ours, theirs = (
        load_file(place / 'runs' / name / 'checkpoints' / 'step-00000006' / 'model.safetensors')
        for name in ('in-parts', 'at-once')
    )
    assert ours['queue_pointer'].equal(theirs['queue_pointer'])
    torch.testing.assert_close(ours['queue'], theirs['queue'], rtol=0, atol=1e-3)


# Streams


def test_stream_goes_on_with_the_next_sample(place):
    """Five shards of unequal lengths: a run that was stopped within an epoch is the run that was not."""
    write_shards(place, (25, 7, 30, 20, 14))
    arguments = ['--config', 'tiny.yaml', '--data.name', 'wds/', '--data.root', str(place), '--data.val_split', 'null']
    arguments += ['--data.train_split', 'train-{0000..0004}.tar', '--data.shuffle_buffer', '8', '--optim.epochs', '3']
    run_well(place, *arguments, '--run.name', 'stream')
    folder = place / 'runs' / 'stream-stopped'
    run = start(place, *arguments, '--run.name', 'stream-stopped')
    assert run.wait_for((folder / 'checkpoints' / 'step-00000008' / 'state.json').exists)
    run.send(signal.SIGTERM)
    assert run.end() == 75
    step = int(checkpoints(folder)[-1].removeprefix('step-'))
    assert step % STEPS, 'the run was to be stopped within an epoch'
    run_well(place, '--resume', str(folder))
    assert read_metrics(folder) == read_metrics(place / 'runs' / 'stream')
    ours, theirs = (path / 'model.safetensors' for path in (folder, place / 'runs' / 'stream'))
    assert ours.read_bytes() == theirs.read_bytes()
