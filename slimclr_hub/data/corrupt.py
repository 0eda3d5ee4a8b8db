"""Images that cannot be read while training runs: counted, named once, and at some point too many."""

import logging
from collections.abc import Iterable

from PIL import UnidentifiedImageError

from slimclr_hub.data.batches import Problem
from slimclr_hub.errors import DataError

_logger = logging.getLogger(__name__)
_LISTED = 5


def reason(error: Exception) -> str:
    """Why an image could not be read, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return 'not an image that Pillow can read'
    return ' '.join(f'{type(error).__name__}: {error}'.split())


class CorruptImages:
    """The distinct images that this process could not read so far.

    Args:
        at_most: How many may be replaced.
    """

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self.reasons: dict[str, str] = {}

    def add(self, problems: Iterable[Problem]) -> None:
        """Log each image that is new.

        Raises:
            DataError: There are more than `at_most`.
        """
        for name, why in problems:
            if name not in self.reasons:
                self.reasons[name] = why
                _logger.warning('replaced an image that cannot be read: %s (%s)', name, why)
        if len(self.reasons) > self.at_most:
            listed = [f'{name} ({why})' for name, why in list(self.reasons.items())[:_LISTED]]
            more = len(self.reasons) - len(listed)
            raise DataError(
                f'{len(self.reasons)} images cannot be read: {", ".join(listed)}{f" and {more} more" if more else ""}; '
                f'restore or remove them, or allow more than data.max_corrupt {self.at_most}'
            )
