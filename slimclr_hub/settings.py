"""Configuration dataclasses: value checks, which settings change a result, and how two of them differ."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from math import inf
from typing import Any

from slimclr_hub.errors import InputError

RECIPE = 'recipe.yaml'
"""File in a run's folder that holds its configuration."""

PRECISIONS = ('no', 'fp16', 'bf16')


@dataclass(frozen=True)
class Incidental:
    """Base of configuration dataclasses whose fields leave every result as it is, such as a number of workers.

    A configuration may derive from both kinds of dataclass; each field belongs to the class that declares it, and is
    incidental if that class derives from this one directly.
    """


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
    if isinstance(config, Mapping):
        items = dict(config)
    else:
        items = {field.name: getattr(config, field.name) for field in fields(config) if not _incidental(config, field)}
    for name, value in items.items():
        if is_dataclass(value) or isinstance(value, Mapping):
            yield from _relevant(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', plain(value)


def _incidental(config: Any, field: Field) -> bool:
    owner = next(base for base in reversed(type(config).__mro__) if field.name in vars(base).get('__annotations__', {}))
    return Incidental in owner.__bases__


def flatten(config: Any) -> dict[str, Any]:
    """A configuration dataclass as `section.key` -> value."""
    flat: dict[str, Any] = {}
    for name, section in plain(asdict(config)).items():
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


def above(name: str, value: float, bound: float) -> None:
    """Raise an InputError unless `value` is a finite number above `bound`."""
    if not bound < value < inf:
        raise InputError(f'{name} is {value}; give more than {bound}')


def share(name: str, value: float) -> None:
    """Raise an InputError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f'{name} is {value}; give 0 or more and less than 1')
