"""Errors that a user can correct; commands print their message without a traceback."""

from collections.abc import Sequence

from slimclr_hub.text import printable

_LONGEST = 3000  # characters of a message; a file from anywhere may have a name of megabytes in it


class InputError(ValueError):
    """An argument, file or folder is wrong. The message names the value and the remedy.

    Control characters are escaped, and of a message of thousands of characters the middle is left out.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f'{text[:half]} ... {text[-half:]}'


class DataError(RuntimeError):
    """Data turned out to be unusable while it was read. The message names it and the remedy."""


class DivergedError(RuntimeError):
    """Training produced a loss that is not finite."""


class PreemptedError(RuntimeError):
    """Training was asked to stop, and has saved its state.

    Args:
        message: The reason, and how to resume.
        status: Exit status of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StorageError(PreemptedError):
    """A checkpoint could not be written, for want of space or else; the one before is kept."""


class ExportError(RuntimeError):
    """The outputs of an exported network differ from those of the original."""


def shorten(problems: Sequence[str], most: int = 5) -> str:
    """Join the first problems, and count the others."""
    more = f' and {len(problems) - most} more' if len(problems) > most else ''
    return '; '.join(problems[:most]) + more
