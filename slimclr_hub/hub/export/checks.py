"""What every export shares: the network to write, images to check it with, and the comparison with PyTorch."""

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.hub.folder import check_overlap
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_width

INPUT = 'pixel_values'
"""Name of the input in every format that names it."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""A runtime with a network: images [N, C, H, W] -> its output."""

LEAST_COSINE = 0.99
"""The least mean cosine similarity of int8 outputs that is accepted, unless told otherwise."""

BATCH = 32
"""Images that are run at a time."""

_CHECKED_BATCHES = (1, 3)
_LOGITS = 'logits'

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """One width of a network in a file.

    Args:
        width: The width; None for a network that has none.
        path: The file to open for it.
        difference: The largest absolute difference between the outputs of the file's runtime and PyTorch's.
        beside: Files that have to lie beside it.
        cosine: Of int8, the mean cosine similarity with the outputs in float32, on images held out.
        agreement: Of int8 with a head, the share of these images whose most probable class stays the same.
    """

    width: float | None
    path: Path
    difference: float
    beside: tuple[Path, ...] = ()
    cosine: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What int8 is made and judged with.

    Args:
        images: Preprocessed images [N, C, H, W] on the CPU, from which the ranges of activations come.
        held_out: Others, on which the outputs are compared with those in float32.
        least: The least mean cosine similarity to accept.
    """

    images: torch.Tensor
    held_out: torch.Tensor
    least: float = LEAST_COSINE

    @classmethod
    def split(cls, images: torch.Tensor, least: float | None = None) -> 'Calibration':
        """Hold every second image out."""
        return cls(images[::2].contiguous(), images[1::2].contiguous(), LEAST_COSINE if least is None else least)


@dataclass(frozen=True)
class Reference:
    """A dense network to write, in float32 and eval mode on the CPU, and what a file of it must compute.

    Args:
        network: The network.
        width: The width it was taken at; None for a network that has none.
        output: Name of its output, `logits` or `features`.
        batches: Random images in batches of 1 and 3, [N, C, size, size].
        outputs: The outputs of the network that was given, for each batch.
        architecture: The name in timm's registry of the network that was given, if it has one.
    """

    network: nn.Module
    width: float | None
    output: str
    batches: list[torch.Tensor]
    outputs: list[torch.Tensor]
    architecture: str | None = None

    @property
    def example(self) -> torch.Tensor:
        """A batch to trace the network with: of 2, as export would take a batch of 1 for a constant."""
        return torch.zeros_like(self.batches[-1][:2])

    @property
    def has_head(self) -> bool:
        """True if the outputs are logits."""
        return self.output == _LOGITS

    def difference(self, run: Run, path: Path) -> float:
        """Return the largest absolute difference of a runtime's outputs.

        Raises:
            ExportError: It exceeds 1e-4, or 1e-4 of the largest output where that is above 1.
        """
        largest = 0.0
        for images, expected in zip(self.batches, self.outputs, strict=True):
            with torch.no_grad():
                difference = (run(images) - expected).abs().max().item()
            scale = max(1.0, expected.abs().max().item())
            if not difference <= _TOLERANCE * scale:  # so that nan is caught
                raise ExportError(
                    f'{path} was not written: it would differ from the network by {difference:.3g} on a batch of '
                    f'{len(images)}, with outputs up to {scale:.3g}'
                )
            largest = max(largest, difference)
        return largest


def check(
    reference: Reference,
    run: Run,
    path: Path,
    beside: tuple[Path, ...] = (),
    calibration: Calibration | None = None,
) -> Exported:
    """Compare what a runtime computes with PyTorch in float32.

    Raises:
        ExportError: As in `Reference.difference`; of int8, the cosine similarity is less than accepted.
    """
    if calibration is None:
        return Exported(reference.width, path, reference.difference(run, path), beside)
    with torch.no_grad():
        batches = calibration.held_out.split(BATCH)
        expected = torch.cat([reference.network(images) for images in batches])
        found = torch.cat([run(images) for images in batches])
    cosine = torch.cosine_similarity(found, expected).mean().item()
    if not cosine >= calibration.least:
        raise ExportError(
            f'{path} was not written: in int8 its {reference.output} would have a cosine similarity of {cosine:.4f} '
            f'with those in float32, on {len(expected)} images held out, less than {calibration.least:g}; calibrate '
            'with more images like those of the task, or accept less by --least-cosine'
        )
    agreement = (found.argmax(1) == expected.argmax(1)).float().mean().item() if reference.has_head else None
    difference = (found - expected).abs().max().item()
    return Exported(reference.width, path, difference, beside, cosine, agreement)


def reference_of(model: nn.Module, size: int) -> Reference:
    """Make the reference of a network at its active width; the network stays as it is.

    Raises:
        InputError: `size` is no size of images, or the network has widths that do not overlap or several outputs.
    """
    check_size(size)
    return _reference(_on_the_cpu(model), size)


def references_of(model: SlimmableResNet, size: int, widths: Sequence[float] | None) -> dict[float, Reference]:
    """Make the references of several widths, all unless given, the widest first.

    Raises:
        InputError: As in `reference_of`, or the network does not hold one of `widths`.
    """
    check_size(size)
    chosen = {check_width(width, model.widths) for width in widths or model.widths}
    network = _on_the_cpu(model)
    references = {}
    for width in sorted(chosen, reverse=True):
        with network.set_width(width):
            references[width] = _reference(network, size)
    return references


def check_size(size: int) -> None:
    """Raise an InputError unless images can have this height and width, in pixels."""
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise InputError(f'size {size} is not from 1 to {MAX_IMAGE_SIZE}; give the height and width of the images')


def check_ending(path: Path, suffix: str) -> None:
    """Raise an InputError unless the name of a file ends so."""
    if path.suffix != suffix:
        raise InputError(f'{path} does not end in {suffix}')


def package(name: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        InputError: It is not installed, or does not import.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'exporting needs {name} ({error}): pip install "slimclr-hub[{extra}]"') from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings and log lines, which are about their internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


def _on_the_cpu(model: Any) -> Any:
    """A copy where float32 is float32 and where every runtime is, so that the caller's stays as it is."""
    if isinstance(model, SlimmableResNet):
        check_overlap(model.overlap, 'export')
    return copy.deepcopy(model).to('cpu', torch.float32).to(memory_format=torch.contiguous_format).eval()


def _reference(model: nn.Module, size: int) -> Reference:
    generator = torch.Generator().manual_seed(0)
    shape = (int(getattr(model, 'in_chans', 3)), size, size)
    batches = [torch.randn(count, *shape, generator=generator) for count in _CHECKED_BATCHES]
    with torch.no_grad():
        outputs = [model(images) for images in batches]
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        raise InputError(
            f'{type(model).__name__} returns a {type(outputs[0]).__name__}; a network of one output is needed'
        )
    network = model.extract(model.width) if isinstance(model, SlimmableResNet) else model
    if hasattr(network, 'set_grad_checkpointing'):
        network.set_grad_checkpointing(False)  # type: ignore[operator]
    output = _LOGITS if getattr(network, 'num_classes', 0) > 0 else 'features'
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return Reference(network, getattr(network, 'width', None), output, batches, outputs, architecture)
