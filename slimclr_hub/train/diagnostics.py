"""Diagnostics of a pre-training run: gradient norms, gradients of the last layer, weights (paper, section 3.2).

runs/NAME/diagnostics/gradients.jsonl               gradient norms, one JSON object per recorded step
                      last-layer-STEP.safetensors   gradients of the last linear layer, from STEP on
                      weights-STEP.safetensors      trained weights after STEP steps

A record of `step` belongs to the weights after that many optimizer steps, and to the gradient of the next step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import append_json_line, atomic_files, read_json_lines, write_json_lines
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Incidental, at_least
from slimclr_hub.train.gradient_norms import last_linear, layer_slices, mean_norms

_NORMS = 'gradients.jsonl'
_LAST_LAYER = 'last-layer-????????.safetensors'
_WEIGHTS = 'weights-????????.safetensors'
_CHUNK = 64 * 2**20  # bytes of gradients kept in memory between checkpoints, at most


@dataclass(frozen=True)
class DiagnosticsConfig(Incidental):
    """Records of gradients and weights for recipes/analyze.py; off by default.

    Args:
        every: Optimizer steps between records of gradient norms (Fig. 3); 0 disables them.
        gradients: Steps between records of the last linear layer's gradient (Fig. 4); 0 disables them. A record is as
            large as the layer: 1 MiB for mocov2 with a ResNet-50.
        snapshots: Steps between files of the trained weights (Fig. 5); 0 disables them.
        smallest: Width whose share of the gradient is measured. Default: the narrowest width, or a quarter of the width
            if there is only one.
    """

    every: int = 0
    gradients: int = 0
    snapshots: int = 0
    smallest: float | None = None

    def __post_init__(self) -> None:
        for name in 'every', 'gradients', 'snapshots':
            at_least(f'diagnostics.{name}', getattr(self, name), 0)
        if self.smallest is not None:
            try:
                check_widths([self.smallest])
            except InputError as error:
                raise InputError(f'diagnostics.smallest {self.smallest:g}: {error}') from error

    @property
    def on(self) -> bool:
        """True if anything is recorded."""
        return max(self.every, self.gradients, self.snapshots) > 0

    def smallest_of(self, widths: tuple[float, ...], overlap: bool = True) -> float:
        """Return the width whose share of the gradient is measured, for a network with `widths`.

        Raises:
            InputError: The width is not below the full one, or a network without overlap has no channels for it.
        """
        full, narrowest = max(widths), min(widths)
        smallest = self.smallest or (narrowest if len(widths) > 1 else round(full / 4, 4))
        if smallest >= full:
            raise InputError(
                f'diagnostics.smallest {smallest:g} is not below the full width {full:g}; give a smaller one'
            )
        if not overlap and smallest not in widths:
            raise InputError(
                f'diagnostics.smallest {smallest:g} is not one of model.widths {list(widths)}, and with model.overlap '
                'false no other has channels; give one of them, or model.overlap true'
            )
        return smallest


@dataclass(frozen=True)
class NormRecord:
    """Gradient norms of one step, averaged over layers (paper, Fig. 3).

    Args:
        step: Optimizer steps taken before.
        width: The smallest width.
        smallest: Norm within that width's slices of the weights.
        all: Norm of the whole gradient.
        rest: Norm outside those slices.
        widths: Number of widths that the step trained.
    """

    step: int
    width: float
    smallest: float
    all: float
    rest: float
    widths: int

    @property
    def all_ratio(self) -> float:
        """`all` over `smallest`; nan if `smallest` is 0."""
        return self.all / self.smallest if self.smallest else float('nan')

    @property
    def rest_ratio(self) -> float:
        """`rest` over `smallest`; nan if `smallest` is 0."""
        return self.rest / self.smallest if self.smallest else float('nan')

    def logged(self) -> dict[str, float]:
        """Values for a tracker."""
        norms = {f'gradient_{name}': getattr(self, name) for name in ('smallest', 'all', 'rest')}
        return {**norms, 'ratio_all': self.all_ratio, 'ratio_rest': self.rest_ratio}


class Records:
    """The diagnostics folder of one run.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / 'diagnostics'

    def add_norms(self, records: Sequence[NormRecord]) -> None:
        """Append gradient norms."""
        if records:
            self.folder.mkdir(exist_ok=True)
        for record in records:
            append_json_line(self.folder / _NORMS, asdict(record))

    def norms(self) -> list[NormRecord]:
        """Read all gradient norms, in order of steps.

        Raises:
            InputError: The file holds something else.
        """
        try:
            return [NormRecord(**values) for values in read_json_lines(self.folder / _NORMS)]
        except TypeError as error:
            raise InputError(f'{self.folder / _NORMS} does not hold gradient norms ({error}); move it away') from error

    def add_gradients(self, steps: Sequence[int], gradients: torch.Tensor) -> None:
        """Write gradients [N, D] of the last layer after `steps`."""
        tensors = {'steps': torch.tensor(steps), 'gradients': gradients}
        self._save(f'last-layer-{steps[0]:08d}.safetensors', tensors)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read steps [N] and gradients of the last layer [N, D], in order of steps; N is 0 without records."""
        chunks = [load_file(path) for path in sorted(self.folder.glob(_LAST_LAYER))]
        if not chunks:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, 0)
        return torch.cat([chunk['steps'] for chunk in chunks]), torch.cat([chunk['gradients'] for chunk in chunks])

    def add_weights(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the trained weights after `step`."""
        self._save(f'weights-{step:08d}.safetensors', tensors)

    def weights(self) -> dict[int, Path]:
        """Return the files of trained weights by step."""
        return {int(path.stem.removeprefix('weights-')): path for path in self.folder.glob(_WEIGHTS)}

    def drop_from(self, step: int) -> None:
        """Drop records of `step` and later, which a run resumed there writes again."""
        if (self.folder / _NORMS).exists():
            kept = [record for record in read_json_lines(self.folder / _NORMS) if record['step'] < step]
            write_json_lines(self.folder / _NORMS, kept)
        for path in self.folder.glob(_LAST_LAYER):
            chunk = load_file(path)
            kept_steps = chunk['steps'] < step
            if not kept_steps.any():
                path.unlink()
            elif not kept_steps.all():
                self._save(path.name, {name: tensor[kept_steps] for name, tensor in chunk.items()})
        for saved, path in self.weights().items():
            if saved >= step:
                path.unlink()

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        with atomic_files(self.folder) as partial:
            save_file(dict(tensors), partial / name)


class GradientObserver:
    """Records gradient norms, gradients of the last layer, and weights of a run, on its main process.

    Norms stay on the device until the next line of the log, gradients in memory until the next checkpoint. Under DDP
    gradients are the means over processes; batch normalisation statistics in a snapshot are those of this process. A
    recorded step costs one pass over the gradients (norms), a copy of the last layer's, or a file of weights.

    Args:
        config: What to record.
        method: The method to observe.
        smallest: Width whose share of the gradient is measured.
        records: Where to write.
    """

    def __init__(self, config: DiagnosticsConfig, method: nn.Module, smallest: float, records: Records) -> None:
        self._config = config
        self._smallest = smallest
        self._records = records
        self._layers = layer_slices(method, smallest) if config.every else []
        self._last = last_linear(method) if config.gradients else None
        self._norms: list[tuple[int, int, torch.Tensor]] = []
        self._steps: list[int] = []
        self._gradients: list[torch.Tensor] = []

    def __call__(self, method: nn.Module, step: int, widths: Sequence[float]) -> None:
        """Observe a method after `step` steps, with the gradients of the next one; does not synchronise the device."""
        config = self._config
        if config.every and step % config.every == 0:
            self._norms.append((step, len(widths), mean_norms(self._layers)))
        if self._last is not None and step % config.gradients == 0:
            assert self._last.grad is not None
            self._steps.append(step)
            # A copy, since the optimizer may change the gradient in place.
            self._gradients.append(self._last.grad.detach().flatten().clone())
        if config.snapshots and step % config.snapshots == 0:
            self._records.add_weights(step, trained_tensors(method))

    def write(self, everything: bool) -> list[tuple[int, dict[str, float]]]:
        """Write the records; all of them (`everything`) before a checkpoint, from which the run may be resumed.

        Returns:
            Step -> values for the tracker.
        """
        found = []
        if self._norms:
            values = torch.stack([norms for *_, norms in self._norms]).tolist()
            for (step, count, _), (smallest, total, rest) in zip(self._norms, values, strict=True):
                found.append(NormRecord(step, self._smallest, smallest, total, rest, count))
            self._records.add_norms(found)
            self._norms.clear()
        if self._gradients:
            self._gradients = [gradient.cpu() for gradient in self._gradients]
            if everything or sum(gradient.nbytes for gradient in self._gradients) > _CHUNK:
                self._records.add_gradients(self._steps, torch.stack(self._gradients))
                self._steps.clear()
                self._gradients.clear()
        return [(record.step, record.logged()) for record in found]


def observe(config: DiagnosticsConfig, method: Any, folder: Path, step: int) -> GradientObserver | None:
    """Make the observer that a run asks for, and drop records from `step` on, left by an earlier process.

    Args:
        config: What to record.
        method: The method, with attributes `widths` and `backbone`.
        folder: Folder of the run.
        step: Optimizer steps taken so far.

    Raises:
        InputError: There is nothing to observe, or the smallest width is too small.
    """
    records = Records(folder)
    records.drop_from(step)
    if not config.on:
        return None
    return GradientObserver(config, method, config.smallest_of(method.widths, method.backbone.overlap), records)


def trained_tensors(method: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the tensors of a method's trained children to the host, in float32; the momentum encoder is left out."""
    return {
        f'{child_name}.{name}': (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous().clone()
        for child_name, child in method.named_children()
        if any(parameter.requires_grad for parameter in child.parameters())
        for name, tensor in child.state_dict().items()
    }
