"""Samples, chunks of workers and batches of the training loop; unreadable images on the way."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch

from slimclr_hub.errors import DataError, shorten
from slimclr_hub.images import Problem

T = TypeVar('T')
_logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Views [C, H, W] of an image, its class or -1, and how many samples of a stream's share are used with it.

    Views of a neighbour follow those of the image where there is one; `features` [F] are a teacher's, of each.
    """

    views: tuple[torch.Tensor, ...]
    label: int
    consumed: int = 0
    features: tuple[torch.Tensor, ...] = ()


class Chunk(TypedDict):
    """Samples of one worker; a plain dictionary, so that torch's loader pins its tensors.

    `views` are uint8 tensors [n, C, H, W], `labels` and `consumed` are [n], `features` [n, F] as those of samples;
    `role` is the share that they come from. n is 0 where a worker reports nothing but problems.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    consumed: torch.Tensor
    features: tuple[torch.Tensor, ...]
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
        features: A teacher's features [b, F] of the images and of their neighbours, as far as they are known.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    position: dict[str, Any] | None = None
    corrupt: tuple[str, ...] = ()
    features: tuple[torch.Tensor, ...] = ()


def make_chunk(samples: Sequence[Sample], problems: list[Problem], role: int = 0) -> Chunk:
    """Stack samples."""
    return {
        'views': _stacked([sample.views for sample in samples]),
        'labels': torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        'consumed': torch.tensor([sample.consumed for sample in samples], dtype=torch.int64),
        'features': _stacked([sample.features for sample in samples]),
        'role': role,
        'problems': problems,
    }


def _stacked(rows: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


class CorruptImages:
    """Count distinct unreadable images of this process, and stop when there are more than `at_most`.

    `done` says what happens to one: training replaces it, evaluation leaves it out.
    """

    def __init__(self, at_most: int, done: str = 'replaced') -> None:
        self.at_most = at_most
        self.done = done
        self.reasons: dict[str, str] = {}

    def add(self, problems: Iterable[Problem]) -> None:
        """Log each new image; raise a DataError if there are too many."""
        for name, why in problems:
            if name not in self.reasons:
                self.reasons[name] = why
                _logger.warning('%s an image that cannot be read: %s (%s)', self.done, name, why)
        if len(self.reasons) > self.at_most:
            listed = shorten([f'{name} ({why})' for name, why in self.reasons.items()])
            what = '1 image' if len(self.reasons) == 1 else f'{len(self.reasons)} images'
            more = f', or allow more than data.max_corrupt {self.at_most}' if self.at_most else ''
            raise DataError(f'{what} cannot be read: {listed}; restore or remove them{more}')


def on_one_line(loader: Iterable[T]) -> Iterator[T]:
    """Batches of a loader; a DataError of a worker without the traceback that torch makes its message of."""
    try:
        yield from loader
    except Exception as error:
        message = str(error)
        if '\nOriginal Traceback' not in message:
            raise
        # torch's frames refer to the error that refers to them, and to the workers: collected as a cycle these would be
        # waited for, five seconds each. The worker's own traceback is in the message.
        error.with_traceback(None)
        if isinstance(error, DataError):
            raise DataError(message.strip().splitlines()[-1].partition(': ')[2]) from error
        raise error
