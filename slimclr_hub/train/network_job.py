"""What pre-training and fine-tuning share: a job whose steps train a network on microbatches of images."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.data.batches import Batch
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DivergedError
from slimclr_hub.methods.objective import LOSSES
from slimclr_hub.runs.job import Job, StopSignals
from slimclr_hub.runs.memory import keep_freed_memory, peak_memory
from slimclr_hub.runs.schedule import Schedule
from slimclr_hub.text import first_line
from slimclr_hub.train.run_folder import RunFolder
from slimclr_hub.train.step import FiniteLoss, Losses, forward_backward


class NetworkJob(Job[list[Batch]]):
    """A job whose batch is the list of microbatches of one optimizer step, and that stops before a loss is not finite.

    A subclass sets `schedule` and `folder`, and calls `prepare`, on construction.

    Args:
        accelerator: Accelerator of the processes.
        signals: Signals that ask to stop.
        data: The training images.
        images: Their configuration.
        channels_last: Bring images into the channels-last memory layout.
        job: Further arguments of `Job`.

    Attributes:
        method: What is called in a step.
        inner: The same without what distributes it.
        optimizer: The optimizer.
        trained: Parameters that have a gradient.
        schedule: Learning rate and widths of each step.
        folder: Folder of the run, with its metrics.
    """

    method: Any
    inner: Any
    optimizer: Any
    trained: list[nn.Parameter]
    schedule: Schedule
    folder: RunFolder

    def __init__(
        self,
        accelerator: Accelerator,
        signals: StopSignals,
        data: TrainData,
        images: DataConfig,
        *,
        channels_last: bool,
        **job: Any,
    ) -> None:
        super().__init__(
            accelerator,
            signals,
            steps_per_epoch=data.steps_per_epoch,
            batch_size=images.batch_size,
            timeout=images.timeout,
            **job,
        )
        self._images = images
        self.data = data
        self.channels_last = channels_last
        self.finite = FiniteLoss()
        self._tracker_failed = False

    def prepare(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Distribute a method and its optimizer over the processes."""
        if self.accelerator.device.type == 'cpu':
            keep_freed_memory()
        self.method, self.optimizer = self.accelerator.prepare(method, optimizer)
        self.inner = self.accelerator.unwrap_model(self.method)
        self.trained = [parameter for parameter in self.inner.parameters() if parameter.requires_grad]

    # For subclasses

    @property
    @abstractmethod
    def after_divergence(self) -> str:
        """Sentences that say what may help, after a loss that was not finite."""

    # Steps

    def set_training(self) -> None:
        """Put what trains into training mode."""
        self.method.train()

    def batches(self, epoch: int, start: int, position: dict[str, Any] | None) -> Iterator[list[Batch]]:
        """Microbatches of each optimizer step of an epoch, from step `start` on."""
        self.set_training()
        batches = self.data.epoch(epoch, start, position)
        for _ in range(start, self.steps_per_epoch):
            microbatches = list(islice(batches, self.data.microbatches))
            if len(microbatches) < self.data.microbatches:
                return
            yield microbatches

    def gradients(
        self, batch: list[Batch], widths: Sequence[float], momentum: float | None, facts: dict[str, Any]
    ) -> torch.Tensor:
        """Compute the gradients of a step, after the next batch has been asked for, and return their norm.

        Args:
            batch: Microbatches.
            widths: Widths to train.
            momentum: Momentum of the key encoder.
            facts: What the record of a divergence tells besides the step.

        Raises:
            DivergedError: A loss is not finite on any process; the state is kept.
        """
        outputs = forward_backward(
            self.method,
            batch,
            widths,
            momentum,
            self._backward,
            channels_last=self.channels_last,
            no_sync=lambda: self.accelerator.no_sync(self.method),
        )
        for output in outputs:
            self.meter.add(output)
        if self.look_ahead(lambda: not self.finite.holds()):
            self._keep_divergence(batch, outputs[-1], {**facts, 'widths': widths})
        self.accelerator.unscale_gradients(self.optimizer)
        found = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(found)
        self.meter.add({'grad_norm': norm})
        return norm

    def take_step(self) -> None:
        """Move the parameters."""
        self.optimizer.step()
        # To none rather than to zero: widths that do not train must stay untouched by weight decay and momentum.
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: torch.Tensor) -> None:
        self.finite.watch(loss)
        self.accelerator.backward(loss)

    def _keep_divergence(self, batch: list[Batch], output: Losses, facts: dict[str, Any]) -> None:
        own = {
            **self.all_own(),
            'views': [list(microbatch.views) for microbatch in batch],
            'labels': [microbatch.labels for microbatch in batch],
            'features': [list(microbatch.features) for microbatch in batch],
            'output': output,
        }
        path = self.checkpoints.save_aside(f'diverged-at-step-{self.step:08d}', {'step': self.step, **facts}, own)
        raise DivergedError(
            f'the loss of step {self.step + 1} is not finite ({output["loss"].item():g} on the first process); the '
            f'optimizer has not moved. {path} holds the state and the batch that led to it. {self.after_divergence}'
        )

    @property
    def source(self) -> str:
        """Words for the source of the batches, with its settings."""
        images = self._images
        return f'data.name {images.name}, data.root {images.root}, data.num_workers {images.num_workers}'

    # Checkpoints

    def own(self) -> dict[str, Any]:
        """The running statistics, as each process normalises by its own."""
        statistics = {
            f'{name}.{key}': buffer
            for name, layer in self.inner.named_modules()
            if isinstance(layer, _BatchNorm)
            for key, buffer in layer.named_buffers(recurse=False)
        }
        return {'statistics': statistics}

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Load the running statistics."""
        self.inner.load_state_dict(own['statistics'], strict=False)

    # Between steps

    def write_means(self, epoch: int, **facts: float) -> dict[str, float]:
        """Write the means since the last line of metrics.jsonl, if any, with `facts`, and return both."""
        values = self.meter.means(lambda totals: self.accelerator.reduce(totals, 'sum'))
        self.meter.reset()
        if not values:
            return values
        lr = self.schedule.lr_at(self.step - 1)
        values |= {'lr': lr, **facts, **self.pace(), 'peak_memory_gib': peak_memory(self.accelerator.device) / 2**30}
        if self.accelerator.scaler is not None:
            values['grad_scale'] = self.accelerator.scaler.get_scale()
        # Not the total: distillation adds a constant to it that is many times as large as the full width's loss.
        own = (f'{name}/{self.schedule.widths[0]:g}' for name in LOSSES)
        shown = next((key for key in own if key in values), 'loss')
        postfix = {'epoch': epoch + 1, shown: f'{values[shown]:.3f}', 'lr': f'{lr:.2g}'}
        self.progress.set_postfix(postfix, refresh=False)
        self.folder.write_metrics({'kind': 'train', 'epoch': epoch + 1, 'step': self.step, **values})
        self.track('train', values)
        return values

    def track(self, group: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Log values of a group at the tracker; one that fails ends no training, and all is in metrics.jsonl, too."""
        try:
            at = self.step if step is None else step
            self.accelerator.log({f'{group}/{name}': value for name, value in values.items()}, step=at)
        except Exception as error:  # of any client, about any server
            if not self._tracker_failed:
                print(f'Warning: the tracker failed ({first_line(error)}); what it misses is in {self.folder.path}')
            self._tracker_failed = True
