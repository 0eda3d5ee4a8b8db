"""One job at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError

LOCK = '.lock'


@contextmanager
def folder_lock(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Context in which no job of another main process may work in a folder; all processes enter it together.

    The system frees the lock when the process ends, however it ends.

    Raises:
        InputError: Another process has the folder, or the file `.lock` cannot be written there.
    """
    lock = from_main_process(lambda: _lock(folder))
    try:
        yield
    finally:
        if accelerator.is_main_process:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a file in the folder that holds the name of this process, and return its descriptor."""
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # Not flock, which forked data workers would hold on to after the end of their parent.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which of them it is
            owner = os.read(lock, 300).decode(errors='replace') or 'another process'
            os.close(lock)
            raise InputError(f'{folder} is in use by {owner}; wait for its end, or stop it') from error
        except OSError as error:
            os.close(lock)
            reason = f'the file system of {folder} has no locks ({error.strerror})'
            raise InputError(f'{reason}; give a folder on another one, or mount it with locks') from error
        try:
            still_there = os.fstat(lock).st_ino == path.stat().st_ino
        except FileNotFoundError:  # the job before has just removed it
            still_there = False
        if still_there:
            os.ftruncate(lock, 0)
            os.write(lock, f'process {os.getpid()} on {socket.gethostname()}'.encode())
            return lock
        os.close(lock)
