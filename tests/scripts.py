"""Scripts in processes that have everything imported: from nothing, the imports of each would take five seconds.

Starts from nothing, and by the launcher, are tests of their own.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.multiprocessing import start_processes

TIMEOUT = 300
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(
    [
        'slimclr_hub.train.pretraining',
        'slimclr_hub.finetune.job',
        # What they import when they come to it.
        'datasets',
        'matplotlib.pyplot',
        'matplotlib.backends.backend_pdf',
        'torch._dynamo',
    ]
)


class Script:
    """A script, or a program given as text, that runs in a process, and a session, of its own."""

    def __init__(
        self, script: Path | str, *arguments: object, folder: Path, variables: Mapping[str, str] = os.environ
    ) -> None:
        self._outputs = Path(mkdtemp(prefix='output-', dir=folder.parent))
        if isinstance(script, str):
            program, script = script, self._outputs / 'program.py'
            script.write_text(program)
        for name in 'stdout', 'stderr':
            (self._outputs / name).touch()
        words = [str(argument) for argument in arguments]
        self._process = _SERVER.Process(target=_run, args=(script, words, folder, dict(variables), self._outputs))
        self._process.start()

    @property
    def pid(self) -> int:
        """Number of its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self._outputs / 'stdout').read_text()

    @property
    def stderr(self) -> str:
        """Its errors, warnings and progress so far."""
        return (self._outputs / 'stderr').read_text()

    def send(self, number: int) -> None:
        """Send a signal to its process and to those that it has started, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it with all that it has started."""
        self.send(signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for its end, and return its status."""
        self._process.join(TIMEOUT)
        assert self._process.exitcode is not None, self.stderr
        return self._process.exitcode

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until `condition` holds, and return whether it did before the script ended."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self._process.is_alive():
                return False
            time.sleep(0.001)
        raise AssertionError(self.stderr)


def start_together(
    processes: int, script: Path, *arguments: object, folder: Path, variables: Mapping[str, str]
) -> list[Script]:
    """Start the processes of one job, told of each other as by a launcher."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    common = {**variables, 'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    ranks = ({**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(processes))
    return [Script(script, *arguments, folder=folder, variables=each) for each in ranks]


def in_processes(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(rank, *arguments)` in processes of its own, all at once."""
    start_processes(function, arguments, count, start_method='forkserver')


def end_well(*scripts: Script) -> str:
    """Wait for scripts that must succeed, and return what the first one has printed."""
    for script in scripts:
        assert script.end() == 0, script.stderr
    return scripts[0].stdout


def _run(script: Path, arguments: list[str], folder: Path, variables: dict[str, str], outputs: Path) -> None:
    gc.freeze()  # what is imported, as tests/conftest.py does
    os.setsid()  # so that workers go with it
    multiprocessing.set_start_method('fork', force=True)  # its own workers start as those of the script do
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [place for place in variables.get('PYTHONPATH', '').split(os.pathsep) if place]
    os.chdir(folder)
    for descriptor, name in enumerate(('stdout', 'stderr'), 1):
        with (outputs / name).open('w') as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name='__main__')
