"""Configs of MMDetection: values out of a checkpoint's text, which is not run, or a file that is."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimclr_hub.errors import InputError

if TYPE_CHECKING:
    from mmengine.config import Config


def read_config(text: object) -> 'Config':
    """A config from its text in a checkpoint, which mmengine would run; here only values are read.

    Raises:
        InputError: It is none, or holds more than values.
    """
    from mmengine.config import Config

    if not isinstance(text, str):
        raise InputError('there is no config in its meta, as in the checkpoints of a run of mmengine; add --config')
    try:
        values = {}
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    values[name] = _value(statement.value)
                case _:
                    raise ValueError(f'line {statement.lineno} assigns no value to a name')
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(f'the config in its meta holds more than values, and was not run: {error}') from error
    return Config(values)


def run_config(path: Path) -> 'Config':
    """A config from a file of the user's own, which is run.

    Raises:
        InputError: There is no such file, or it cannot be read.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise InputError(f'{path} does not exist or is not a file')
    try:
        return Config.fromfile(path)
    except Exception as error:  # whatever its code raises
        raise InputError(f'{path} cannot be read as a config: {error}') from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _value(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case _:
            return ast.literal_eval(node)
