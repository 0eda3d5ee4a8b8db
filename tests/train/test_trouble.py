"""Run folders that are damaged, in use, or full: one line, and nothing written."""

import copy
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from PIL import Image, ImageFile

from slimclr_hub.errors import InputError
from slimclr_hub.runs.checkpoints import newest
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.lock import folder_lock
from slimclr_hub.train.command import parse_pretrain
from slimclr_hub.train.pretraining import pretrain
from slimclr_hub.train.tracking import identity
from tests.data_room.files import some_images, write_pngs
from tests.scripts import Script
from tests.train.runs import SCRIPT, contents, environment, make_place

# Holds a folder as a run does, until it is killed.
HOLD = """
import sys, time
from pathlib import Path
from accelerate import Accelerator
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.lock import folder_lock
with folder_lock(Path(sys.argv[1]), Accelerator(cpu=True)):
    print('held', flush=True)
    time.sleep(300)
"""

# Notes signals as a run does.
WAIT = """
import sys, time
from pathlib import Path
from slimclr_hub.runs.job import StopSignals
with StopSignals() as signals:
    print('ready', flush=True)
    while signals.received is None:
        time.sleep(0.01)
    Path(sys.argv[1]).write_text(signals.received.name)
"""


def train(*arguments: str) -> None:
    """What the script does, up to its table and figures, in this process, which has everything imported."""

    def work() -> None:
        pretrain(parse_pretrain(SCRIPT, arguments))

    AcceleratorState._reset_state(True)
    try:
        run_script(work)
    finally:
        AcceleratorState._reset_state(True)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """A run of two epochs whose last checkpoints are those after steps 6 and 8, of 12."""
    place = make_place(
        tmp_path_factory.mktemp('trouble'),
        optim={'epochs': 2},
        knn={'every': 0},
        run={'checkpoint_steps': 2, 'keep_checkpoints': 4, 'name': 'whole', 'log_every': 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ACCELERATE_USE_CPU', 'true')
        train('--config', str(place / 'tiny.yaml'))
    folder = place / 'runs' / 'whole'
    for step in (10, 12):
        shutil.rmtree(folder / 'checkpoints' / f'step-{step:08d}')
    return folder


@pytest.fixture
def run(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    return shutil.copytree(stopped, tmp_path / 'run')


def refused(capsys, *arguments: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as end:
        train(*arguments)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('error: '))
    assert end.value.code == status
    return line


def add(line: bytes):
    def change(run: Path) -> None:
        with (run / 'metrics.jsonl').open('ab') as file:
            file.write(line + b'\n')

    return change


def replaced_by_folder(name: str):
    def change(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return change


def replaced_by_file(run: Path) -> None:
    shutil.rmtree(run / 'checkpoints')
    (run / 'checkpoints').write_bytes(b'no folder')


def record(name: str, content: bytes):
    def change(run: Path) -> None:
        (run / 'diagnostics').mkdir()
        (run / 'diagnostics' / name).write_bytes(content)

    return change


RECORDING = ['--diagnostics.every', '1']
NORM = b'{"step": %s, "width": 0.25, "smallest": 1, "all": 1, "rest": 1, "widths": 4}'
REFUSED = {
    'a record of no numbers': (record('gradients.jsonl', NORM % b'"x"'), RECORDING, 'a file that no run writes'),
    'a record of other names': (record('gradients.jsonl', b'{"steps": 1}'), RECORDING, 'does not hold gradient norms'),
    'a damaged record': (record('last-layer-00000001.safetensors', b'damaged'), RECORDING, 'a file that no run writes'),
    'a record of no step': (record('weights-abcdefgh.safetensors', b''), RECORDING, 'a file that no run writes'),
    'another batch': (lambda run: None, ['--data.batch_size', '32', '--allow_changes', 'true'], '6 steps an epoch'),
    'a damaged checkpoint, and another batch': (
        lambda run: (run / 'checkpoints' / 'step-00000008' / 'optimizer.bin').write_bytes(b''),
        ['--data.batch_size', '32', '--allow_changes', 'true'],
        'step-00000006 was written with 6 steps an epoch',
    ),
    'a number as metrics': (add(b'17'), [], "metrics.jsonl has a line that no run writes, '17'"),
    'metrics without a kind': (add(b'{"step": 1}'), [], 'metrics.jsonl has a line'),
    'metrics without a step': (add(b'{"kind": "train"}'), [], 'metrics.jsonl has a line'),
    'metrics as a folder': (replaced_by_folder('metrics.jsonl'), [], 'metrics.jsonl cannot be read'),
    'checkpoints as a file': (replaced_by_file, [], 'checkpoints cannot be read (Not a directory)'),
    'a recipe edited by hand': (
        lambda run: (run / 'recipe.yaml').write_text((run / 'recipe.yaml').read_text().replace('lr: 0.06', 'lr: 0.05')),
        [],
        'step-00000008: optim.lr 0.06 -> 0.05',
    ),
    'a binary recipe': (
        lambda run: (run / 'recipe.yaml').write_bytes(b'\xff\x00\x80'),
        [],
        'recipe.yaml cannot be read as a recipe',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_resume_writes_nothing(run, capsys, case):
    damage, arguments, named = REFUSED[case]
    damage(run)
    before = contents(run)
    assert named in refused(capsys, '--resume', str(run), *arguments)
    assert contents(run) == before


def test_change_that_never_trains_is_not_recorded(run, capsys):
    """Without a checkpoint nothing tells that the images are others, until they are read."""
    shutil.rmtree(run / 'checkpoints')
    (run / 'model.safetensors').unlink()
    recipe, metrics = (run / 'recipe.yaml').read_bytes(), (run / 'metrics.jsonl').read_bytes()
    images = run.parent / 'images'
    images.mkdir()
    for number in range(96):
        (images / f'{number:02d}.png').write_text('no image')
    Image.new('L', (16, 16)).save(images / '00.png')  # the one that is looked at beforehand
    changed = [
        '--data.name',
        'folder',
        '--data.val_split',
        'null',
        '--data.root',
        str(images),
        '--data.max_corrupt',
        '5',
    ]
    line = refused(capsys, '--resume', str(run), '--allow_changes', 'true', *changed)
    assert 'data.max_corrupt 5' in line
    assert (run / 'recipe.yaml').read_bytes() == recipe
    # What was measured is never thrown away, though the run began anew.
    assert (run / 'metrics-before-restart-1.jsonl').read_bytes() == metrics


def test_finished_run_without_checkpoints_is_not_trained_anew(run, capsys):
    shutil.rmtree(run / 'checkpoints')
    before = contents(run)
    assert f'{run} is finished, and has no checkpoint; give another run.name' in refused(capsys, '--resume', str(run))
    assert contents(run) == before


def test_name_of_a_run_at_its_tracker(tmp_path):
    accelerator = Accelerator(cpu=True)
    name = identity(tmp_path, accelerator)
    assert identity(tmp_path, accelerator) == name
    for content in b'\xff', b'[]', b'{"name": 1}', b'17':
        (tmp_path / 'tracker.json').write_bytes(content)
        with pytest.raises(InputError, match=r'tracker\.json does not name a run of a tracker'):
            identity(tmp_path, accelerator)


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError('no answer\nafter 120 s')


def test_tracker_that_fails_ends_no_training(run, capsys, monkeypatch):
    monkeypatch.setattr(TensorBoardTracker, 'log', unreachable)
    train('--resume', str(run), '--run.tracker', 'tensorboard')
    warning = f'Warning: the tracker failed (no answer); what it misses is in {run}\n'
    assert capsys.readouterr().out.count(warning) == 1
    steps = [json.loads(line)['step'] for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert set(range(1, 13)) <= set(steps)


def test_tracker_that_does_not_begin(run, capsys, monkeypatch):
    monkeypatch.setattr(TensorBoardTracker, 'start', unreachable)
    before = contents(run)
    line = refused(capsys, '--resume', str(run), '--run.tracker', 'tensorboard')
    assert line == 'error: run.tracker tensorboard does not begin a run: no answer'
    assert contents(run) == before


def test_second_job_in_a_folder(run, capsys):
    holder = Script(HOLD, run, folder=run)
    assert holder.wait_for(lambda: holder.stdout == 'held\n')
    before = contents(run)
    assert f'is in use by process {holder.pid} on ' in refused(capsys, '--resume', str(run))
    assert contents(run) == before
    holder.kill()  # the system frees what a killed process held
    with folder_lock(run, Accelerator(cpu=True)):
        assert (run / '.lock').read_text().startswith(f'process {os.getpid()} on ')
    assert not (run / '.lock').exists()


def test_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'lockf', unsupported)
    with (
        pytest.raises(InputError, match=r'the file system of .* has no locks \(Function not implemented\)'),
        folder_lock(tmp_path, Accelerator(cpu=True)),
    ):
        pass


def test_no_room_for_a_checkpoint(run, capsys):
    """A limit on the size of files stands for a full disk: writes fail in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        line = refused(capsys, '--resume', str(run), status=os.EX_TEMPFAIL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = run / 'checkpoints' / 'step-00000008'
    assert 'the checkpoint after step 10 could not be written' in line
    assert f'the last whole one is {last}. Make room, and --resume {run} goes on' in line
    assert not list(run.rglob('*.partial'))
    train('--resume', str(run))
    assert f'Resuming after epoch 1, 2 steps: {last}' in capsys.readouterr().out


def test_no_room_for_a_record(run, capsys):
    """What is written by safetensors, whose errors are its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        line = refused(capsys, '--resume', str(run), '--diagnostics.snapshots', '1', status=os.EX_TEMPFAIL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'File too large' in line
    assert 'diagnostics' in line


# Data that do not come


class Endless(ImageFile.ImageFile):
    """An image that does not come, as from a disk that does not answer."""

    def _open(self) -> None:
        time.sleep(3600)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of images, and a run of them."""
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    Image.init()
    monkeypatch.setattr(Image, 'ID', copy.copy(Image.ID))
    monkeypatch.setattr(Image, 'OPEN', copy.copy(Image.OPEN))
    Image.register_open('ENDLESS', Endless, lambda prefix: prefix.startswith(b'ENDLESS'))
    images = write_pngs(tmp_path / 'images', some_images('train', 24)[0])
    recipe = {
        'method': {'dim': 16, 'queue_size': 32, 'bn_splits': 1},
        'data': {'name': 'folder', 'root': str(images), 'batch_size': 8, 'size': 16, 'val_split': None},
        'optim': {'epochs': 2},
        'knn': {'every': 0},
        'run': {'output': str(tmp_path / 'runs'), 'name': 'run', 'log_every': 1},
    }
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(recipe))
    return images


def stall(images: Path) -> None:
    """Let no image come any more, but the one that is looked at before a run."""
    for image in sorted(images.iterdir())[1:]:
        beside = image.with_suffix('.endless')
        beside.write_bytes(b'ENDLESS' * 9)
        beside.replace(image)


@contextmanager
def meanwhile(until: Callable[[], object], then: Callable[[], object]) -> Iterator[None]:
    """In a thread beside what is done inside, call `then` once `until` is true."""
    ended = threading.Event()

    def work() -> None:
        while not until():
            if ended.wait(0.005):
                return
        then()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('workers', [0, 1])
def test_signal_while_data_do_not_come(folder, capsys, workers):
    run = folder.parent / 'runs' / 'run'

    def trains() -> bool:
        return (run / 'metrics.jsonl').exists()

    def stall_and_stop() -> None:
        stall(folder)
        time.sleep(0.1)  # whether or not it waits by then, it stops
        sigterm()

    arguments = ['--config', str(folder.parent / 'tiny.yaml'), '--data.num_workers', str(workers)]
    with meanwhile(trains, stall_and_stop):
        line = refused(capsys, *arguments, '--optim.epochs', '500', status=os.EX_TEMPFAIL)
    kept = newest(run)
    assert f'stopped by SIGTERM after step {kept.step} of 1500; the state is in {kept.path}' in line


@pytest.mark.parametrize('workers', [0, 1])
def test_images_that_cannot_be_read_any_more(folder, capsys, workers):
    """As on a disk that fails: what has been trained is kept, and a queue is not to start it over and over."""
    run = folder.parent / 'runs' / 'run'

    def fail() -> None:
        for image in folder.iterdir():
            image.write_text('damaged')

    arguments = ['--config', str(folder.parent / 'tiny.yaml'), '--data.num_workers', str(workers)]
    with meanwhile((run / 'metrics.jsonl').exists, fail):
        line = refused(capsys, *arguments, '--optim.epochs', '500')
    kept = newest(run)
    assert kept.step > 0
    assert f'stopped after step {kept.step} of 1500: ' in line
    assert 'no image of the data set can be read; the first was ' in line
    assert f'; the state is in {kept.path}, and --resume' in line


def test_signal_before_the_first_step(folder, capsys):
    stall(folder)
    arguments = ['--config', str(folder.parent / 'tiny.yaml'), '--data.num_workers', '1']
    with meanwhile((folder.parent / 'runs' / 'run' / '.lock').exists, sigterm):
        line = refused(capsys, *arguments, status=os.EX_TEMPFAIL)
    assert 'stopped by SIGTERM after step 0 of 6; there is no state yet, and --resume' in line


def test_wait_for_data_ends_by_itself(folder, capsys):
    stall(folder)
    arguments = ['--config', str(folder.parent / 'tiny.yaml'), '--data.num_workers', '1', '--data.timeout', '1']
    line = refused(capsys, *arguments, status=os.EX_TEMPFAIL)
    assert f'stopped by a wait of 1 s for a batch (data.timeout; data.name folder, data.root {folder}' in line
    assert 'after step 0 of 6; there is no state yet, and --resume' in line


@pytest.mark.parametrize(('number', 'timeout'), [(signal.SIGKILL, 60), (signal.SIGSTOP, 2)])
def test_worker_that_is_killed_or_stopped(folder, capsys, number, timeout):
    before = set(multiprocessing.active_children())

    def workers() -> set:
        return set(multiprocessing.active_children()) - before

    arguments = ['--config', str(folder.parent / 'tiny.yaml'), '--data.num_workers', '1', '--optim.epochs', '500']
    with meanwhile(workers, lambda: os.kill(workers().pop().pid, number)):
        line = refused(capsys, *arguments, '--data.timeout', str(timeout), status=os.EX_TEMPFAIL)
    if number is signal.SIGKILL:
        assert 'stopped by the end of a data worker (DataLoader worker (pid' in line
        assert 'memory: /dev/shm, by which workers hand over batches, holds ' in line
        assert 'lower data.num_workers' in line
    else:
        assert 'stopped by a wait of 2 s for a batch' in line
    assert not workers()


# Signals


def test_end_of_the_launcher_is_a_signal(tmp_path):
    (tmp_path / 'wait.py').write_text(WAIT)
    noted = tmp_path / 'noted'
    launcher = subprocess.Popen(
        [sys.executable, '-m', 'accelerate.commands.launch', str(tmp_path / 'wait.py'), str(noted)],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(tmp_path), 'PYTHONPATH': str(SCRIPT.parents[1])},
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == 'ready\n'
    launcher.terminate()
    launcher.communicate()
    deadline = time.monotonic() + 10
    while not (noted.exists() and noted.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert noted.read_text() == 'SIGTERM'


def test_launcher_that_has_ended_before_the_run_began(tmp_path):
    """As during the imports of the run."""
    late = WAIT.replace('with StopSignals', "print('started', flush=True)\nsys.stdin.read()\nwith StopSignals")
    (tmp_path / 'wait.py').write_text(late)
    noted = tmp_path / 'noted'
    launcher = subprocess.Popen(
        [sys.executable, '-m', 'accelerate.commands.launch', str(tmp_path / 'wait.py'), str(noted)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(tmp_path), 'PYTHONPATH': str(SCRIPT.parents[1])},
        start_new_session=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == 'started\n'
    launcher.kill()
    launcher.communicate()  # closes the input, for which the run has waited
    deadline = time.monotonic() + 30
    while not (noted.exists() and noted.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert noted.read_text() == 'SIGTERM'


def test_end_of_the_terminal_asks_to_stop_except_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert (signals.received, signals.status) == (signal.SIGHUP, os.EX_TEMPFAIL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
