"""What the probe learns from: features of augmented views as they come, or cached features of centre crops."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator

from slimclr_hub.data.seeding import permutation
from slimclr_hub.data.training import Position, TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.feature_cache import SplitFeatures
from slimclr_hub.models import SlimmableResNet


@dataclass(frozen=True)
class FeatureBatch:
    """This process's part of a batch.

    Args:
        features: Width -> features [b, C * width].
        labels: Classes [b].
        position: Where this process stands in its stream after the batch, for a checkpoint.
    """

    features: dict[float, torch.Tensor]
    labels: torch.Tensor
    position: Position = None


class FeatureBatches(Protocol):
    """Source of this process's batches, whose epochs can be entered at any step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know before training starts."""

    def epoch(self, epoch: int, start: int = 0, position: Position = None) -> Iterator[FeatureBatch]:
        """Batches of an epoch from a step on; a stream may end early."""


class AugmentedBatches:
    """Each epoch's views through the frozen network.

    Args:
        data: Labelled images in one view.
        backbone: The network in eval mode, without a classifier.
        accelerator: Whose precision the network runs in.
    """

    def __init__(self, data: TrainData, backbone: SlimmableResNet, accelerator: Accelerator) -> None:
        self._data = data
        self._backbone = backbone
        self._accelerator = accelerator
        self.steps_per_epoch = data.steps_per_epoch

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know before training starts."""
        return self._data.notes

    def epoch(self, epoch: int, start: int = 0, position: Position = None) -> Iterator[FeatureBatch]:
        """Batches of an epoch from a step on; a stream may end early."""
        for batch in self._data.epoch(epoch, start, position):
            with torch.no_grad(), self._accelerator.autocast():
                features = self._backbone.forward_widths(batch.views[0])
            yield FeatureBatch(features, batch.labels, batch.position)


class CachedBatches:
    """Cached features in an order of each epoch's own; as with images, what is left of a batch waits for the next.

    Args:
        features: Features of the training images, as the probe is to see them.
        batch_size: Images a step over all processes.
        seed: Seed of all orders.
        processes: Number of processes.
        rank: Which of them this is.

    Raises:
        InputError: The batch does not fit the images or the processes.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, features: SplitFeatures, batch_size: int, seed: int, processes: int = 1, rank: int = 0) -> None:
        length = len(features.labels)
        if batch_size % processes:
            nearest = max(round(batch_size / processes), 1) * processes
            raise InputError(
                f'data.batch_size {batch_size} does not divide over {processes} processes; nearest that fits: {nearest}'
            )
        if batch_size > length:
            raise InputError(f'data.batch_size {batch_size} is larger than the data set of {length} images')
        self._features = features
        self._batch_size = batch_size
        self._seed = seed
        self._size = batch_size // processes
        self._rank = rank
        self.steps_per_epoch = length // batch_size

    def epoch(self, epoch: int, start: int = 0, position: Position = None) -> Iterator[FeatureBatch]:
        """Batches of an epoch from a step on."""
        labels, by_width = self._features.labels, self._features.by_width
        order = torch.from_numpy(permutation(len(labels), self._seed, epoch)).to(labels.device)
        for step in range(start, self.steps_per_epoch):
            first = step * self._batch_size + self._rank * self._size
            chosen = order[first : first + self._size]
            yield FeatureBatch({width: x[chosen] for width, x in by_width.items()}, labels[chosen])
