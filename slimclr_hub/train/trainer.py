"""The training loop."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from slimclr_hub.data.batches import Batch
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DivergedError, InputError, PreemptedError
from slimclr_hub.methods.sync_batchnorm import sync_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import WidthFacts
from slimclr_hub.runs.agreement import Agreement, FiniteLoss
from slimclr_hub.runs.checkpoints import Checkpoints, Found
from slimclr_hub.runs.memory import keep_freed_memory, peak_memory
from slimclr_hub.runs.meter import Meter
from slimclr_hub.runs.signals import StopSignals
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.parse import AUTO, Command, check_unchanged, load_recipe
from slimclr_hub.train.result import write_result
from slimclr_hub.train.run_folder import RECIPE, RunFolder, find_run
from slimclr_hub.train.setup import arrange, make_method, make_optimizer, make_schedule
from slimclr_hub.train.tracking import start_tracker

Accuracies = dict[str, dict[float, float]]
"""Kind of evaluation -> width -> accuracy in percent."""

_TITLES = {'knn': 'k-NN', 'linear': 'linear', 'top1': 'top-1'}


class Evaluator(Protocol):
    """Measures a network while it trains, on all processes together."""

    def __call__(self, backbone: SlimmableResNet, epoch: int) -> Accuracies:
        """What is due after `epoch`; the network is left as it was."""


class EvaluatorFactory(Protocol):
    """Makes the evaluator of a run, if it has one."""

    def __call__(self, config: PretrainConfig, accelerator: Accelerator) -> Evaluator | None:
        """The evaluator that the configuration asks for."""


class Observer(Protocol):
    """Looks at the gradients of a run, on the main process alone."""

    def __call__(self, method: nn.Module, step: int, widths: Sequence[float]) -> None:
        """Look at a method after `step` steps, with the gradients of the next one; wait for nothing."""

    def write(self, everything: bool) -> list[tuple[int, dict[str, float]]]:
        """Keep what has been seen; `everything` before a checkpoint, since the run may go on from there.

        Returns:
            What the tracker shall show, by the number of steps that it came after.
        """


class ObserverFactory(Protocol):
    """Makes the observer of a run, if it has one."""

    def __call__(self, config: PretrainConfig, method: nn.Module, folder: Path, step: int) -> Observer | None:
        """The observer that the configuration asks for, of a run that goes on from `step`."""


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Args:
        folder: The run's folder, which `timm.create_model('local-dir:...')` opens.
        facts: Cost and accuracy of each width.
        metrics: Lines of metrics.jsonl.
    """

    folder: Path
    facts: list[WidthFacts]
    metrics: list[dict[str, Any]]


def pretrain(
    command: Command,
    make_evaluator: EvaluatorFactory | None = None,
    make_observer: ObserverFactory | None = None,
) -> Result:
    """Pre-train a network as configured, on the processes and devices that accelerate was launched with.

    Args:
        command: The configuration, and the folder of a run to resume if any.
        make_evaluator: What to measure between epochs; nothing unless given.
        make_observer: What to record of gradients and weights; nothing unless given.

    Raises:
        InputError: Something in the configuration or the folder does not fit, found before training starts.
        DataError: More images than allowed cannot be read.
        DivergedError: The loss is not finite; the optimizer has not moved, and the state is kept.
        PreemptedError: A signal asked to stop; the state is kept.
    """
    config, resume = command.config, command.resume
    accelerator = _accelerator(config)
    if resume == AUTO:
        resume = find_run(config, accelerator)
        if resume is not None:
            check_unchanged(load_recipe(resume / RECIPE), command)
    if resume is not None:
        # The checkpoint replaces them, and they may be gone by now.
        config = replace(config, model=replace(config.model, weights=None))
    with StopSignals() as signals:
        trainer = _Trainer(config, accelerator, make_evaluator, make_observer, signals)
        return trainer.run(resume, command.config)


class _Trainer:
    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        make_evaluator: EvaluatorFactory | None,
        make_observer: ObserverFactory | None,
        signals: StopSignals,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.signals = signals
        self.data = TrainData(
            config.data,
            config.views,
            config.second_views,
            seed=config.run.seed,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
            parts=config.optim.accumulation_steps,
            view_count=config.view_count,
            device=accelerator.device,
        )
        self.schedule = make_schedule(config, self.data.steps_per_epoch)
        set_seed(config.run.seed)
        method = make_method(config)
        if config.method.sync_bn and accelerator.num_processes > 1:
            method = sync_batchnorm(method, accelerator.device)
        arrange(config, method)
        if config.speed.keep_memory and accelerator.device.type == 'cpu':
            keep_freed_memory()
        fused = config.speed.fused and accelerator.scaler is None
        optimizer = make_optimizer(config.optim, method, fused)
        self.method: Any
        self.method, self.optimizer = accelerator.prepare(method, optimizer)
        self.inner: Any = accelerator.unwrap_model(self.method)
        self.trained = [parameter for parameter in self.inner.parameters() if parameter.requires_grad]
        self.evaluate = make_evaluator(config, accelerator) if make_evaluator else None
        self.make_observer = make_observer if accelerator.is_main_process else None
        self.observe: Observer | None = None
        self.agreement = Agreement(accelerator.num_processes)
        self.finite = FiniteLoss()
        self.meter = Meter()
        self.step = 0
        self.position: dict[str, Any] | None = None

    def run(self, resume: Path | None, config_asked: PretrainConfig) -> Result:
        config, accelerator = self.config, self.accelerator
        self.folder = RunFolder(resume, accelerator) if resume is not None else RunFolder.create(config, accelerator)
        self.checkpoints = Checkpoints(self.folder.path, accelerator, config.run.keep_checkpoints)
        evaluated = resume is not None and self._resume(self.checkpoints.find(), config_asked)
        if resume is None:
            accelerator.print(f'Run: {self.folder.path}')
        for note in self._notes():
            accelerator.print(note)
        start_tracker(config, accelerator, self.folder.path, self.step)
        if self.make_observer is not None:
            self.observe = self.make_observer(config, self.inner, self.folder.path, self.step)
        first, start = divmod(self.step, self.schedule.steps_per_epoch)
        if start == 0 and not evaluated:
            self._evaluate(first)
        self.optimizer.zero_grad()
        batch = config.data.batch_size
        self.progress = tqdm(
            total=self.schedule.total_steps * batch,
            initial=self.step * batch,
            unit='img',
            unit_scale=True,
            desc='pre-training',
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,
            disable=not accelerator.is_main_process,
        )
        with closing(self.progress):
            for epoch in range(first, config.optim.epochs):
                stop = self._train_epoch(epoch, start)
                start = 0
                if stop:
                    # An evaluation may take longer than whoever asks to stop allows.
                    self._stop(self._save(evaluated=False))
                self._evaluate(epoch + 1)
                if config.is_due(epoch + 1, config.run.checkpoint_every) or self._checkpoint_is_due():
                    self._save()
        if unreadable := len(self.data.corrupt.reasons):
            print(f'{unreadable} images could not be read on process {accelerator.process_index}, and were replaced')
        facts, metrics = write_result(config, self.inner.backbone, self.folder, accelerator)
        accelerator.end_training()
        return Result(self.folder.path, facts, metrics)

    def _notes(self) -> Iterator[str]:
        config = self.config
        yield from self.data.notes
        if (config.method.queue_size or 0) > self.schedule.steps_per_epoch * config.data.batch_size:
            yield (
                f'Warning: method.queue_size {config.method.queue_size} exceeds the images of an epoch; an image will '
                'meet its own older key as a negative'
            )
        in_batch = config.method.name in ('mocov3', 'simclr') or config.method.queue_size == 0
        if in_batch and config.optim.accumulation_steps > 1:
            yield (
                f'Warning: method.name {config.method.name} finds its negatives in the batch; with '
                f'optim.accumulation_steps {config.optim.accumulation_steps} in a part of it'
            )

    # Training

    def _train_epoch(self, epoch: int, start: int) -> bool:
        """Train from optimizer step `start` of an epoch on.

        Returns:
            Whether to stop, at the end of the epoch; a stop within it does not return.
        """
        self.method.train()
        self.timed_step, self.timed_at, self.waited = self.step, time.perf_counter(), 0.0
        steps = self._steps(epoch, start)
        parts = self._next(steps)
        (ended,) = self.agreement.any(parts is None)
        if ended:
            raise InputError(
                f'data.name {self.config.data.name}, data.root {self.config.data.root}: the stream gave no batch of '
                f'{self.config.data.batch_size}; are there images for every process and worker? data.num_workers is '
                f'{self.config.data.num_workers}'
            )
        stop = False
        while not ended:
            assert parts is not None
            parts, stop, ended = self.train_step(parts, steps)
            self.progress.update(self.config.data.batch_size)
            if ended:
                break
            if self.step % self.config.run.log_every == 0:
                self._log(epoch)
            if stop or self._checkpoint_is_due():
                path = self._save()
                if stop:
                    self._stop(path)
        end = (epoch + 1) * self.schedule.steps_per_epoch
        if self.step < end:
            self.accelerator.print(
                f'Epoch {epoch + 1} ended {end - self.step} steps early, with the stream of one process; '
                'data.num_samples is what all of them give'
            )
            self.step = end
        self._log(epoch)
        return stop

    def _steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """The parts of each optimizer step of an epoch, from step `start` on."""
        parts = self.config.optim.accumulation_steps
        # At its beginning an epoch needs none, and the one there is belongs to the epoch before.
        batches = self.data.epoch(epoch, start, self.position if start else None)
        for _ in range(start, self.schedule.steps_per_epoch):
            step = list(islice(batches, parts))
            if len(step) < parts:
                return
            yield step

    def _next(self, steps: Iterator[list[Batch]]) -> list[Batch] | None:
        asked = time.perf_counter()
        parts = next(steps, None)
        self.waited += time.perf_counter() - asked
        return parts

    def train_step(self, parts: Sequence[Batch], steps: Iterator[list[Batch]]) -> tuple[list[Batch] | None, bool, bool]:
        """One optimizer step on the parts of a batch.

        The next batch is loaded, and what all processes have to agree on is agreed on, while the device is busy with
        the backward.

        Returns:
            The parts of the next step, whether to stop, and whether the epoch has ended on any process.
        """
        lr, momentum = self.schedule.lr_at(self.step), self.schedule.momentum_at(self.step)
        widths = self.schedule.widths_at(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        for i, batch in enumerate(parts):
            views = list(batch.views)
            if self.config.run.channels_last:
                views = [view.contiguous(memory_format=torch.channels_last) for view in views]
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.method):
                output = self.method(views, widths, momentum if i == 0 else None, batch.labels)
                self.finite.watch(output['loss'])
                self.accelerator.backward(output['loss'] / len(parts))
            self.meter.add(output)
        following = self._next(steps)
        diverged, stop, ended = self.agreement.any(
            not self.finite.holds(), self.signals.received is not None, following is None
        )
        if diverged:
            self._keep_divergence(parts, output, lr)
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        self.meter.add({'grad_norm': torch.nn.utils.get_total_norm(gradients)})
        if self.observe is not None:
            self.observe(self.inner, self.step, widths)
        self.optimizer.step()
        # To none rather than to zero: widths that do not train must stay untouched by weight decay and momentum.
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position = parts[-1].position
        return following, stop, ended

    # Keeping the state

    def _checkpoint_is_due(self) -> bool:
        every = self.config.run.checkpoint_steps
        return every is not None and self.step % every == 0

    def _save(self, evaluated: bool = True) -> Path:
        self._write_observed(everything=True)
        return self.checkpoints.save(
            {'step': self.step, 'steps_per_epoch': self.schedule.steps_per_epoch, 'evaluated': evaluated}, self._own()
        )

    def _own(self) -> dict[str, Any]:
        """What this process alone knows: each normalises by its own statistics, and reads its own part of a stream."""
        statistics = {
            f'{name}.{key}': buffer
            for name, layer in self.inner.named_modules()
            if isinstance(layer, _BatchNorm)
            for key, buffer in layer.named_buffers(recurse=False)
        }
        return {'statistics': statistics, 'meter': self.meter.state_dict(), 'position': self.position}

    def _resume(self, found: Found, config_asked: PretrainConfig) -> bool:
        """Go on from a checkpoint, if there is one.

        Returns:
            Whether the evaluation after its epoch has been made.
        """
        accelerator = self.accelerator
        for path, reason in found.skipped:
            accelerator.print(f'Skipped a damaged checkpoint, {path}: {reason}')
        self.folder.keep_recipe(config_asked, found.step)
        if found.path is None:
            accelerator.print(f'{self.folder.path} has no checkpoint yet; starting from the beginning')
            self.folder.drop_metrics_after(-1)
            return False
        if found.state['steps_per_epoch'] != self.schedule.steps_per_epoch:
            raise InputError(
                f'{found.path} was written with {found.state["steps_per_epoch"]} steps an epoch, and now there are '
                f'{self.schedule.steps_per_epoch}; data.batch_size and the images have to be the same'
            )
        own = self.checkpoints.load(found)
        self.step, self.position = found.step, own['position']
        if found.state['processes'] == accelerator.num_processes:
            self.meter.load_state_dict(own['meter'], accelerator.device)
        else:
            accelerator.print(
                f'Warning: {found.path} was written by {found.state["processes"]} processes, and now there are '
                f'{accelerator.num_processes}; the run goes on, but not as it would have'
            )
            self.position = None
        self.inner.load_state_dict(own['statistics'], strict=False)
        evaluated = found.state['evaluated']
        self.folder.drop_metrics_after(self.step, evaluation_too=not evaluated)
        epoch, step = divmod(self.step, self.schedule.steps_per_epoch)
        place = f'after epoch {epoch}' + (f', {step} steps' if step else '')
        accelerator.print(f'Resuming {place}: {found.path}')
        return evaluated

    def _stop(self, path: Path) -> None:
        name = self.signals.received.name if self.signals.received is not None else 'a signal to another process'
        self.accelerator.end_training()
        raise PreemptedError(
            f'stopped by {name} after step {self.step} of {self.schedule.total_steps}; the state is in {path}, and '
            f'--resume {self.folder.path} goes on from it',
            self.signals.status,
        )

    def _keep_divergence(self, parts: Sequence[Batch], output: dict[str, torch.Tensor], lr: float) -> None:
        own = {
            **self._own(),
            'views': [list(batch.views) for batch in parts],
            'labels': [batch.labels for batch in parts],
            'output': {name: value.detach() for name, value in output.items()},
        }
        state = {'step': self.step, 'lr': lr, 'widths': self.schedule.widths_at(self.step)}
        path = self.checkpoints.save_aside(f'diverged-at-step-{self.step:08d}', state, own)
        raise DivergedError(
            f'the loss of step {self.step + 1} is not finite ({output["loss"].item():g} on the first process); the '
            f'optimizer has not moved. {path} holds the state and the batch that led to it. Lower optim.lr '
            f'{self.config.optim.lr:g} or, with fp16, use --run.precision bf16, and go on from the last checkpoint: '
            f'--resume {self.folder.path} --allow_changes true --optim.lr ...'
        )

    # Between steps

    def _log(self, epoch: int) -> None:
        self._write_observed()
        values = self.meter.means(lambda totals: self.accelerator.reduce(totals, 'sum'))
        self.meter.reset()
        if not values:
            return
        now = time.perf_counter()
        seconds, images = now - self.timed_at, (self.step - self.timed_step) * self.config.data.batch_size
        values |= {
            'lr': self.schedule.lr_at(self.step - 1),
            'momentum': self.schedule.momentum_at(self.step - 1),
            'images_per_second': images / seconds,
            'data_wait': self.waited / seconds,
            'peak_memory_gib': peak_memory(self.accelerator.device) / 2**30,
        }
        if self.accelerator.scaler is not None:
            values['grad_scale'] = self.accelerator.scaler.get_scale()
        self.timed_step, self.timed_at, self.waited = self.step, now, 0.0
        self.progress.set_postfix(
            refresh=False, epoch=epoch + 1, loss=f'{values["loss"]:.3f}', lr=f'{values["lr"]:.2g}'
        )
        self.folder.write_metrics({'kind': 'train', 'epoch': epoch + 1, 'step': self.step, **values})
        self.accelerator.log({f'train/{name}': value for name, value in values.items()}, step=self.step)

    def _write_observed(self, everything: bool = False) -> None:
        if self.observe is not None:
            for step, values in self.observe.write(everything):
                # As other lines of the log, under the step that these gradients make.
                self.accelerator.log({f'diagnostics/{name}': value for name, value in values.items()}, step=step + 1)

    def _evaluate(self, epoch: int) -> None:
        accuracies = self.evaluate(self.inner.backbone, epoch) if self.evaluate is not None else {}
        if not accuracies:
            return
        values = {f'{kind}/{width:g}': value for kind, group in accuracies.items() for width, value in group.items()}
        self.folder.write_metrics({'kind': 'eval', 'epoch': epoch, 'step': self.step, **values})
        self.accelerator.log({f'eval/{name}': value for name, value in values.items()}, step=self.step)
        if self.accelerator.is_main_process:
            for kind, group in accuracies.items():
                listed = ', '.join(f'{width:g}: {value:.1f}' for width, value in group.items())
                tqdm.write(f'epoch {epoch}: {_TITLES[kind]} accuracy (%) by width {listed}')


def _accelerator(config: PretrainConfig) -> Accelerator:
    tracker = config.run.tracker
    try:
        return Accelerator(
            mixed_precision=config.run.precision,
            log_with=None if tracker == 'none' else tracker,
            project_dir=config.run.output,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # During slow start sub-networks have no gradient, and DDP has to be told to expect it.
                    find_unused_parameters=config.slow_start > 0 and len(config.model.widths) > 1,
                    # Each process normalises by its own statistics; they are averaged before they are used.
                    broadcast_buffers=False,
                )
            ],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f'run.precision {config.run.precision}, run.tracker {tracker}: {error}') from error
