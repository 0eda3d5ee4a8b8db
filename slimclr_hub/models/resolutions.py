"""Statistics of batch normalisation for other sizes of images than a network's own, and what each pair of width and
size reaches.

Statistics depend on the size: Yang et al. 2020, MutualNet (https://arxiv.org/abs/1909.12978), estimate them anew for
each pair, and choose one by a query table. Here a network's own statistics, which are of augmented views, are moved by
the difference between plain images at the two sizes: so those of its own size stay, for which its head was trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.files import atomic_files
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.settings import at_least, at_most
from slimclr_hub.weights.bounded import LARGEST_CONFIG, as_float
from slimclr_hub.weights.checkpoint import check_values
from slimclr_hub.weights.tensor_file import TensorFile, write_safetensors

Statistics = Mapping[str, torch.Tensor]
"""Running means and variances of all widths, by their names in the network's state dict."""

_MEAN, _VARIANCE = '.running_mean', '.running_var'
_EPS = 1e-5  # as in batch normalisation; a channel that is constant at both sizes keeps its variance
_METADATA = 'slimclr_resolutions'
MOST_SIZES = 20


@dataclass(frozen=True)
class Pair:
    """A width and a size of images.

    Args:
        width: The width.
        size: Height and width of the images in pixels.
        accuracy: Share of right answers, in [0, 1]; None if it is not known.
    """

    width: float
    size: int
    accuracy: float | None = None

    def __post_init__(self) -> None:
        at_least('size', self.size, 1)
        at_most('size', self.size, MAX_IMAGE_SIZE)
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise InputError(f'accuracy {self.accuracy} is outside [0, 1]')

    def __str__(self) -> str:
        if self.accuracy is None:
            return f'width {self.width:g}'
        return f'width {self.width:g} at {self.size}x{self.size} ({100 * self.accuracy:.1f} % right)'


@dataclass(frozen=True)
class Resolutions:
    """The pairs of one network that have statistics.

    Args:
        weights: `slimclr_hub.weights.hashes.state_hash` of the network, with the statistics of its own size.
        size: Its own size of images in pixels.
        images: Number of images that the statistics were estimated from.
        tested: Number of other images that accuracies were measured on; 0 if they had no labels.
        pairs: Each width at each size, its own size included.
    """

    weights: str
    size: int
    images: int
    tested: int
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if self.size not in self.sizes or len(self.sizes) > MOST_SIZES:
            raise InputError(f"sizes {shorten(list(map(str, self.sizes)))} lack the network's own, or are too many")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of images in pixels, in ascending order."""
        return tuple(sorted({pair.size for pair in self.pairs}))

    def save(self, statistics: Mapping[int, Statistics], path: Path) -> None:
        """Write a safetensors file, atomically.

        Args:
            statistics: Size -> statistics; those of the network's own size are in its weights, and are left out.
            path: The file.
        """
        tensors = {
            f'{size}.{name}': tensor.cpu().contiguous()
            for size, found in statistics.items()
            for name, tensor in found.items()
            if size != self.size
        }
        with atomic_files(path.parent) as partial:
            write_safetensors(tensors, partial / path.name, {_METADATA: json.dumps(asdict(self))})


def load_resolutions(path: Path) -> Resolutions:
    """Read what `Resolutions.save` wrote, but for its tensors.

    Raises:
        InputError: The file is not there or holds something else.
    """
    with TensorFile(path) as file:
        text = file.metadata.get(_METADATA, '')
    try:
        if len(text) > LARGEST_CONFIG:
            raise ValueError
        content = json.loads(text)
        pairs = []
        for each in content['pairs']:
            accuracy = None if each['accuracy'] is None else as_float(each['accuracy'])
            pairs.append(Pair(as_float(each['width']), _as_int(each['size']), accuracy))
        size, images, tested = (_as_int(content[key]) for key in ('size', 'images', 'tested'))
        if not isinstance(content['weights'], str):
            raise TypeError
        return Resolutions(content['weights'], size, images, tested, tuple(pairs))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f'{path} holds no resolutions; `slimclr-hub resolutions NETWORK IMAGES` writes them'
        ) from error


def load_statistics(path: Path, sizes: Sequence[int], own: Statistics) -> dict[int, dict[str, torch.Tensor]]:
    """Read the statistics of some sizes, each of which has the names and shapes of the network's own.

    Raises:
        InputError: One is missing or misshapen, is no number, or is a negative variance.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    with TensorFile(path) as file:
        for size in sizes:
            found[size] = {}
            for name, like in own.items():
                key = f'{size}.{name}'
                if file.shapes.get(key) != tuple(like.shape):
                    raise InputError(f'{path}: {key} is missing, or is not of shape {list(like.shape)}')
                tensor = file.whole(key)
                check_values(key, tensor)
                if name.endswith(_VARIANCE) and (tensor < 0).any():
                    raise InputError(f'{path}: {key} is a variance below 0')
                found[size][name] = tensor
    return found


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances of a network, which share its memory."""
    return {name: tensor for name, tensor in model.named_buffers() if name.endswith((_MEAN, _VARIANCE))}


@torch.no_grad()
def copy_statistics(statistics: Statistics, model: nn.Module) -> None:
    """Give a network these statistics, which are of all its normalisations."""
    for name, tensor in statistics_of(model).items():
        tensor.copy_(statistics[name])


def check_unchanged(statistics: Statistics, model: nn.Module) -> None:
    """Raise an InputError unless a network still has the statistics that were copied into it."""
    now = statistics_of(model)
    if now.keys() != statistics.keys() or not all(t.equal(statistics[name].to(t)) for name, t in now.items()):
        raise InputError(
            'the statistics have changed since those of other sizes were loaded, by training or a new width; make '
            'them again: slimclr-hub resolutions NETWORK IMAGES'
        )


def moved(own: Statistics, at_own_size: Statistics, at_other_size: Statistics) -> dict[str, torch.Tensor]:
    """A network's own statistics, moved from its own size to another one.

    Means move by the difference, and variances by the ratio, of what the same images have at both sizes.
    """
    found = {}
    for name, tensor in own.items():
        before, after = at_own_size[name], at_other_size[name]
        found[name] = tensor + (after - before) if name.endswith(_MEAN) else tensor * ((after + _EPS) / (before + _EPS))
    return found


def _as_int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value
