"""Errors that a user can put right, and the checks that raise them; commands print their message alone."""

from collections.abc import Collection, Sequence
from math import inf
from typing import Any


class InputError(ValueError):
    """A wrong argument, file or folder. The message names the value and the remedy."""


class DataError(RuntimeError):
    """Data that cannot be used, met while it is read. The message names it and the remedy."""


class DivergedError(RuntimeError):
    """Training produced a loss that is not finite."""


class PreemptedError(RuntimeError):
    """Training was asked to stop, and has kept its state.

    Args:
        message: What happened and how to go on.
        status: Exit status of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ExportError(RuntimeError):
    """An exported network computes something else than the network it was made of."""


def shorten(problems: Sequence[str], most: int = 5) -> str:
    """Some problems, and how many more there are."""
    more = f' and {len(problems) - most} more' if len(problems) > most else ''
    return '; '.join(problems[:most]) + more


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
