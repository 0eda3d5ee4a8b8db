"""Reading of checkpoints by others, without running their content."""

import pickle
import pickletools
import re
import reprlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from slimclr_hub.errors import InputError
from slimclr_hub.weights.slices import BATCH_COUNT, DISJOINT
from slimclr_hub.weights.tensor_file import TensorFile

_REFUSED = re.compile(r'(?:Unsupported (?:global: GLOBAL|class)|GLOBAL) ([\w.]+)')
_TRUNK = ('classy_state_dict', 'base_model', 'model', 'trunk')  # of VISSL
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DINO = ('student', 'teacher')
_OF_ANY_SIZE = {'builtins.bytearray', '__builtin__.bytearray'}  # a pickle of a few bytes makes one of gigabytes
_HOLDERS = ('state_dict', 'model', 'model_state_dict')


class _Options:
    """What an `argparse.Namespace` is read as: attributes, no code."""


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint to the CPU.

    The file is safetensors, or written by `torch.save`: a state dict, or a dictionary that holds one as `state_dict`
    or `model`, as DINO's `student` and `teacher`, or where VISSL has its trunk. Of a pickle only tensors, containers,
    numbers and the options of a script are read; anything else is refused and not executed.

    Raises:
        InputError: The file does not exist, is damaged, holds no state dict, or code that loading would execute; a
            tensor has no name, or is sparse, quantised, without data or larger than the file's data of it.
    """
    if path.suffix == '.safetensors':
        with TensorFile(path):
            pass  # its checks
        return load_file(path)
    return _state_dict(load_pickle(path), path)


def load_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote to the CPU, with the tensors still in the file; for errors see `read_checkpoint`."""
    try:
        if not path.is_file():
            raise InputError(f'{path} does not exist or is not a file')
        _check_bounded(path)
        # On leaving, torch disallows all that is named here, even if it had been allowed before.
        allowed = torch.serialization.get_safe_globals()
        known = [*_numpy_scalars(), (_Options, 'argparse.Namespace')]
        with torch.serialization.safe_globals([entry for entry in known if entry not in allowed]):
            try:
                return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            except RuntimeError as error:
                if 'mmap can only be used' not in str(error):
                    raise
                return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        names, problem = _REFUSED.findall(str(error)), 'holds more than tensors and numbers'
        if not names and 'Unsupported operand' in str(error):
            names, problem = _names(path), 'is of a pickle protocol that torch reads only by running it, and names'
        if not names:
            raise InputError(f'{path} is not a checkpoint that torch can read, or is damaged') from error
        raise InputError(
            f'{path} {problem}: {", ".join(sorted(set(names)))}. It was refused and nothing of it was '
            'run; save its state dict alone'
        ) from error
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # a damaged pickle raises any
        raise InputError(f'{path} is not a checkpoint that torch can read, or is damaged') from error


def _check_bounded(path: Path) -> None:
    """Raise an InputError if reading may take more memory than the file's size, which `torch.save` never needs."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise InputError(f'{path} is compressed, as torch.save writes none; load and save it again')
    if found := _OF_ANY_SIZE.intersection(_names(path)):
        raise InputError(f'{path} holds a {found.pop()}, which may be of any size; save its state dict alone')


def _names(path: Path) -> list[str]:
    # Names that unpickling would import, found without unpickling.
    names, texts, memo = [], ['', ''], dict[int, str]()
    with suppress(Exception), path.open('rb') as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            pickles: list[Any] = [archive.open(name) for name in archive.namelist() if name.endswith('data.pkl')]
        else:
            file.seek(0)
            pickles = [file] * 5  # the format before zip archives has four pickles of its own
        for pickled in pickles:
            argument: Any
            for opcode, argument, _ in pickletools.genops(pickled):
                if opcode.name == 'GLOBAL':
                    names.append(argument.replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    names.append('.'.join(texts[-2:]))
                elif opcode.name == 'MEMOIZE':
                    memo[len(memo)] = texts[-1]
                elif opcode.name.endswith('GET'):
                    texts.append(memo.get(argument, ''))
                elif isinstance(argument, str):
                    texts.append(argument)
    return names


def _numpy_scalars() -> list[Any]:
    # The best accuracy is often saved as one.
    kinds = [np.dtype(kind) for kind in f'{np.typecodes["AllInteger"]}efd?']
    scalar = np.float64(0).__reduce__()[0]
    names = ['numpy._core.multiarray.scalar', 'numpy.core.multiarray.scalar']
    return [*((scalar, name) for name in names), np.dtype, *{type(kind) for kind in kinds}]


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(loaded, Mapping):
        for name in _TRUNK:
            if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
                loaded = loaded[name]
        holder = next((name for name in _HOLDERS if isinstance(loaded.get(name), Mapping)), None)
        if holder is not None:
            loaded = loaded[holder]
        elif all(isinstance(loaded.get(name), Mapping) for name in _DINO):
            loaded = {f'{who}.{name}': value for who in _DINO for name, value in loaded[who].items()}
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise InputError(
                    f'{path} holds a tensor under {reprlib.repr(name)}, which is no name; save its state dict'
                )
            check_form(name, tensor)
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        if sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) > path.stat().st_size:
            raise InputError(f'{path} holds tensors that are larger than the file; save its state dict')
        if tensors:
            return tensors
    raise InputError(f'{path} holds no state dict: no tensors by name, neither directly nor under {_HOLDERS}')


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor of a network holds finite real numbers; those that only count or mark may be of any type.

    Raises:
        InputError: It is of another type, or has a NaN or infinite value.
    """
    if name.endswith(BATCH_COUNT) or name == DISJOINT:
        return
    if tensor.dtype not in _FLOATS:
        raise InputError(f'{name} is of {tensor.dtype}; weights are of {", ".join(map(str, _FLOATS))}')
    # The extremes of a tensor need no copy of it, and are NaN where one value is.
    if not tensor.is_meta and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise InputError(f'{name} holds NaN or infinite values; the training that wrote it had diverged')


def check_form(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is an ordinary one with all of its data.

    Raises:
        InputError: It is sparse, quantised or without data, or has more elements than data, as a pickle may give any
            shape to a few bytes.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = 'quantised' if tensor.is_quantized else 'without data' if tensor.is_meta else 'sparse'
        raise InputError(f'{name} is {kind}; save it as an ordinary tensor')
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(f'{name} has shape {list(tensor.shape)}, more than the file holds of it')
