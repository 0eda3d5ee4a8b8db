"""Samples, chunks of workers and batches of the training loop; unreadable images on the way."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from PIL import UnidentifiedImageError

from slimclr_hub.errors import DataError, shorten

Problem = tuple[str, str]
"""Name of an image and why it cannot be read."""

_logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Views [C, H, W] of an image, its class or -1, and how many samples of a stream's share are used with it."""

    views: tuple[torch.Tensor, ...]
    label: int
    consumed: int = 0


class Chunk(TypedDict):
    """Samples of one worker; a plain dictionary, so that torch's loader pins its tensors.

    `views` are uint8 tensors [n, C, H, W], `labels` and `consumed` are [n]; `role` is the share that they come from.
    n is 0 where a worker reports nothing but problems.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    consumed: torch.Tensor
    role: int
    problems: list[Problem]


@dataclass(frozen=True)
class Batch:
    """A microbatch of one process.

    Args:
        views: Normalised float tensors [b, C, H, W] on the training device, one for each view.
        labels: Classes [b] on the training device, -1 where there are none.
        position: Position of this process in its stream after the batch, for a checkpoint; None where epoch and step
            suffice.
        corrupt: Names of unreadable images that were replaced.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    position: dict[str, Any] | None = None
    corrupt: tuple[str, ...] = ()


def make_chunk(samples: Sequence[Sample], problems: list[Problem], role: int = 0) -> Chunk:
    """Stack samples."""
    return {
        'views': tuple(torch.stack(views) for views in zip(*(sample.views for sample in samples), strict=True)),
        'labels': torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        'consumed': torch.tensor([sample.consumed for sample in samples], dtype=torch.int64),
        'role': role,
        'problems': problems,
    }


def reason(error: Exception) -> str:
    """Explain on one line why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return 'not an image that Pillow can read'
    return ' '.join(f'{type(error).__name__}: {error}'.split())


class CorruptImages:
    """Count distinct unreadable images of this process, and stop training when there are more than `at_most`."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self.reasons: dict[str, str] = {}

    def add(self, problems: Iterable[Problem]) -> None:
        """Log each new image; raise a DataError if there are too many."""
        for name, why in problems:
            if name not in self.reasons:
                self.reasons[name] = why
                _logger.warning('replaced an image that cannot be read: %s (%s)', name, why)
        if len(self.reasons) > self.at_most:
            listed = shorten([f'{name} ({why})' for name, why in self.reasons.items()])
            raise DataError(
                f'{len(self.reasons)} images cannot be read: {listed}; restore or remove them, or allow more than '
                f'data.max_corrupt {self.at_most}'
            )
