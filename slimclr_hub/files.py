"""Atomic writes, hashes and JSON lines."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; what is written into it moves up on leaving, and goes if there was an error.

    Files that are there already are replaced.

    Args:
        folder: Where the files are to lie; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.partial-') as name:
        partial = Path(name)
        yield partial
        mode = _usual_mode(partial)
        for path in partial.iterdir():
            path.chmod(mode)  # safetensors makes files for their owner alone
            os.replace(path, folder / path.name)


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, never a part."""
    partial = path.with_name(f'{path.name}.partial')
    with partial.open('w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path, kind: str = 'sha256') -> str:
    """Hexadecimal hash of a file's content.

    Args:
        path: The file.
        kind: A name that hashlib knows.
    """
    found = hashlib.new(kind, usedforsecurity=False)
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _usual_mode(folder: Path) -> int:
    # The mask of the process can only be read by setting it, which other threads would notice.
    probe = folder / '.mode'
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
