"""The training of probes on a frozen network: epochs, evaluation after each, checkpoints, and going on from them."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from slimclr_hub.errors import DivergedError, InputError, PreemptedError
from slimclr_hub.evaluate.feature_cache import SplitFeatures
from slimclr_hub.evaluate.linear_eval.batches import FeatureBatch, FeatureBatches
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
from slimclr_hub.runs.agreement import Agreement
from slimclr_hub.runs.checkpoints import Checkpoints
from slimclr_hub.runs.meter import Meter
from slimclr_hub.runs.signals import StopSignals

Record = dict[str, Any]
"""What one epoch gave: `epoch`, `loss` of each learning rate, and `top1` (and `top5`) of each, by width."""

_CHECKPOINT_SECONDS = 60  # an epoch on cached features takes less than its checkpoint
_TOP = 5


class ProbeTraining:
    """Probes that learn from features, and what they reach.

    Args:
        config: The configuration.
        accelerator: The processes.
        head: The head that all probes start from.
        batches: What they learn from.
        validation: Features that they are judged on, as the network gives them.
        scaling: How the features of `batches` have been scaled, if they have.
        folder: Where checkpoints lie.
        signals: What may ask to stop.
    """

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
        self.config = config
        self.accelerator = accelerator
        self.batches = batches
        self.validation = validation
        self.scaling = scaling
        self.signals = signals
        rates = config.optim.rates
        sweep = ProbeSweep(head, list(validation.by_width), len(rates), config.probe.distillation)
        self.sweep: Any = accelerator.prepare_model(sweep)
        self.inner: ProbeSweep = accelerator.unwrap_model(self.sweep)
        # Not prepared: with fp16 a scaler would have one learning rate that diverges hold up all others, and the probe
        # is in float32 anyway.
        self.optimizer = make_optimizer(self.inner, config.optim)
        self.agreement = Agreement(accelerator.num_processes)
        self.checkpoints = Checkpoints(folder, accelerator, keep=1)
        self.meter = Meter()
        self.step = 0
        self.history: list[Record] = []
        self.position: dict[str, Any] | None = None

    def run(self) -> list[Record]:
        """Train to the end, from the newest checkpoint if there is one, and return what each epoch gave.

        Raises:
            DivergedError: No learning rate has a finite loss.
            PreemptedError: A signal asked to stop; the state is kept.
        """
        self._resume()
        for note in self.batches.notes:
            self.accelerator.print(note)
        batch, steps = self.config.data.batch_size, self.batches.steps_per_epoch
        first, start = divmod(self.step, steps)
        self.progress = tqdm(
            total=self.config.optim.epochs * steps * batch,
            initial=self.step * batch,
            unit='img',
            unit_scale=True,
            desc='linear evaluation',
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,
            disable=not self.accelerator.is_main_process,
        )
        saved = time.monotonic()
        with closing(self.progress):
            for epoch in range(first, self.config.optim.epochs):
                stop = self._train_epoch(epoch, start)
                start = 0
                self._evaluate(epoch)
                (due,) = self.agreement.any(time.monotonic() - saved > _CHECKPOINT_SECONDS)
                if epoch + 1 < self.config.optim.epochs and (stop or due):
                    self._save(stop)
                    saved = time.monotonic()
        return self.history

    def head(self, number: int) -> Head:
        """The `number`-th probe, for features as the network gives them."""
        head = self.inner.heads[number]
        return folded(head, self.scaling)  # type: ignore[arg-type]

    def _train_epoch(self, epoch: int, start: int) -> bool:
        """Train from a step of an epoch on, and return whether to stop after it; a stop within it does not return."""
        steps = self.batches.steps_per_epoch
        batches = self.batches.epoch(epoch, start, self.position if start else None)
        batch = next(batches, None)
        (ended,) = self.agreement.any(batch is None)
        if ended:
            data = self.config.data
            raise InputError(
                f'data.name {data.name}, data.root {data.root}: the stream gave no batch of {data.batch_size}; lower '
                'data.batch_size or data.num_workers'
            )
        stop = False
        while not ended:
            assert batch is not None
            batch, stop, ended = self._train_step(batch, batches)
            self.progress.update(self.config.data.batch_size)
            if stop and not ended and self.step % steps:
                self._save(stop)
        self.step = (epoch + 1) * steps  # where a stream has ended early, too
        return stop

    def _train_step(
        self, batch: FeatureBatch, batches: Iterator[FeatureBatch]
    ) -> tuple[FeatureBatch | None, bool, bool]:
        """One step; gives the next batch, whether to stop, and whether the epoch has ended on any process."""
        factor = lr_factor(self.config.optim, self.step, self.batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group['lr'] = group['peak'] * factor
        output = self.sweep(batch.features, batch.labels)
        output['loss'].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del output['loss']  # of all probes together, which says nothing
        self.meter.add(output)
        self.step += 1
        self.position = batch.position
        following = next(batches, None)
        stop, ended = self.agreement.any(self.signals.received is not None, following is None)
        return following, stop, ended

    def _evaluate(self, epoch: int) -> None:
        means = self.meter.means(lambda totals: self.accelerator.reduce(totals, 'sum'))
        self.meter.reset()
        losses = [means.get(f'loss/{i}') for i in range(len(self.inner.heads))]
        if all(loss is None for loss in losses):
            raise DivergedError(
                f'the loss is not finite at any of optim.lr {list(self.config.optim.rates)}; lower them, or '
                'standardise the features'
            )
        names = {'top1': 1, 'top5': _TOP} if self.classes > _TOP else {'top1': 1}
        record: Record = {'epoch': epoch + 1, 'loss': losses}
        features, labels = self.validation.by_width, self.validation.labels
        for name, k in names.items():
            measured = [accuracies(self.head(i), features, labels, k) for i in range(len(losses))]
            # JSON has no numbers as keys.
            record[name] = [{f'{width:g}': value for width, value in each.items()} for each in measured]
        self.history.append(record)
        tops = [max(each.values()) for each in zip_widths(record['top1'])]
        self.progress.set_postfix(refresh=False, epoch=epoch + 1, top1='/'.join(f'{top:.1f}' for top in tops))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return next(module.out_features for module in self.inner.modules() if isinstance(module, torch.nn.Linear))

    # Keeping the state

    def _save(self, stop: bool) -> None:
        state = {'step': self.step, 'steps_per_epoch': self.batches.steps_per_epoch, 'history': self.history}
        own = {
            'optimizer': self.optimizer.state_dict(),
            'meter': self.meter.state_dict(),
            'position': self.position,
        }
        path = self.checkpoints.save(state, own)
        if stop:
            name = self.signals.received.name if self.signals.received is not None else 'a signal to another process'
            total = self.config.optim.epochs * self.batches.steps_per_epoch
            raise PreemptedError(
                f'stopped by {name} after step {self.step} of {total}; the state is in {path}, and the same command '
                'goes on from it',
                self.signals.status,
            )

    def _resume(self) -> None:
        found = self.checkpoints.find()
        for path, reason in found.skipped:
            self.accelerator.print(f'Skipped a damaged checkpoint, {path}: {reason}')
        if found.path is None:
            return
        if found.state['steps_per_epoch'] != self.batches.steps_per_epoch:
            raise InputError(
                f'{found.path} was written with {found.state["steps_per_epoch"]} steps an epoch, and now there are '
                f'{self.batches.steps_per_epoch}; the images have to be the same, or give another run.output'
            )
        own = self.checkpoints.load(found)
        self.optimizer.load_state_dict(own['optimizer'])
        self.step, self.history = found.step, found.state['history']
        if found.state['processes'] == self.accelerator.num_processes:
            self.meter.load_state_dict(own['meter'], self.accelerator.device)
            self.position = own['position']
        epoch, step = divmod(self.step, self.batches.steps_per_epoch)
        place = f'after epoch {epoch}' + (f', {step} steps' if step else '')
        self.accelerator.print(f'Resuming {place}: {found.path}')


def zip_widths(measured: list[dict[str, float]]) -> list[dict[int, float]]:
    """For each width, number of the probe -> accuracy."""
    return [{i: each[width] for i, each in enumerate(measured)} for width in measured[0]]
