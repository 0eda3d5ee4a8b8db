"""Reading checkpoints that others wrote, without running what is in them."""

import pickle
import re
from collections.abc import Mapping
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
    """The tensors of a checkpoint, on the CPU.

    Reads safetensors and what `torch.save` writes: a state dict, or a dictionary that holds one as `state_dict` or
    `model`. Of a pickle only tensors, containers and numbers are read; anything else in it is refused unexecuted.

    Raises:
        InputError: The file does not exist, is damaged, holds no state dict, or anything that loading would have to
            run.
    """
    if path.suffix == '.safetensors':
        with TensorFile(path):
            pass  # for its errors
        return load_file(path)
    if not path.is_file():
        raise InputError(f'{path} does not exist or is not a file')
    return _state_dict(_load(path), path)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            try:
                return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            except RuntimeError as error:
                if 'mmap can only be used' not in str(error):
                    raise
                return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        refused = ', '.join(sorted(set(_REFUSED.findall(str(error)))))
        if not refused:
            raise InputError(f'{path} is not a checkpoint that torch can read, or is damaged') from error
        raise InputError(
            f'{path} holds more than tensors and numbers: {refused}. It was refused and nothing of it was '
            'run; save its state dict alone'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f'{path} is not a checkpoint that torch can read, or is damaged') from error


def _numpy_scalars() -> list[Any]:
    # The best accuracy is often kept as one; they are numbers like others.
    kinds = [np.dtype(kind) for kind in ('f2', 'f4', 'f8', 'i4', 'i8', '?')]
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
