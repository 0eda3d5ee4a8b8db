"""Errors that a user can put right; commands print their message alone."""

from collections.abc import Sequence


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
