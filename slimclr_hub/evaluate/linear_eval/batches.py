"""Batches that the probe is trained on: features of augmented views, or cached features of centre crops."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from slimclr_hub.data.seeding import permutation
from slimclr_hub.data.training import Position, TrainData
from slimclr_hub.evaluate.features import SplitFeatures
from slimclr_hub.models import SlimmableResNet


@dataclass(frozen=True)
class FeatureBatch:
    """The part of a batch that this process trains on.

    Args:
        features: Width -> features [b, C * width].
        labels: Classes [b].
        position: Position in this process's stream after the batch, for a checkpoint.
    """

    features: dict[float, torch.Tensor]
    labels: torch.Tensor
    position: Position = None


class AugmentedBatches:
    """Features of each epoch's augmented views.

    Args:
        data: Labelled images in one view.
        backbone: The network in eval mode, without a classifier.
        accelerator: Decides the precision of the network.
    """

    def __init__(self, data: TrainData, backbone: SlimmableResNet, accelerator: Accelerator) -> None:
        self._data = data
        self._backbone = backbone
        self._accelerator = accelerator
        self.steps_per_epoch = data.steps_per_epoch
        self.notes = data.notes

    def epoch(self, epoch: int, start: int = 0, position: Position = None) -> Iterator[FeatureBatch]:
        """Batches of an epoch from a step on; a stream may end early."""
        for batch in self._data.epoch(epoch, start, position):
            with torch.no_grad(), self._accelerator.autocast():
                features = self._backbone.forward_widths(batch.views[0])
            yield FeatureBatch(features, batch.labels, batch.position)


class CachedBatches:
    """Cached features in a new order for each epoch; images that do not fill a batch are left out, as in training.

    Args:
        features: Features of the training images, as the probe is to see them.
        batch_size: Images a step over all processes, a multiple of them and no more than there are.
        seed: Seed of all orders.
        processes: Number of processes.
        rank: Rank of this process.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, features: SplitFeatures, batch_size: int, seed: int, processes: int = 1, rank: int = 0) -> None:
        length = len(features.labels)
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


FeatureBatches = AugmentedBatches | CachedBatches
"""Batches of this process; an epoch can be entered at any step, and one of a stream may end early."""
