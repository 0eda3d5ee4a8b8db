"""What loaders hand over: samples, chunks of workers, and batches of the training loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

Problem = tuple[str, str]
"""Name of an image and why it cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One image, ready to be batched.

    Args:
        views: Tensors [C, H, W].
        label: Its class, -1 where there is none.
        consumed: For a stream, samples of the worker's share that are used up once this one is.
    """

    views: tuple[torch.Tensor, ...]
    label: int
    consumed: int = 0


class Chunk(TypedDict):
    """Samples of one worker; a plain dictionary, so that torch's loader pins its tensors.

    `views` are tensors [n, C, H, W], of 8 bits or normalised in float32, `labels` and `consumed` [n]; `role` is the
    share that they come from. n may be 0, where nothing but problems is to be told.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    consumed: torch.Tensor
    role: int
    problems: list[Problem]


@dataclass(frozen=True)
class Batch:
    """This process's part of a micro-batch.

    Args:
        views: Normalised float tensors [b, C, H, W] on the training device, one for each view.
        labels: Classes [b] on the training device, -1 where there are none.
        position: Where this process stands in its stream after the batch, for a checkpoint; null where the epoch
            and the step say all.
        corrupt: Names of images that could not be read and were replaced.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    position: dict[str, Any] | None = None
    corrupt: tuple[str, ...] = field(default=())


def make_chunk(samples: Sequence[Sample], problems: list[Problem], role: int = 0) -> Chunk:
    """Stack samples."""
    return {
        'views': tuple(torch.stack(views) for views in zip(*(sample.views for sample in samples), strict=True)),
        'labels': torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        'consumed': torch.tensor([sample.consumed for sample in samples], dtype=torch.int64),
        'role': role,
        'problems': problems,
    }


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Samples of several chunks one after another; their roles have to be kept by the caller."""
    return {
        'views': tuple(torch.cat(views) for views in zip(*(chunk['views'] for chunk in chunks), strict=True)),
        'labels': torch.cat([chunk['labels'] for chunk in chunks]),
        'consumed': torch.cat([chunk['consumed'] for chunk in chunks]),
        'role': chunks[0]['role'],
        'problems': [problem for chunk in chunks for problem in chunk['problems']],
    }


def cut_chunk(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Samples `start` to `stop` of a chunk, without its problems."""
    return {
        'views': tuple(view[start:stop] for view in chunk['views']),
        'labels': chunk['labels'][start:stop],
        'consumed': chunk['consumed'][start:stop],
        'role': chunk['role'],
        'problems': [],
    }
