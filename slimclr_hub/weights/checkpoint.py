"""Reading of checkpoints by others, without running their content."""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from slimclr_hub.errors import InputError
from slimclr_hub.weights.tensor_file import TensorFile

_REFUSED = re.compile(r'(?:Unsupported (?:global: GLOBAL|class)|GLOBAL) ([\w.]+)')
_HOLDERS = ('state_dict', 'model', 'model_state_dict')


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint to the CPU.

    The file is safetensors, or written by `torch.save`: a state dict, or a dictionary that holds one as `state_dict`
    or `model`. Of a pickle only tensors, containers and numbers are read; anything else is refused and not executed.

    Raises:
        InputError: The file does not exist, is damaged, holds no state dict, or code that loading would execute.
    """
    if path.suffix == '.safetensors':
        with TensorFile(path):
            pass  # its checks
        return load_file(path)
    return _state_dict(_load(path), path)


def _load(path: Path) -> Any:
    try:
        if not path.is_file():
            raise InputError(f'{path} does not exist or is not a file')
        # On leaving, torch disallows all that is named here, even if it had been allowed before.
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([entry for entry in _numpy_scalars() if entry not in allowed]):
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


def _names(path: Path) -> list[str]:
    # Names that unpickling would import, found without unpickling.
    names, texts, memo = [], ['', ''], dict[int, str]()
    with suppress(Exception), path.open('rb') as file:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            pickled: Any = archive.open(next(name for name in archive.namelist() if name.endswith('data.pkl')))
        else:
            pickled = file
            file.seek(0)
        for _ in range(4):  # the format before zip archives begins with three pickles of its own
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
        for holder in _HOLDERS:
            if isinstance(loaded.get(holder), Mapping):
                loaded = loaded[holder]
                break
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors
    raise InputError(f'{path} holds no state dict: no tensors by name, neither directly nor under {_HOLDERS}')
