"""Hashes of files."""

import hashlib
from pathlib import Path


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
