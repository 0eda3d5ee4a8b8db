"""Checks of single values of a configuration; each message names key, value and remedy."""

from collections.abc import Collection
from math import inf
from typing import Any

from slimclr_hub.errors import InputError


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
