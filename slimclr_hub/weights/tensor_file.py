"""Safetensors files, read by slices and written atomically."""

import errno
import io
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slimclr_hub.errors import InputError
from slimclr_hub.files import atomic_files
from slimclr_hub.weights.layouts import layout_of

_PICKLES = (b'PK\x03\x04', b'\x80')  # a zip archive, and a bare pickle: what torch.save writes, now and formerly
_AT_A_TIME = 1 << 20  # bytes
_MOST_NUMBERS = 1 << 58  # of a tensor; a file without data may name more, as one of the dimensions is 0
_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file


class TensorFile:
    """An open safetensors file, of which single tensors and slices are read into memory.

    The library checks the file; reading is done here, by plain reads into the tensors' own memory. Through the
    library's mapping, every page that a slice touches counts as memory until the file is closed, four times a narrow
    network's own, and is a request of its own on network file systems.

    Attributes:
        shapes: Name -> shape of every tensor.
        dtypes: Name -> type of every tensor.
        metadata: Texts of the header.

    Raises:
        InputError: There is no such file, or it is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check()
        self._file = path.open('rb', buffering=0)
        length = int.from_bytes(self._file.read(8), 'little')
        header = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop('__metadata__', None) or {}
        self._entries: dict[str, _Entry] = {}
        for name, entry in header.items():
            if entry['dtype'] not in _DTYPES:
                raise InputError(f'{path}: {name} is of type {entry["dtype"]}, not one of {", ".join(_DTYPES)}')
            if prod(max(1, n) for n in entry['shape']) > _MOST_NUMBERS:
                raise InputError(f'{path}: {name} has shape {entry["shape"]}, which no tensor has')
            begin = 8 + length + entry['data_offsets'][0]
            self._entries[name] = _Entry(_DTYPES[entry['dtype']], tuple(entry['shape']), begin)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def _check(self) -> None:
        try:
            if not self.path.is_file():
                raise InputError(f'{self.path} does not exist or is not a file')
            self.path.open('rb').close()  # the library says of an unreadable file that it does not exist
        except OSError as error:
            raise InputError(f'{self.path} cannot be read: {error.strerror}') from error
        try:
            with safe_open(self.path, 'pt'):
                return
        except (SafetensorError, OSError) as error:
            raise InputError(f'{self.path} {self._fault()} ({error})') from error

    def _fault(self) -> str:
        with self.path.open('rb') as file:
            start = file.read(4)
        if start.startswith(_PICKLES):
            return 'is a PyTorch checkpoint, not safetensors; `slimclr-hub convert` makes a safetensors file of it'
        return 'is not a whole safetensors file; it is truncated or of another format'

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths of a slimmable network's file, in descending order; an InputError if it is no ResNet's."""
        return layout_of(self.shapes).widths

    def __enter__(self) -> 'TensorFile':
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def whole(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        entry = self._entries[name]
        return self._fill(torch.empty(entry.shape, dtype=entry.dtype), entry.begin)

    def part(self, name: str, index: Sequence[slice]) -> torch.Tensor:
        """Read the block of a tensor that slices of step 1 select, one for each dimension from the first on."""
        entry = self._entries[name]
        if not index:
            return self.whole(name)
        bounds = [range(*part.indices(n)) for part, n in zip(index, entry.shape, strict=False)]
        rows, inner = bounds[0], (slice(None), *index[1:])
        row = prod(entry.shape[1:]) * entry.dtype.itemsize
        out = torch.empty([*map(len, bounds), *entry.shape[len(bounds) :]], dtype=entry.dtype)
        if out.shape[1:] == entry.shape[1:]:
            return self._fill(out, entry.begin + rows.start * row)
        some = max(1, _AT_A_TIME // max(1, row))
        for start in range(rows.start, rows.stop, some):
            block = torch.empty((min(some, rows.stop - start), *entry.shape[1:]), dtype=entry.dtype)
            self._fill(block, entry.begin + start * row)
            out[start - rows.start :][: len(block)] = block[inner]
        return out

    def mapped(self, name: str) -> np.ndarray:
        """Map a tensor into memory that processes share, to read rows of a large one at random."""
        entry = self._entries[name]
        dtype = torch.empty(0, dtype=entry.dtype).numpy().dtype
        return _Mapped(self.path, dtype, 'r', entry.begin, entry.shape)

    def copy_leading(self, name: str, target: torch.Tensor) -> None:
        """Read the leading block of a tensor into `target`, of any shape, dtype and device but without gradient."""
        entry = self._entries[name]
        if tuple(target.shape) != entry.shape:
            target.copy_(self.part(name, [slice(0, n) for n in target.shape]))
        elif target.dtype == entry.dtype and target.device.type == 'cpu' and target.is_contiguous():
            self._fill(target, entry.begin)
        else:
            target.copy_(self.whole(name))

    def _fill(self, tensor: torch.Tensor, begin: int) -> torch.Tensor:
        rest = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(begin)
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise InputError(f'{self.path} became shorter while it was read')
            rest = rest[count:]
        return tensor


class _Mapped(np.memmap):
    """A map that a process that is not forked makes anew, where it would be sent all that is mapped."""

    def __reduce__(self) -> Any:
        if not isinstance(self.base, mmap.mmap):  # a part of one
            return super().__reduce__()
        return _Mapped, (self.filename, self.dtype, 'r', self.offset, self.shape)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file atomically; an existing one is replaced, views and other layouts are copied.

    Equal tensors give equal bytes: more than one entry of metadata would be written in random order.
    """
    own: dict[str, torch.Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if (storage := own[name].untyped_storage().data_ptr()) in storages:
            own[name] = own[name].clone()  # safetensors refuses tensors that overlap
        storages.add(storage)
    with atomic_files(path.parent) as partial:
        write_safetensors(own, partial / path.name, {'format': 'pt'})


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; an error of the disk, such as a full one, is the OSError that it is everywhere else."""
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        number = re.search(r'os error (\d+)', str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def save_pickle(content: Any, path: Path) -> None:
    """Write a file by `torch.save`, as far as there is room.

    Raises:
        OSError: It cannot be written.
    """
    buffer = io.BytesIO()  # to a file, PyTorch's own writer ends the process where the disk is full
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())
