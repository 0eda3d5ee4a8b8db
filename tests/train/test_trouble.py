"""Run folders that are damaged, in use, or full: one line, and nothing written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.lock import folder_lock
from slimclr_hub.train.command import parse_pretrain
from slimclr_hub.train.pretraining import pretrain
from tests.train.runs import SCRIPT, contents, environment, make_place

# Holds a folder as a run does, until its input ends.
HOLD = """
import sys
from pathlib import Path
from accelerate import Accelerator
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.lock import folder_lock
with folder_lock(Path(sys.argv[1]), Accelerator(cpu=True)):
    print('held', flush=True)
    sys.stdin.read()
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


REFUSED = {
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


def test_second_job_in_a_folder(run, capsys):
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(SCRIPT.parents[1])},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == 'held\n'
    before = contents(run)
    assert f'is in use by process {holder.pid} on ' in refused(capsys, '--resume', str(run))
    assert contents(run) == before
    holder.kill()  # the system frees what a killed process held
    holder.communicate()
    with folder_lock(run, Accelerator(cpu=True)):
        assert (run / '.lock').read_text().startswith(f'process {os.getpid()} on ')
    assert not (run / '.lock').exists()


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
