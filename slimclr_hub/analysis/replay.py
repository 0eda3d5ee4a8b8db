"""Replay of a run's training: recompute the next step of any of its checkpoints, without taking it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from safetensors import SafetensorError
from safetensors.torch import load_file

from slimclr_hub.data.batches import Batch
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.methods import MoCoV2
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.runs.checkpoints import STATE, checkpoint_path, read_state, verified
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import load_recipe
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.diagnostics import Records
from slimclr_hub.train.setup import arrange, make_method, make_schedule
from slimclr_hub.train.step import Losses, forward_backward
from slimclr_hub.train.teacher import check_identity, identity, open_teacher

Steps = Sequence[Sequence[Batch]]
"""Microbatches of each of several optimizer steps."""

_PRECISIONS = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def recipe_of(folder: Path) -> PretrainConfig:
    """Read the configuration of the run in a folder; an InputError if it is not the folder of a run."""
    if not (folder / RECIPE).is_file():
        raise InputError(f'{folder} is not the folder of a run, it has no {RECIPE}; give one like runs/NAME')
    return load_recipe(folder / RECIPE)


def slow_start_end(config: PretrainConfig) -> float | None:
    """Epoch at which narrower widths begin to train; None for a run without slow start, or without any other phase."""
    has_both = 0 < config.slow_start < config.optim.epochs and len(config.model.widths) > 1
    return config.slow_start if has_both else None


def checkpoint_steps(folder: Path) -> tuple[int, ...]:
    """Optimizer steps after which the checkpoints of a run were written, in ascending order."""
    found = (folder / 'checkpoints').glob(f'step-{"[0-9]" * 8}/{STATE}')
    return tuple(sorted(int(path.parent.name.removeprefix('step-')) for path in found))


def state_of(folder: Path, step: int) -> dict[str, Any]:
    """The state.json of a run's checkpoint; an InputError if it is not what a run writes."""
    path = checkpoint_path(folder, step)
    try:
        return read_state(path)
    except (OSError, ValueError) as error:
        raise InputError(f'{path} cannot be read ({error}); remove it, or take another run') from error


def saved_weights(folder: Path) -> Mapping[int, Path]:
    """Files with the trained tensors of a run by step, from its checkpoints and snapshots, in ascending order.

    Snapshots (`diagnostics.snapshots`) hold trained parameters and their modules' buffers in float32; a checkpoint also
    holds the momentum encoder (`key_...`) and the queue, and is preferred.
    """
    checkpoints = {step: checkpoint_path(folder, step) / 'model.safetensors' for step in checkpoint_steps(folder)}
    return dict(sorted((Records(folder).weights() | checkpoints).items()))


class Replay:
    """The training of a run at one of its checkpoints, on one process.

    The next step has the images, views, widths, weights, momentum encoder, queue, random numbers and precision that it
    had in the run, so loss and gradients are those of the run: bit for bit on the same kind of device with as many
    threads; up to rounding if several processes trained, whose shares of a batch are normalised apart here, too.
    `notes` lists what keeps a replay from being exact.

    Args:
        folder: Folder of the run.
        device: Where to compute; a GPU if there is one by default.

    Attributes:
        method: The method in training mode, in float32, with the weights of the loaded checkpoint.
        steps: Steps of the checkpoints.
        step: Step of the loaded checkpoint; -1 before `load`.
        notes: Sentences for the user.

    Raises:
        InputError: It is not the folder of a run, or its images are missing.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = None) -> None:
        self.folder = folder
        self.device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        config = recipe_of(folder)
        if config.teacher.cached or config.method.neighbours is not None:
            raise InputError(
                f'{folder} was trained with what a teacher knew of all images (teacher.cached, or method.name bingo), '
                'which a replay does not compute; take a run without'
            )
        self.config = replace(config, model=replace(config.model, weights=None))
        # Workers would start anew for each step. Of a stream each worker reads a share, so their number has to stay.
        data = config.data if config.data.streams else replace(config.data, num_workers=0)
        self.data = TrainData(
            data,
            config.views,
            config.second_views,
            seed=config.run.seed,
            microbatches=config.optim.accumulation_steps,
            view_count=config.view_count,
            device=self.device,
        )
        self.schedule = make_schedule(config, self.data.steps_per_epoch)
        teacher = open_teacher(config)
        self._teacher = None if teacher is None else identity(config.teacher, teacher)
        method: Any = make_method(self.config, teacher)
        arrange(config, method)
        self.method: Any = method.to(self.device).train()
        self.steps = checkpoint_steps(folder)
        self.step = -1
        self.notes: tuple[str, ...] = ()
        self._random: dict[str, Any] = {}
        self._position: Any = None

    def load(self, step: int) -> None:
        """Load the checkpoint after `step`; an InputError if it is missing, damaged, or does not fit the run."""
        path = checkpoint_path(self.folder, step)
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
        if self._teacher is not None:
            check_identity(self._teacher, state, path)
        try:
            self.method.load_state_dict(tensors)
            self.method.load_state_dict(own['statistics'], strict=False)
        except RuntimeError as error:
            raise InputError(f'{path} does not fit its recipe: {" ".join(str(error).split())[:300]}') from error
        self._imitate_processes(state['processes'])
        self._position = own['position'] if state['processes'] == 1 else None
        self.step = step

    def _imitate_processes(self, processes: int) -> None:
        """Normalise a batch in as many splits as the run's processes did; add a note where that is not possible."""
        config, notes = self.config, []
        apart = 1 if config.method.sync_bn else processes
        splits = apart * (config.method.bn_splits or 1)
        split_batchnorm(self.method, splits)
        if isinstance(self.method, MoCoV2):
            self.method.bn_splits = splits  # keys are shuffled between them
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
        """Return the microbatches of the next `count` steps, on the device; after the last epoch, of an extra one."""
        assert self.step >= 0, 'load a checkpoint first'
        epoch, start = divmod(self.step, self.schedule.steps_per_epoch)
        found: list[list[Batch]] = []
        batches = self.data.epoch(epoch, start, self._position if start else None)
        while len(found) < count:
            step = list(islice(batches, self.data.microbatches))
            if len(step) == self.data.microbatches:
                found.append(step)
            else:
                epoch += 1
                batches = self.data.epoch(epoch)
        return found

    def losses(
        self, steps: Steps, widths: Sequence[float] | None = None, *, backward: bool = False, momentum: bool = True
    ) -> Losses:
        """Return the method's outputs, averaged over the microbatches of steps; weights and buffers stay as they are.

        Random numbers are those of the run, so the same arguments and weights give the same losses.

        Args:
            steps: From `next_steps`. Several are accumulated into one step: the momentum encoder moves once, and the
                negatives are those of the first.
            widths: Widths to train; those of the next step by default.
            backward: Leave the gradients of the mean loss in the parameters of `method`; earlier ones are dropped.
            momentum: Move the momentum encoder first, as training does. Otherwise it stays that of the checkpoint.
        """
        chosen = tuple(widths) if widths is not None else self.schedule.widths_at(self.step)
        moved = self.schedule.momentum_at(min(self.step, self.schedule.total_steps)) if momentum else 1.0
        microbatches = [batch for step in steps for batch in step]
        if backward:
            self.method.zero_grad(set_to_none=True)
        with self._restored(), nullcontext() if backward else torch.no_grad():
            outputs = forward_backward(
                self.method,
                microbatches,
                chosen,
                moved,
                torch.Tensor.backward if backward else None,
                channels_last=self.config.run.channels_last,
                autocast=self._autocast,
            )
        return {name: torch.stack([out[name].float() / len(outputs) for out in outputs]).sum(0) for name in outputs[0]}

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Use the run's random numbers inside; restore buffers, momentum encoder and random state afterwards."""
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
        return torch.autocast(self.device.type, precision) if precision else nullcontext()
