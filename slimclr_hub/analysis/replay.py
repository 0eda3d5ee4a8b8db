"""A run rebuilt from its folder: the very next step of its training from any of its checkpoints, without taking it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from safetensors import SafetensorError
from safetensors.torch import load_file

from slimclr_hub.data.batches import Batch
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.methods.split_batchnorm import split_batchnorm
from slimclr_hub.runs.checkpoints import verified
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import load_recipe
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.setup import arrange, make_method, make_schedule

Losses = dict[str, torch.Tensor]
Steps = Sequence[Sequence[Batch]]
"""The parts of each of several optimizer steps."""

_PRECISIONS = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def checkpoint_steps(folder: Path) -> tuple[int, ...]:
    """Optimizer steps after which the checkpoints of a run were written, in ascending order."""
    found = (folder / 'checkpoints').glob('step-????????/state.json')
    return tuple(sorted(int(path.parent.name.removeprefix('step-')) for path in found))


class Replay:
    """The training of a run, at one of its checkpoints, on one process.

    The next step has the images, views, widths, weights, momentum encoder, queue and random numbers that it had in the
    run, so its loss and gradients are those of the run: exactly on the same kind of device with as many threads, and
    but for rounding where several processes trained, whose parts of a batch are normalised apart here, too. `notes`
    says where that does not hold.

    Args:
        folder: Folder of the run.
        device: Where to compute; a GPU if there is one unless given.

    Attributes:
        config: The run's configuration.
        method: The method in training mode, in float32; `load` gives it the weights of a checkpoint.
        schedule: What changes over training.
        steps: Steps of the checkpoints.
        step: Step of the one that is loaded; -1 before.
        notes: What keeps the replay from being exact, a sentence each.

    Raises:
        InputError: It is not the folder of a run, or its images are not there.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = None) -> None:
        self.folder = folder
        self.device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        config = recipe_of(folder)
        self.config = replace(config, model=replace(config.model, weights=None))
        # Workers would be started for every step, and change nothing; those of a stream each have a share of it.
        data = config.data if config.data.streams else replace(config.data, num_workers=0)
        self.data = TrainData(
            data,
            config.views,
            config.second_views,
            seed=config.run.seed,
            parts=config.optim.accumulation_steps,
            view_count=config.view_count,
            device=self.device,
        )
        self.schedule = make_schedule(config, self.data.steps_per_epoch)
        method: Any = make_method(self.config)
        arrange(config, method)
        self.method: Any = method.to(self.device).train()
        self.steps = checkpoint_steps(folder)
        self.step = -1
        self.notes: tuple[str, ...] = ()
        self._random: dict[str, Any] = {}
        self._position: Any = None

    def load(self, step: int) -> None:
        """Be at the checkpoint after `step`.

        Raises:
            InputError: There is none, it is damaged, or it is of another network or data set.
        """
        path = self.folder / 'checkpoints' / f'step-{step:08d}'
        if step not in self.steps:
            known = ', '.join(map(str, self.steps)) or 'none; run.keep_checkpoints says how many a run keeps'
            raise InputError(f'{self.folder} has no checkpoint after step {step}; there are: {known}')
        try:
            state = verified(path)
            tensors = load_file(path / 'model.safetensors')
            own = torch.load(path / 'process_0.pt', map_location='cpu', weights_only=True)
            self._random = load(path / 'random_states_0.pkl', map_location='cpu')
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f'{path} cannot be read ({error}); take another checkpoint') from error
        if state['steps_per_epoch'] != self.schedule.steps_per_epoch:
            raise InputError(
                f'{path} was written with {state["steps_per_epoch"]} steps an epoch, and now there are '
                f'{self.schedule.steps_per_epoch}; data.root has to hold the same images'
            )
        try:
            self.method.load_state_dict(tensors)
            self.method.load_state_dict(own['statistics'], strict=False)
        except RuntimeError as error:
            raise InputError(f'{path} does not fit its recipe: {" ".join(str(error).split())[:300]}') from error
        self._be_processes(state['processes'])
        self._position = own['position'] if state['processes'] == 1 else None
        self.step = step

    def _be_processes(self, processes: int) -> None:
        """Normalise in as many parts as processes did; what cannot be as it was goes into the notes."""
        config, notes = self.config, []
        apart = 1 if config.method.sync_bn else processes
        splits = apart * (config.method.bn_splits or 1)
        split_batchnorm(self.method, splits)
        if config.method.name == 'mocov2':
            self.method.bn_splits = splits  # by which keys are shuffled
        if apart > 1 and config.method.name in ('mocov3', 'simclr'):
            notes.append(
                f'{self.folder} was trained on {processes} processes without method.sync_bn; here the heads normalise '
                'a batch as one process does.'
            )
        if processes > 1 and config.data.streams:
            notes.append(
                f'{self.folder} was trained on {processes} processes, each with its share of a stream; here an epoch '
                'is entered with other images of it.'
            )
        self.notes = tuple(notes)

    def next_steps(self, count: int = 1) -> list[list[Batch]]:
        """The parts of the next `count` steps of the training, on the device.

        After the last epoch they are those that a further one would have.
        """
        assert self.step >= 0, 'load a checkpoint first'
        epoch, start = divmod(self.step, self.schedule.steps_per_epoch)
        found: list[list[Batch]] = []
        batches = self.data.epoch(epoch, start, self._position if start else None)
        parts: list[Batch] = []
        while len(found) < count:
            batch = next(batches, None)
            if batch is None:
                epoch, parts = epoch + 1, []
                batches = self.data.epoch(epoch)
                continue
            parts.append(batch)
            if len(parts) == self.data.parts:
                found.append(parts)
                parts = []
        return found

    def losses(
        self, steps: Steps, widths: Sequence[float] | None = None, *, backward: bool = False, momentum: bool = True
    ) -> Losses:
        """What the method returns on the parts of steps, averaged; the weights, and all else it has, stay as they are.

        Random numbers are those that the run went on with, so the same arguments and weights give the same losses.

        Args:
            steps: From `next_steps`. More than one are taken as parts of one accumulated step: the momentum encoder
                moves once, and negatives stay those of the first.
            widths: Widths to train; those of the next step unless given.
            backward: Leave the gradients of the mean loss in the parameters of `method`; they are none before.
            momentum: Whether the momentum encoder moves first, as it does in training; without, it is as in the
                checkpoint, whatever has been done to the weights.
        """
        chosen = tuple(widths) if widths is not None else self.schedule.widths_at(self.step)
        moved = self.schedule.momentum_at(min(self.step, self.schedule.total_steps)) if momentum else 1.0
        parts = [part for step in steps for part in step]
        totals: Losses = {}
        if backward:
            self.method.zero_grad(set_to_none=True)
        with self._unmoved(), nullcontext() if backward else torch.no_grad():
            for i, part in enumerate(parts):
                views = list(part.views)
                if self.config.run.channels_last:
                    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
                with self._autocast():
                    output = self.method(views, chosen, moved if i == 0 else None, part.labels)
                if backward:
                    (output['loss'] / len(parts)).backward()
                for name, value in output.items():
                    totals[name] = totals.get(name, 0) + value.detach().float() / len(parts)
        return totals

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """The run's random numbers inside; buffers and the momentum encoder as before afterwards."""
        method = self.method
        state = [tensor for tensor in (*method.buffers(), *method.parameters()) if not tensor.requires_grad]
        before = [tensor.clone() for tensor in state]
        on_gpu = self.device.type == 'cuda'
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            torch.set_rng_state(self._random['torch_manual_seed'])
            if on_gpu and self._random.get('torch_cuda_manual_seed'):
                torch.cuda.set_rng_state(self._random['torch_cuda_manual_seed'][0], self.device)
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, old in zip(state, before, strict=True):
                        tensor.copy_(old)

    def _autocast(self) -> Any:
        precision = _PRECISIONS.get(self.config.run.precision or 'no')
        return torch.autocast(self.device.type, precision) if precision is not None else nullcontext()


def recipe_of(folder: Path) -> PretrainConfig:
    """The configuration of the run in a folder.

    Raises:
        InputError: It is not the folder of a run.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f'{folder} is not the folder of a run, it has no {RECIPE}; give one like runs/NAME')
    return load_recipe(folder / RECIPE)


def saved_weights(folder: Path) -> Mapping[int, Path]:
    """Step -> file with the trained tensors of a run after it, of its checkpoints and snapshots, in ascending order.

    Snapshots (`diagnostics.snapshots`) hold the trained parameters and the buffers beside them in float32; a checkpoint
    also has the momentum encoder (`key_...`) and the queue.
    """
    found = {
        step: folder / 'checkpoints' / f'step-{step:08d}' / 'model.safetensors' for step in checkpoint_steps(folder)
    }
    for path in (folder / 'diagnostics').glob('weights-????????.safetensors'):
        found.setdefault(int(path.stem.removeprefix('weights-')), path)
    return dict(sorted(found.items()))
