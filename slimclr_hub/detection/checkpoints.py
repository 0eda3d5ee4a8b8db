"""What mmengine writes into its own checkpoints, made known to `torch.load`, which refuses unknown classes."""

import importlib
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

# Values and counts of the log, and scores that a metric left as scalars of numpy.
_DTYPES = ('float64', 'float32', 'int64', 'int32')


def allow_mmengine_checkpoints() -> None:
    """Let `torch.load` read the checkpoints of mmengine's runner. Its check stays on and refuses everything else.

    Without it, `--resume`, `mim test`, `mmengine.runner.load_checkpoint` and `DetInferencer` stop at the log that such
    a checkpoint contains, from torch 2.6 on. What is allowed is allowed in the whole process, see
    `torch.serialization.add_safe_globals`. Once is enough, again does no harm.
    """
    makers: dict[str, Any] = {'_reconstruct': np.zeros(0).__reduce__()[0], 'scalar': np.float64(0).__reduce__()[0]}
    allowed: list[Callable | tuple[Callable, str]] = [_history_buffer(), np.ndarray, np.dtype]
    allowed += {type(np.dtype(name)) for name in _DTYPES}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before numpy 2 and since; files have either
        allowed += [(maker, f'{module}.{name}') for name, maker in makers.items()]
    allowed.append((_statistic, 'builtins.getattr'))
    torch.serialization.add_safe_globals(allowed)


def _statistic(owner: object, name: str) -> Callable:
    """What a checkpoint gets for `getattr`, by which mmengine's log names its four statistics.

    The real one would reach every object of the process: a function has its module, and a module may have `exec`.
    """
    if owner is not _history_buffer() or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'the checkpoint asks for {name!r} of {owner!r}, which no log of mmengine contains')
    return getattr(owner, name)


def _history_buffer() -> type:
    return importlib.import_module('mmengine.logging').HistoryBuffer
