"""Safetensors files: read piece by piece, written whole."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slimclr_hub.errors import InputError

_PICKLES = (b'PK\x03\x04', b'\x80')  # a zip archive, and a bare pickle: what torch.save writes, now and formerly


class TensorFile:
    """An open safetensors file, of which single tensors and slices are read; nothing else of it reaches memory.

    Args:
        path: The file.
        economical: Give back the memory of what was read as reading goes on, rather than at the end; slower where all
            of a file is read. It can be set later, too.

    Raises:
        InputError: There is no such file, or it is not a whole safetensors file.
    """

    _RELEASE_AFTER = 1 << 20  # bytes
    _READ_AHEAD = 1 << 16  # bytes that reading any of them maps

    def __init__(self, path: Path, *, economical: bool = False) -> None:
        self.path = path
        self.economical = economical
        self._read = 0
        self._file = self._open()
        self.names: tuple[str, ...] = tuple(self._file.keys())

    def _open(self) -> Any:
        if not self.path.is_file():
            raise InputError(f'{self.path} does not exist or is not a file')
        try:
            return safe_open(self.path, 'pt').__enter__()
        except (SafetensorError, OSError) as error:
            raise InputError(f'{self.path} {self._fault()} ({error})') from error

    def _fault(self) -> str:
        with self.path.open('rb') as file:
            start = file.read(4)
        if start.startswith(_PICKLES):
            return 'is a PyTorch checkpoint, not safetensors; `slimclr-hub convert` makes a safetensors file of it'
        return 'is not a whole safetensors file; it is truncated or of another format'

    def __enter__(self) -> 'TensorFile':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, value, trace)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self.names}

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What was noted in the file beside its tensors."""
        return self._file.metadata() or {}

    def whole(self, name: str) -> torch.Tensor:
        """A tensor, backed by the file: copy it before the file is closed or changed."""
        return self._count(self._file.get_tensor(name))

    def part(self, name: str, index: Sequence[slice]) -> torch.Tensor:
        """The part of a tensor that `index` selects; copy it as in `whole`."""
        if not index:
            return self.whole(name)
        return self._count(self._file.get_slice(name)[tuple(index)])

    def leading(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The leading block of a tensor that has `shape`; copy it as in `whole`."""
        if tuple(shape) == self.shapes[name]:
            return self.whole(name)
        return self.part(name, [slice(0, n) for n in shape])

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.economical:
            if self._read > self._RELEASE_AFTER:
                # Pages of a mapped file count as this process's memory until the mapping goes.
                self._file.__exit__(None, None, None)
                self._file, self._read = self._open(), 0
            # A slice of the second dimension reaches over whole rows.
            rows = tensor.shape[0] * tensor.stride(0) if tensor.ndim else 1
            self._read += max(self._READ_AHEAD, rows * tensor.element_size())
        return tensor


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; one that is there already is replaced.

    Args:
        tensors: Tensors by name; views and layouts other than contiguous are copied.
        path: The file.
        metadata: What to note beside the tensors.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix='.partial-')
    os.close(handle)
    try:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, partial, metadata={'format': 'pt', **(metadata or {})})
        os.chmod(partial, 0o666 & ~_umask())  # temporary files are made for their owner alone
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
