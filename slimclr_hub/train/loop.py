"""The training loop."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from slimclr_hub.data.loaders import EpochSampler, train_loader
from slimclr_hub.errors import DivergedError, InputError
from slimclr_hub.hub.card import WidthFacts, training_card, width_facts
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.methods import MoCoV2
from slimclr_hub.methods.processes import average_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.meter import Meter
from slimclr_hub.train.parse import Command, flatten
from slimclr_hub.train.run_folder import RunFolder
from slimclr_hub.train.schedule import Schedule
from slimclr_hub.train.setup import make_method, make_optimizer


class Evaluator(Protocol):
    """Measures a network while it trains, on all processes together."""

    def __call__(self, backbone: SlimmableResNet) -> dict[float, float]:
        """Accuracy in percent of each width; the network is left as it was."""


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


EvaluatorFactory = Callable[[PretrainConfig, Accelerator], Evaluator | None]


def pretrain(command: Command, make_evaluator: EvaluatorFactory | None = None) -> Result:
    """Pre-train a network as configured, on the processes and devices that accelerate was launched with.

    Args:
        command: The configuration, and the folder of a run to resume if any.
        make_evaluator: What to measure between epochs; nothing unless given.

    Raises:
        InputError: Something in the configuration or the folder does not fit, found before training starts.
        DivergedError: The loss is not finite.
    """
    config = command.config
    if command.resume is not None:
        # The checkpoint replaces them, and they may be gone by now.
        config = replace(config, model=replace(config.model, weights=None))
    accelerator = _accelerator(config)
    trainer = _Trainer(config, accelerator, make_evaluator)
    return trainer.run(command.resume)


class _Trainer:
    def __init__(
        self, config: PretrainConfig, accelerator: Accelerator, make_evaluator: EvaluatorFactory | None
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        loader, steps_per_epoch = train_loader(config.data, config.views, config.run.seed, accelerator.num_processes)
        self.schedule = Schedule(
            epochs=config.optim.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=config.optim.warmup_epochs,
            lr=config.optim.lr,
            momentum=config.method.momentum,
            widths=tuple(sorted(config.model.widths, reverse=True)),
            slow_start_epochs=config.slow_start,
        )
        set_seed(config.run.seed)
        method = make_method(config)
        if config.run.channels_last:
            method = method.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(config.optim, method)
        self.method: Any
        self.method, self.optimizer = accelerator.prepare(method, optimizer)
        self.inner: MoCoV2 = accelerator.unwrap_model(self.method)
        self.sampler = loader.sampler if isinstance(loader.sampler, EpochSampler) else None
        self.stream = loader.dataset if isinstance(loader.dataset, IterableDataset) else None
        self.loader = _prepare_loader(loader, accelerator)
        self.evaluate = make_evaluator(config, accelerator) if make_evaluator else None
        self.meter = Meter()

    def run(self, resume: Path | None) -> Result:
        config, accelerator = self.config, self.accelerator
        if resume is None:
            self.folder = RunFolder.create(config, accelerator)
            start, self.step = 0, 0
        else:
            self.folder = RunFolder(resume, accelerator)
            start, self.step = self.folder.load_checkpoint()
            self.folder.drop_metrics_after(self.step)
        accelerator.print(f'{"Run" if resume is None else f"Resuming after epoch {start}"}: {self.folder.path}')
        if config.method.queue_size > self.schedule.steps_per_epoch * config.data.batch_size:
            accelerator.print(
                f'Warning: method.queue_size {config.method.queue_size} exceeds the images of an epoch; an image will '
                'meet its own older key as a negative'
            )
        self._start_tracker()
        if start == 0:
            self._evaluate(0)
        self.optimizer.zero_grad()
        batch = config.data.batch_size
        progress = tqdm(
            total=self.schedule.total_steps * batch,
            initial=self.step * batch,
            unit='img',
            unit_scale=True,
            desc='pre-training',
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,
            disable=not accelerator.is_main_process,
        )
        with closing(progress):
            for epoch in range(start, config.optim.epochs):
                self._train_epoch(epoch, progress)
                if self._is_due(epoch + 1, config.knn.every):
                    self._evaluate(epoch + 1)
                if self._is_due(epoch + 1, config.run.checkpoint_every):
                    self._average_batchnorm()
                    self.folder.save_checkpoint(epoch + 1, self.step, config.run.keep_checkpoints)
        result = self._result()
        accelerator.end_training()
        return result

    def _is_due(self, epoch: int, every: int) -> bool:
        return every > 0 and (epoch % every == 0 or epoch == self.config.optim.epochs)

    # Training

    def _train_epoch(self, epoch: int, progress: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        elif self.stream is not None and hasattr(self.stream, 'set_epoch'):
            self.stream.set_epoch(epoch)
        self.method.train()
        self.timed_step, self.timed_at = self.step, time.perf_counter()
        first = self.step
        for views, _ in islice(self.loader, self.schedule.steps_per_epoch):
            self.train_step(views)
            progress.update(self.config.data.batch_size)
            if self.step % self.config.run.log_every == 0:
                self._log(epoch, progress)
        self._log(epoch, progress)
        if self.step == first:
            raise InputError(
                f'data.name {self.config.data.name}, data.root {self.config.data.root}: the stream gave no batch of '
                f'{self.config.data.batch_size}; are there shards for every worker of data.num_workers '
                f'{self.config.data.num_workers}?'
            )

    def train_step(self, views: list[torch.Tensor]) -> None:
        """One optimizer step on a pair of views; waits for nothing on the device."""
        if self.config.run.channels_last:
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        lr = self.schedule.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        output = self.method(views, self.schedule.widths_at(self.step), self.schedule.momentum_at(self.step))
        self.accelerator.backward(output['loss'])
        self.optimizer.step()
        # To none rather than to zero: widths that do not train must stay untouched by weight decay and momentum.
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(output)
        self.step += 1

    # Between steps

    def _log(self, epoch: int, progress: Any) -> None:
        if not self.meter.names:
            return
        names = self.meter.names
        means = self.accelerator.reduce(self.meter.means(), 'mean').tolist()
        self.meter.reset()
        values = dict(zip(names, means, strict=True))
        if not all(map(_is_finite, means)):
            raise DivergedError(
                f'the loss is {values["loss"]} within steps {self.timed_step} to {self.step}; lower optim.lr '
                f'{self.config.optim.lr:g} or, with fp16, use --run.precision bf16. Checkpoints are in '
                f'{self.folder.path / "checkpoints"}'
            )
        now = time.perf_counter()
        images = (self.step - self.timed_step) * self.config.data.batch_size
        values |= {
            'lr': self.schedule.lr_at(self.step - 1),
            'momentum': self.schedule.momentum_at(self.step - 1),
            'images_per_second': images / (now - self.timed_at),
        }
        self.timed_step, self.timed_at = self.step, now
        progress.set_postfix(
            refresh=False,
            epoch=epoch + 1,
            info_nce=f'{values[f"info_nce/{self.schedule.widths[0]:g}"]:.3f}',
            lr=f'{values["lr"]:.2g}',
        )
        self.folder.write_metrics({'kind': 'train', 'epoch': epoch + 1, 'step': self.step, **values})
        self.accelerator.log({f'train/{name}': value for name, value in values.items()}, step=self.step)

    def _evaluate(self, epoch: int) -> None:
        if self.evaluate is None:
            return
        self._average_batchnorm()
        accuracies = {f'knn/{width:g}': value for width, value in self.evaluate(self.inner.backbone).items()}
        self.folder.write_metrics({'kind': 'eval', 'epoch': epoch, 'step': self.step, **accuracies})
        self.accelerator.log({f'eval/{name}': value for name, value in accuracies.items()}, step=self.step)
        listed = ', '.join(f'{name.split("/")[1]}: {value:.1f}' for name, value in accuracies.items())
        if self.accelerator.is_main_process:
            tqdm.write(f'epoch {epoch}: k-NN accuracy (%) by width {listed}')

    def _average_batchnorm(self) -> None:
        average_batchnorm(self.inner)

    def _start_tracker(self) -> None:
        tracker = self.config.run.tracker
        if tracker != 'none':
            folders = self.accelerator.project_configuration
            folders.project_dir = folders.logging_dir = str(self.folder.path)
            named = {'name': self.folder.path.name} if tracker in ('wandb', 'trackio') else {}
            values = {key: str(value) for key, value in flatten(self.config).items()}
            self.accelerator.init_trackers(self.config.run.project, config=values, init_kwargs={tracker: named})

    def _result(self) -> Result:
        config, backbone, folder = self.config, self.inner.backbone, self.folder.path
        self._average_batchnorm()
        metrics = self.folder.read_metrics()
        facts = measured_facts(backbone, config.data.size, metrics)
        about = {
            'name': folder.name,
            'folder': str(folder),
            'architecture': config.model.name,
            'method': config.method.name,
            'data': config.data.name,
            'epochs': str(config.optim.epochs),
            'size': str(config.data.size),
        }
        if self.accelerator.is_main_process:
            save_folder(
                backbone,
                folder,
                size=config.data.size,
                mean=config.data.mean,
                std=config.data.std,
                crop_pct=config.data.crop_pct,
                card=training_card(facts, about),
            )
        self.accelerator.wait_for_everyone()
        return Result(folder, facts, metrics)


def measured_facts(backbone: SlimmableResNet, size: int, metrics: Iterable[dict[str, Any]]) -> list[WidthFacts]:
    """Cost of each width, and its accuracy in the first and the last evaluation of a run's metrics."""
    evaluations = [record for record in metrics if record['kind'] == 'eval']
    facts = width_facts(backbone, size)
    if not evaluations:
        return facts
    first, last = evaluations[0], evaluations[-1]
    return [replace(fact, start=first[f'knn/{fact.width:g}'], end=last[f'knn/{fact.width:g}']) for fact in facts]


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
                    find_unused_parameters=config.slow_start > 0,
                    # Each process normalises by its own statistics; they are averaged before they are used.
                    broadcast_buffers=False,
                )
            ],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f'run.precision {config.run.precision}, run.tracker {tracker}: {error}') from error


def _prepare_loader(loader: DataLoader, accelerator: Accelerator) -> Iterable[Any]:
    if isinstance(loader.dataset, IterableDataset):
        # timm's streams shard themselves over processes; accelerate would do it a second time.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
    return accelerator.prepare_data_loader(loader)


def _is_finite(value: float) -> bool:
    return value - value == 0
