"""Diagnostics of a pre-training run: gradient norms, gradients of the last layer, weights (paper, section 3.2).

runs/NAME/diagnostics/gradients.jsonl               gradient norms, one JSON object per recorded step
                      last-layer-STEP.safetensors   gradients of the last linear layer, from STEP on
                      weights-STEP.safetensors      trained weights after STEP steps

A record of `step` belongs to the weights after that many optimizer steps, and to the gradient of the next step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import append_json_line, read_json_lines, write_json_lines
from slimclr_hub.models.layers import SlimmableConv2d, SlimmableLinear, SwitchableLinear
from slimclr_hub.models.slicing import Span
from slimclr_hub.models.widths import check_widths, width_key
from slimclr_hub.settings import Incidental, at_least
from slimclr_hub.text import first_line
from slimclr_hub.weights.tensor_file import save_tensors

_NORMS = 'gradients.jsonl'
_LAST_LAYER = 'last-layer-????????.safetensors'
_WEIGHTS = 'weights-????????.safetensors'
_CHUNK = 64 * 2**20  # bytes of gradients kept in memory between checkpoints, at most


@dataclass(frozen=True)
class DiagnosticsConfig(Incidental):
    """Records of gradients and weights for `slimclr-hub analyze`; off by default.

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
    """Gradient norms of the step after `step` others, which trained as many as `widths` widths (paper, Fig. 3).

    Means over layers of the norm within the slices of the smallest width, `width`, of the whole gradient, and outside.
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
        ratios = {'ratio_all': self.all_ratio, 'ratio_rest': self.rest_ratio}
        return {'gradient_smallest': self.smallest, 'gradient_all': self.all, 'gradient_rest': self.rest, **ratios}


class Records:
    """The diagnostics in the folder of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / 'diagnostics'

    def add_norms(self, records: Sequence[NormRecord]) -> None:
        """Append gradient norms."""
        self.folder.mkdir(exist_ok=True)
        for record in records:
            append_json_line(self.folder / _NORMS, asdict(record))

    def norms(self) -> list[NormRecord]:
        """Read all gradient norms, in order of steps; an InputError if the file holds something else."""
        try:
            return [NormRecord(**values) for values in read_json_lines(self.folder / _NORMS)]
        except TypeError as error:
            raise InputError(f'{self.folder / _NORMS} does not hold gradient norms ({error}); move it away') from error

    def add_gradients(self, steps: Sequence[int], gradients: torch.Tensor) -> None:
        """Write gradients [N, D] of the last layer after `steps`."""
        self._save(f'last-layer-{steps[0]:08d}.safetensors', {'steps': torch.tensor(steps), 'gradients': gradients})

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
        """Drop records of `step` and later, which a run resumed there writes again.

        Raises:
            InputError: A file holds something else; nothing is dropped then.
        """
        try:
            norms = [asdict(record) for record in self.norms() if record.step < step]
            chunks = {path: load_file(path)['steps'] < step for path in self.folder.glob(_LAST_LAYER)}
            weights = self.weights()
        except InputError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f'{self.folder} holds a file that no run writes ({first_line(error)}); move it away'
            ) from error
        if (self.folder / _NORMS).exists():
            write_json_lines(self.folder / _NORMS, norms)
        for path, kept in chunks.items():
            if not kept.any():
                path.unlink()
            elif not kept.all():
                self._save(path.name, {name: tensor[kept] for name, tensor in load_file(path).items()})
        for saved, path in weights.items():
            if saved >= step:
                path.unlink()

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        save_tensors(tensors, self.folder / name)


@dataclass(frozen=True)
class LayerSlice:
    """A slimmable layer's weight and bias, and the spans of their leading dimensions that one width uses."""

    name: str
    parameters: tuple[torch.Tensor, ...]
    spans: tuple[tuple[Span, ...], ...]


def layer_slices(method: nn.Module, width: float) -> list[LayerSlice]:
    """Return a width's slices of all trained layers whose weights are shared by widths, of the network and its heads.

    Batch normalisation and switchable classifiers are left out, since each width has its own.

    Raises:
        InputError: There is no such layer, or the width uses no channel of one.
    """
    found = []
    for name, layer in method.named_modules():
        if isinstance(layer, SlimmableConv2d | SlimmableLinear) and layer.weight.requires_grad:
            spans = layer.spans(width)
            biases = () if layer.bias is None else (layer.bias,)
            found.append(LayerSlice(name, (layer.weight, *biases), (spans, spans[:1])[: 1 + len(biases)]))
    if not found:
        raise InputError('the network has no layer whose weights several widths share')
    for each in found:
        if any(first == end for first, end in each.spans[0]):
            raise InputError(f'width {width:g} uses no channel of {each.name}; give diagnostics.smallest a larger one')
    return found


def slice_norms(layers: Sequence[LayerSlice]) -> torch.Tensor:
    """L2 norms of the gradients of layers: within their slices, of the whole gradient, and outside the slices.

    A layer's weight and bias count as one tensor. Slice and rest are measured, and the whole follows from both: a rest
    by subtraction would lose digits. The device is not synchronised. The result is [layers, 3], on the device; the norm
    of an empty rest is 0.
    """
    pieces: list[torch.Tensor] = []
    owners: list[int] = []
    for i, layer in enumerate(layers):
        for parameter, spans in zip(layer.parameters, layer.spans, strict=True):
            assert parameter.grad is not None
            inside, *outside = _pieces(parameter.grad, spans)
            pieces += [inside, *outside]
            owners += [2 * i, *[2 * i + 1] * len(outside)]
    squares = torch.stack([norm.float().square() for norm in torch._foreach_norm(pieces)])
    sums = squares.new_zeros(2 * len(layers)).index_add_(0, _indices(owners, squares.device), squares)
    smallest, rest = sums.view(-1, 2).unbind(1)
    return torch.stack([smallest, smallest + rest, rest], 1).sqrt()


def _pieces(tensor: torch.Tensor, spans: tuple[Span, ...]) -> Iterator[torch.Tensor]:
    """Yield a view of the slice, then views of disjoint pieces around it."""
    pieces = []
    for dim, (first, end) in enumerate(spans):
        pieces += [tensor.narrow(dim, 0, first), tensor.narrow(dim, end, tensor.shape[dim] - end)]
        tensor = tensor.narrow(dim, first, end - first)
    yield tensor
    yield from (piece for piece in pieces if piece.numel())


def _indices(values: list[int], device: torch.device) -> torch.Tensor:
    indices = torch.tensor(values)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else indices


def mean_norms(layers: Sequence[LayerSlice]) -> torch.Tensor:
    """Mean over layers of `slice_norms` (paper, Fig. 3), [3]."""
    return slice_norms(layers).mean(0)


def last_linear(method: nn.Module) -> torch.Tensor:
    """Weight of the last linear layer, which the gradient reaches first (paper, Fig. 4).

    It is the head's last layer for MoCo v2 and SimCLR, the predictor's last for MoCo v3, and for supervised training
    the classifier that all widths share, or of a switchable one that of the full width.

    Raises:
        InputError: The method has no such layer.
    """
    for name in 'predictor', 'head':
        if isinstance(head := getattr(method, name, None), nn.Module):
            return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1].weight
    backbone = method.get_submodule('backbone')
    classifier = backbone.get_submodule('fc')
    if isinstance(classifier, SwitchableLinear):
        widths = method.widths
        assert isinstance(widths, tuple)
        classifier = classifier[width_key(max(widths))]
    if not isinstance(classifier, nn.Linear):
        raise InputError(
            f'{type(method).__name__} has no head and no classifier, so no last linear layer; give '
            '--diagnostics.gradients 0'
        )
    return classifier.weight


class GradientObserver:
    """Records gradient norms, gradients of the last layer, and weights of a run, on its main process.

    Norms stay on the device until the next line of the log, gradients in memory until the next checkpoint. Under DDP
    gradients are the means over processes; batch normalisation statistics in a snapshot are those of this process. A
    recorded step costs one pass over the gradients (norms), a copy of the last layer's, or a file of weights.
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
            self._records.add_weights(step, _trained_tensors(method))

    def write(self, everything: bool) -> list[tuple[int, dict[str, float]]]:
        """Write the records and return values for the tracker by step; a checkpoint needs `everything` written."""
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

    Raises:
        InputError: There is nothing to observe, or the smallest width is too small.
    """
    records, observer = Records(folder), None
    if config.on:
        smallest = config.smallest_of(method.widths, method.backbone.overlap)
        observer = GradientObserver(config, method, smallest, records)
    records.drop_from(step)
    return observer


def _trained_tensors(method: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the tensors of a method's trained children to the host, in float32; the momentum encoder is left out."""
    return {
        f'{child_name}.{name}': (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous().clone()
        for child_name, child in method.named_children()
        if any(parameter.requires_grad for parameter in child.parameters())
        for name, tensor in child.state_dict().items()
    }
