"""A cascade: the narrowest width runs on every image, and wider ones where its answer is unsure.

An answer stands if the margin, the difference of its two largest probabilities, reaches a threshold. An image costs the
sum over the widths that it ran. Wang et al. 2017, IDK Cascades (https://arxiv.org/abs/1706.00885), set several networks
in a row in this way; here they are the widths of one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.text import human
from slimclr_hub.weights.bounded import as_float, read_json


@dataclass(frozen=True)
class Cascade:
    """One way through the widths.

    Args:
        widths: Widths in the order in which they run, ascending.
        margin: Least margin, in [0, 1], at which an answer stands; that of the last width always does.
        multiply_adds: Of an image, in the mean over the images that it was fitted on, all its forwards included.
        agreement: Share of these images, in [0, 1], with the answer of the widest width of all.

    Raises:
        InputError: A value is out of its range.
    """

    widths: tuple[float, ...]
    margin: float
    multiply_adds: float
    agreement: float

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise InputError(f'widths {list(self.widths)} of a cascade do not ascend')
        for name, value, most in ('margin', self.margin, 1), ('agreement', self.agreement, 1):
            if not 0 <= value <= most:
                raise InputError(f'{name} {value} of a cascade is outside [0, 1]')
        if not 0 < self.multiply_adds < inf:
            raise InputError(f'multiply_adds {self.multiply_adds} of a cascade is no cost')


class Routed(NamedTuple):
    """Answers of a cascade.

    Args:
        logits: [N, classes], each image's of the last width that it ran.
        widths: That width, [N].
        forwards: Width -> images that ran it.
    """

    logits: torch.Tensor
    widths: torch.Tensor
    forwards: dict[float, int]


@dataclass(frozen=True)
class FittedCascades:
    """Cascades of one network, from the cheapest to the one that agrees best with the widest width.

    Args:
        weights: `slimclr_hub.weights.hashes.state_hash` of the network.
        size: Height and width of the images in pixels.
        images: Number of images that they were fitted on.
        cascades: In ascending order of cost.
    """

    weights: str
    size: int
    images: int
    cascades: tuple[Cascade, ...]

    def __post_init__(self) -> None:
        costs = [cascade.multiply_adds for cascade in self.cascades]
        if not costs or costs != sorted(costs):
            raise InputError('cascades are none, or not in ascending order of cost')

    def within(self, budget: float) -> Cascade:
        """The cascade that agrees best with the widest width among those of at most `budget` multiply-adds an image.

        Raises:
            InputError: The cheapest costs more, or the budget is no number.
        """
        fitting = [cascade for cascade in self.cascades if cascade.multiply_adds <= budget]
        if not fitting:
            least = self.cascades[0].multiply_adds
            raise InputError(
                f'budget {budget:g}: the cheapest cascade has {human(round(least))} multiply-adds an image'
            )
        return max(fitting, key=lambda cascade: cascade.agreement)

    def save(self, path: Path) -> None:
        """Write them as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1) + '\n')


def load_cascades(path: Path) -> FittedCascades:
    """Read what `FittedCascades.save` wrote.

    Raises:
        InputError: The file is not there, is longer than 1 MiB, or holds something else.
    """
    try:
        content = read_json(path)
        listed = [{**each, 'widths': tuple(map(as_float, each['widths']))} for each in content['cascades']]
        cascades = tuple(Cascade(**{**each, **{key: as_float(each[key]) for key in _NUMBERS}}) for each in listed)
        weights, size, images = content['weights'], content['size'], content['images']
        if not isinstance(weights, str) or not isinstance(size, int) or not isinstance(images, int):
            raise TypeError
        return FittedCascades(weights, size, images, cascades)
    except OSError as error:
        raise InputError(f'cascades {path}: {error.strerror}') from error
    except InputError as error:
        raise InputError(f'{path}: {error}') from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InputError(f'{path} holds no cascades; `slimclr-hub cascade NETWORK IMAGES` writes them') from error


def margins(probabilities: torch.Tensor) -> torch.Tensor:
    """Difference of the two largest probabilities: [N, classes] -> [N], in float32."""
    first, second = probabilities.float().topk(2, dim=1).values.unbind(1)
    return first - second


def route(forward: Callable[[torch.Tensor, float], torch.Tensor], images: torch.Tensor, cascade: Cascade) -> Routed:
    """Run a cascade.

    Args:
        forward: (images, width) -> logits [N, classes], such as a network's `forward_at`.
        images: [N, C, H, W].
        cascade: Widths and margin.
    """
    unsure = torch.arange(len(images), device=images.device)
    logits, forwards = None, dict.fromkeys(cascade.widths, 0)
    widths = torch.empty(len(images))
    for width in cascade.widths:
        if not len(unsure):
            break
        answers = forward(images if len(unsure) == len(images) else images[unsure], width)
        forwards[width] = len(unsure)
        widths[unsure.to(widths.device)] = width
        if logits is None:
            logits = answers.clone()
        else:
            logits[unsure] = answers
        unsure = unsure[margins(answers.float().softmax(1)) < cascade.margin]
    if logits is None:
        raise InputError('there are no images')
    return Routed(logits, widths, forwards)


def last_widths(margin_at: Mapping[float, torch.Tensor], widths: Sequence[float], margin: float) -> torch.Tensor:
    """The width whose answer each image gets, from its margins [N] at all of them, without running anything."""
    ends = torch.full_like(margin_at[widths[-1]], widths[-1])
    for width in reversed(widths[:-1]):
        ends[margin_at[width] >= margin] = width
    return ends


def mean_cost(ends: torch.Tensor, widths: Sequence[float], multiply_adds: Mapping[float, int]) -> float:
    """Multiply-adds of an image in the mean, where the last width of each is one of `ends` [N]."""
    return sum(multiply_adds[width] * (ends >= width).double().mean().item() for width in widths)


_NUMBERS = ('margin', 'multiply_adds', 'agreement')
