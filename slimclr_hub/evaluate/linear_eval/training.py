"""Training of linear probes on features of augmented views or of centre crops, with a test after each epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from slimclr_hub.data.seeding import permutation
from slimclr_hub.data.training import Position, TrainData
from slimclr_hub.errors import DivergedError
from slimclr_hub.evaluate.baselines import Encoder
from slimclr_hub.evaluate.features import SplitFeatures
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig
from slimclr_hub.evaluate.linear_eval.probe import (
    Head,
    ProbeSweep,
    Scaling,
    accuracies,
    folded,
    lr_factor,
    make_optimizer,
)
from slimclr_hub.runs.checkpoints import Checkpoints
from slimclr_hub.runs.job import Job, StopSignals

Record = dict[str, Any]
"""Record of an epoch: `epoch`, `loss` of each learning rate, and `top1` (and `top5`) of each, by width."""

_TOP = 5


@dataclass(frozen=True)
class FeatureBatch:
    """The part of a batch that this process trains on: features [b, C * width] by width, and classes [b].

    `position` is that in this process's stream after the batch, for a checkpoint.
    """

    features: dict[float, torch.Tensor]
    labels: torch.Tensor
    position: Position = None


class AugmentedBatches:
    """Features of each epoch's augmented views, one of each labelled image."""

    def __init__(self, data: TrainData, backbone: Encoder, accelerator: Accelerator) -> None:
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

    `features` are as the probe is to see them; `batch_size`, over all processes, is a multiple of the number of
    processes and no more than there are images.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, features: SplitFeatures, batch_size: int, seed: int, processes: int = 1, rank: int = 0) -> None:
        self._features = features
        self._batch_size = batch_size
        self._seed = seed
        self._size = batch_size // processes
        self._rank = rank
        self.steps_per_epoch = len(features.labels) // batch_size

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


class ProbeTraining(Job[FeatureBatch]):
    """Trains one probe for each learning rate, side by side, all from `head`.

    `batches` have features as the probes see them, with `scaling` applied if given; `validation` has them as the
    network gives them. `folder` is that of the checkpoints; `history` has the record of each epoch.
    """

    evaluate_before_stop = True

    def __init__(
        self,
        config: LinearEvalConfig,
        accelerator: Accelerator,
        head: Head,
        batches: FeatureBatches,
        validation: SplitFeatures,
        scaling: Scaling | None,
        folder: Path,
        signals: StopSignals,
    ) -> None:
        super().__init__(
            accelerator,
            signals,
            epochs=config.optim.epochs,
            steps_per_epoch=batches.steps_per_epoch,
            batch_size=config.data.batch_size,
            title='linear evaluation',
            timeout=config.data.timeout,
        )
        self.config = config
        self.features = batches
        self.validation = validation
        self.scaling = scaling
        rates = config.optim.rates
        sweep = ProbeSweep(head, list(validation.by_width), len(rates), config.probe.distillation)
        self.sweep: Any = accelerator.prepare_model(sweep)
        self.inner: ProbeSweep = accelerator.unwrap_model(self.sweep)
        # Not prepared: with fp16 a scaler would have one learning rate that diverges hold up all others, and the probe
        # is in float32 anyway.
        self.optimizer = make_optimizer(self.inner, config.optim)
        self.checkpoints = Checkpoints(folder, accelerator, keep=1)
        self.history: list[Record] = []

    def run(self) -> list[Record]:
        """Train to the end, from the newest checkpoint if there is one, and return the record of each epoch.

        Raises:
            DivergedError: No learning rate has a finite loss.
            PreemptedError: A signal asked to stop; the state is kept.
        """
        self.resume()
        for note in self.features.notes:
            self.accelerator.print(note)
        self.train()
        return self.history

    def head(self, number: int) -> Head:
        """The `number`-th probe, for features as the network gives them."""
        return folded(self.inner.heads[number], self.scaling)  # type: ignore[arg-type]

    def batches(self, epoch: int, start: int, position: dict[str, Any] | None) -> Iterator[FeatureBatch]:
        """Features of an epoch from step `start` on."""
        return self.features.epoch(epoch, start, position)

    def train_step(self, batch: FeatureBatch) -> dict[str, Any] | None:
        """Take one step of every probe."""
        factor = lr_factor(self.config.optim, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group['lr'] = group['peak'] * factor
        output = self.sweep(batch.features, batch.labels)
        output['loss'].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del output['loss']  # of all probes together, which says nothing
        self.meter.add(output)
        self.look_ahead()
        return batch.position

    def evaluate(self, epoch: int) -> None:
        """Record loss and accuracies of every probe after `epoch` epochs."""
        means = self.meter.means(lambda totals: self.accelerator.reduce(totals, 'sum'))
        self.meter.reset()
        losses = [means.get(f'loss/{i}') for i in range(len(self.inner.heads))]
        if all(loss is None for loss in losses):
            raise DivergedError(
                f'the loss is not finite at any of optim.lr {list(self.config.optim.rates)}; lower them, or '
                'standardise the features'
            )
        classes = next(each.out_features for each in self.inner.modules() if isinstance(each, torch.nn.Linear))
        names = {'top1': 1, 'top5': _TOP} if classes > _TOP else {'top1': 1}
        record: Record = {'epoch': epoch, 'loss': losses}
        features, labels = self.validation.by_width, self.validation.labels
        for name, k in names.items():
            measured = [accuracies(self.head(i), features, labels, k) for i in range(len(losses))]
            # JSON has no numbers as keys.
            record[name] = [{f'{width:g}': value for width, value in each.items()} for each in measured]
        self.history.append(record)
        tops = [max(each[width] for each in record['top1']) for width in record['top1'][0]]
        self.progress.set_postfix(refresh=False, epoch=epoch, top1='/'.join(f'{top:.1f}' for top in tops))

    @property
    def source(self) -> str:
        """Words for the source of the batches, with its settings."""
        return f'data.name {self.config.data.name}, data.root {self.config.data.root}'

    def checkpoint_is_due(self, epoch: int | None) -> bool:
        """True after an epoch that ends a minute or more after the last checkpoint, unless it is the last epoch."""
        return epoch is not None and epoch != self.epochs and self.a_minute_unsaved()

    def state(self) -> dict[str, Any]:
        """The records of the epochs."""
        return {'history': self.history}

    def own(self) -> dict[str, Any]:
        """The state of the optimizer, which accelerate does not know."""
        return {'optimizer': self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on from the state of the optimizer and the records."""
        self.optimizer.load_state_dict(own['optimizer'])
        self.history = state['history']
