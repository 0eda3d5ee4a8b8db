"""mmengine's checkpoints and configs, read without running code that they contain."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimclr_hub.errors import InputError

if TYPE_CHECKING:
    from mmengine.config import Config

_LONGEST_CONFIG = 1_000_000  # characters


def allow_mmengine_checkpoints() -> None:
    """Let `torch.load` read checkpoints of mmengine's runner; its check stays on and refuses everything else.

    Without it, `--resume`, `mim test`, `mmengine.runner.load_checkpoint` and `DetInferencer` stop at the log in such a
    checkpoint, from torch 2.6 on. It holds for the whole process and may be called again.
    """
    makers: dict[str, Any] = {'_reconstruct': np.zeros(0).__reduce__()[0], 'scalar': np.float64(0).__reduce__()[0]}
    allowed: list[Callable | tuple[Callable, str]] = [_history_buffer(), np.ndarray, np.dtype]
    # Values and counts of the log, and scores that a metric left as scalars of numpy.
    allowed += {type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32')}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before numpy 2 and since; files have either
        allowed += [(maker, f'{module}.{name}') for name, maker in makers.items()]
    allowed.append((_statistic, 'builtins.getattr'))
    torch.serialization.add_safe_globals(allowed)


def _statistic(owner: object, name: str) -> Callable:
    """Stand in for `getattr`, by which mmengine's log names its four statistics; the real one could reach `exec`."""
    if owner is not _history_buffer() or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'the checkpoint asks for {name!r} of {owner!r}, which no log of mmengine contains')
    return getattr(owner, name)


def _history_buffer() -> type:
    return importlib.import_module('mmengine.logging').HistoryBuffer


def parse_values(text: object) -> dict[str, Any]:
    """Parse the text of a config in a checkpoint; unlike mmengine, read its values alone and run nothing.

    Raises:
        InputError: There is no config, or it is longer than 1 MB or holds more than values.
    """
    if not isinstance(text, str):
        raise InputError('there is no config in its meta, as in the checkpoints of a run of mmengine; add --config')
    if len(text) > _LONGEST_CONFIG:
        raise InputError(f'the config in its meta is {len(text)} characters long; add --config')
    try:
        values = {}
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = ast.literal_eval(_DictCalls().visit(value))
                case _:
                    raise ValueError(f'line {statement.lineno} assigns no value to a name')
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f'the config in its meta holds more than values, and was not run: {error}') from error
    return values


def run_config(path: Path) -> 'Config':
    """Load a config of the user's own, which is run; an InputError if it is missing or cannot be read."""
    from mmengine.config import Config

    if not path.is_file():
        raise InputError(f'{path} does not exist or is not a file')
    try:
        return Config.fromfile(path)
    except Exception as error:  # whatever its code raises
        raise InputError(f'{path} cannot be read as a config: {error}') from error


class _DictCalls(ast.NodeTransformer):
    """Replace `dict(key=value)`, as mmengine prints dictionaries, by `{'key': value}`, which is a literal."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id='dict'), args=[], keywords=items) if all(item.arg for item in items):
                return ast.Dict([ast.Constant(item.arg) for item in items], [item.value for item in items])
        return node
