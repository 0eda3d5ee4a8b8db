"""Configuration dataclasses: value checks, which settings change a result, and how two of them differ."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Annotated, Any

import yaml

from slimclr_hub.errors import InputError

RECIPE = 'recipe.yaml'
"""File in a run's folder that holds its configuration."""

_LONGEST = 1 << 18  # bytes of a recipe
_MERGE = 'tag:yaml.org,2002:merge'

PRECISIONS = ('no', 'fp16', 'bf16')

Check = Callable[[str, Any], None]
"""(name, value): raises an InputError that names both if the value is out of range."""


@dataclass(frozen=True)
class Incidental:
    """Base of configuration dataclasses whose fields leave every result as it is, such as a number of workers.

    A configuration may derive from both kinds of dataclass; each field belongs to the class that declares it, and is
    incidental if that class derives from this one directly.
    """


def read_yaml(path: Path) -> Any:
    """Read a YAML file of values that JSON has, too, such as a recipe.

    Raises:
        InputError: It cannot be read or is no such file, or is longer than 256 KiB, as it stands or with its aliases
            written out.
    """
    try:
        if not path.is_file():
            raise InputError(f'{path} does not exist or is not a file')
        with path.open('rb') as file:
            text = file.read(_LONGEST + 1)
        content = None if len(text) > _LONGEST else yaml.load(text.decode(), _Loader)
        # Aliases of aliases may stand for more values than memory holds.
        lengths = accumulate(map(len, json.JSONEncoder().iterencode(content)), initial=len(text))
        if any(length > 2 * _LONGEST for length in lengths) or len(text) > _LONGEST:
            raise InputError(f'{path} is too long for a recipe, which has at most {_LONGEST} bytes')
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f'{path} cannot be read as a recipe: {" ".join(str(error).split())[:500]}') from error
    return content


class _Loader(yaml.SafeLoader):
    """Without merge keys, which may ask for more pairs than memory holds."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == _MERGE:
                raise yaml.constructor.ConstructorError(
                    None, None, 'merge keys (<<) are not read; name the other recipe as `base`', key.start_mark
                )


def differences(recorded: Any, config: Any) -> list[str]:
    """List the settings that make two configurations give different results, as `key old -> new`.

    Args:
        recorded: A configuration dataclass, or a mapping of settings as JSON or YAML has them.
        config: Another, of the same settings.
    """
    before, after = relevant(recorded), relevant(config)
    return [
        f'{key} {before.get(key)} -> {after.get(key)}'
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def relevant(config: Any) -> dict[str, Any]:
    """Return the settings that change a result, as `section.key` -> value; of a mapping all of them."""
    return dict(_relevant(config))


def _relevant(config: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    items = config if isinstance(config, Mapping) else vars(config)
    for name, value in items.items():
        if not isinstance(config, Mapping) and _incidental(type(config), name):
            continue
        if isinstance(value, Mapping) or hasattr(value, '__dict__'):
            yield from _relevant(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', plain(value)


def _incidental(config: type, name: str) -> bool:
    declared = (base for base in reversed(config.__mro__) if name in vars(base).get('__annotations__', {}))
    return Incidental in next(declared, config).__bases__


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of plain values."""
    return {
        name: to_dict(value) if hasattr(value, '__dict__') else plain(value) for name, value in vars(config).items()
    }


def flatten(config: Any) -> dict[str, Any]:
    """A configuration as `section.key` -> value."""
    flat: dict[str, Any] = {}
    for name, section in to_dict(config).items():
        flat |= (
            {f'{name}.{key}': value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        )
    return flat


def plain(value: Any) -> Any:
    """The value with lists in the place of tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise an InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f'{name} {value!r} is not one of {", ".join(map(str, choices))}')


def at_least(name: str, value: float, least: float) -> None:
    """Raise an InputError unless `value` is a finite number from `least` on."""
    if not least <= value < inf:
        raise InputError(f'{name} is {value}; give {least} or more')


def at_most(name: str, value: float, most: float) -> None:
    """Raise an InputError if `value` is more than `most`."""
    if value > most:
        raise InputError(f'{name} is {value}; give {most} or less')


def above(name: str, value: float, bound: float) -> None:
    """Raise an InputError unless `value` is a finite number above `bound`."""
    if not bound < value < inf:
        raise InputError(f'{name} is {value}; give more than {bound}')


def check_fraction(name: str, value: float) -> None:
    """Raise an InputError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f'{name} is {value}; give 0 or more and less than 1')


def check_seed(name: str, value: int) -> None:
    """Raise an InputError unless `value` is a seed for NumPy and torch."""
    if not 0 <= value < 2**32:
        raise InputError(f'{name} is {value}; give 0 to 2**32 - 1')


def check_precision(name: str, value: str | None) -> None:
    """Raise an InputError unless `value` is a precision of accelerate's that jobs here have, or None for its own."""
    if value is not None:
        one_of(name, value, PRECISIONS)


def problem(check: Callable[..., object], *arguments: Any) -> Iterator[str]:
    """The message of the InputError that a check raises, if it does."""
    try:
        check(*arguments)
    except InputError as error:
        yield str(error)


def check_all(problems: Iterable[str]) -> None:
    """Raise one InputError with all problems, if there are any."""
    if found := list(problems):
        raise InputError('; '.join(found))


def bounded(check: Callable[..., None], *bounds: Any) -> Check:
    """A check of one value, for the annotation of a parameter: `Annotated[int, bounded(at_least, 1)]`."""
    return lambda name, value: check(name, value, *bounds)


Count = Annotated[int, bounded(at_least, 1)]
Positive = Annotated[float, bounded(above, 0)]
Fraction = Annotated[float, bounded(check_fraction)]
