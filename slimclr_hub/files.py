"""Atomic writes, hashes and JSON lines."""

import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `folder` on leaving, or are removed if there was an error.

    Files of the same names are replaced.

    Args:
        folder: Folder of the files, created if it does not exist.
    """
    with temporary_folder(folder) as partial:
        yield partial
        mode = _usual_mode(partial)
        for path in partial.iterdir():
            path.chmod(mode)  # safetensors makes files for their owner alone
            os.replace(path, folder / path.name)


def encoded(text: str) -> bytes:
    """Text in UTF-8, whatever the locale; names of files in it get the bytes that they have on the disk."""
    return text.encode('utf-8', 'surrogateescape')


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder in `folder`, which is made; those that killed processes have left there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f'.partial-{socket.gethostname()}-'
    for path in folder.glob(f'{glob.escape(prefix)}*'):
        process = path.name.removeprefix(prefix).partition('-')[0]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f'{prefix}{os.getpid()}-') as name:
        yield Path(name)


def try_folder(folder: Path, key: str) -> None:
    """Make a folder and write into it, before there is work to lose.

    Raises:
        InputError: It takes no files; the message names it as the setting `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f'{key} {folder} takes no files ({error.strerror}); give another') from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, in UTF-8."""
    write_bytes(path, encoded(text))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new one."""
    with atomic_files(path.parent) as partial, (partial / path.name).open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of one JSON value a line, without lines that are none, as a kill may leave; a missing file has none.

    Raises:
        OSError: It is there and cannot be read.
    """
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        if path.is_symlink():  # what it points to may come back
            raise
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def append_json_line(path: Path, value: Any) -> None:
    """Append a JSON value as one line, on a line of its own even where a kill cut the last one off."""
    with path.open('ab+') as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b'\n':
                file.write(b'\n')
        file.write(json.dumps(value).encode() + b'\n')


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a file of one JSON value a line atomically."""
    write_text(path, ''.join(json.dumps(value) + '\n' for value in values))


def file_hash(path: Path, kind: str = 'sha256') -> str:
    """Return the hexadecimal hash of a file's content; `kind` is a name that hashlib knows."""
    return _hash(path, hashlib.new(kind, usedforsecurity=False))


def git_hash(path: Path) -> str:
    """Return the hexadecimal name that git gives to a file's content."""
    return _hash(path, hashlib.sha1(b'blob %d\0' % path.stat().st_size, usedforsecurity=False))


def _hash(path: Path, found: 'hashlib._Hash') -> str:
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


def _usual_mode(folder: Path) -> int:
    # The mask of the process can only be read by setting it, which other threads would notice.
    probe = folder / '.mode'
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
