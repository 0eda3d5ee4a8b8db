"""The error surface about the end of training (paper, section 4.4, figure 5; Li et al. 2018, sections 4 and 7)."""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from slimclr_hub.analysis.landscape.directions import Weights
from slimclr_hub.analysis.replay import Replay
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.methods.split_batchnorm import split_batchnorm

Values = dict[str, float | None]
"""Name of a quantity -> its value; none where it is not finite."""


class Measure(Protocol):
    """What is measured at each point of a surface.

    Attributes:
        backbone: The network whose weights are moved.
    """

    backbone: nn.Module

    def __call__(self) -> Mapping[str, torch.Tensor]:
        """Scalars at the weights that `backbone` has now; everything but them is as it was at the point before."""


class LossMeasure:
    """The training loss on a fixed set of training batches: those that the run would have gone on with.

    Images, views and random numbers, keys and queue are the same at every point: the momentum encoder does not follow
    the weights, and nothing is enqueued. Batches are normalised by their own statistics, as in training, and running
    statistics stay. So at the origin it is the loss of the checkpoint.

    Args:
        replay: The run, at a checkpoint.
        batches: Batches, of an optimizer step each, that the loss is averaged over.
    """

    def __init__(self, replay: Replay, batches: int) -> None:
        self.backbone = replay.method.backbone
        self._replay = replay
        self._steps = replay.next_steps(batches)

    def __call__(self) -> Mapping[str, torch.Tensor]:
        """`loss` over all widths with their weights, and what else the method tells of each width."""
        return self._replay.losses(self._steps, momentum=False)


class ErrorMeasure:
    """100 - accuracy (%) at every width: of the network's own classifier, or k-NN where it has none, as in the paper.

    Running statistics of batch normalisation belong to the weights of the origin alone. At every point, there too,
    batches of centre crops are normalised by their own statistics instead, so the value at the origin is near the error
    that evaluation tells, not the same.

    Args:
        replay: The run, at a checkpoint.
        images: Validation images to classify, and with k-NN as many training images to search; no more than there are,
            in whole batches.

    Raises:
        InputError: The run has no validation images, or fewer than a batch.
    """

    def __init__(self, replay: Replay, images: int) -> None:
        config = replay.config
        if not has_validation(config.data):
            raise InputError(f'{replay.folder} has no validation images to take an error on; give --quantity full')
        self.backbone: Any = copy.deepcopy(replay.method.backbone).eval()
        split_batchnorm(self.backbone, 1)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        self._replay = replay
        self._k, self._temperature = config.knn.k, config.knn.temperature
        assert config.data.val_split is not None
        self._queries = self._read(config.data.val_split, images)
        self._bank = [] if self.backbone.num_classes else self._read(config.data.train_split, images)

    def _read(self, split: str, images: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        replay = self._replay
        loader = eval_loader(replay.config.data, split, images, replay.config.run.seed)
        size, left, found = loader.batch_size, images, []
        for batch, labels in loader:
            # A smaller one would be normalised by statistics of another kind.
            if len(batch) != size or left < len(batch):
                break
            left -= len(batch)
            found.append((batch.to(replay.device), labels.to(replay.device)))
        if not found:
            raise InputError(f'{images} images of {split} make no batch of {size}; give --images {size} or more')
        return found

    @torch.no_grad()
    def __call__(self) -> Mapping[str, torch.Tensor]:
        """`error/w` for each width w, in percent."""
        widths = self.backbone.widths
        outputs, truth = self._run(self._queries, widths)
        if self.backbone.num_classes:
            predicted = {width: output.argmax(1) for width, output in outputs.items()}
        else:
            bank, labels = self._run(self._bank, widths)
            predicted = {
                width: knn_predict(output, bank[width], labels, self._k, self._temperature)
                for width, output in outputs.items()
            }
        return {f'error/{width:g}': 100 * (found != truth).float().mean() for width, found in predicted.items()}

    def _run(
        self, batches: list[tuple[torch.Tensor, torch.Tensor]], widths: Sequence[float]
    ) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
        outputs = [self.backbone.forward_widths(images, widths) for images, _ in batches]
        joined = {width: torch.cat([output[width].float() for output in outputs]) for width in widths}
        return joined, torch.cat([labels for _, labels in batches])


def grid(reach: float, resolution: int) -> list[float]:
    """Coordinates from -`reach` to `reach`, of which the middle one is 0 exactly where their number is odd."""
    return [reach * (2 * i - (resolution - 1)) / (resolution - 1) for i in range(resolution)]


def move(backbone: nn.Module, origin: Weights, first: Weights, second: Weights, a: float, b: float) -> None:
    """Put the weights of a network to `origin` + a `first` + b `second`, in place; other tensors stay."""
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, tensor in origin.items():
            parameters[name].copy_(tensor + a * first[name] + b * second[name])


def measure_surface(
    measure: Measure,
    directions: tuple[Weights, Weights],
    axes: tuple[Sequence[float], Sequence[float]],
    partial: Path,
    settings: Mapping[str, Any],
    progress: Callable[[int], object] = lambda points: None,
) -> dict[str, list[list[float | None]]]:
    """Measure on a grid of a plane through the weights that the network has, which it has again afterwards.

    Args:
        measure: What to measure.
        directions: Name -> tensor, of the parameters of `measure.backbone` that move.
        axes: Coordinates along the first direction [A] and along the second [B].
        partial: File that takes a line for each point, so that an interrupted surface goes on from there.
        settings: What tells this surface from others.
        progress: Called with a number of points that are there.

    Returns:
        Quantity -> values [B][A], none where one is not finite.

    Raises:
        InputError: `partial` is of another surface.
    """
    first, second = (_placed(direction, measure.backbone) for direction in directions)
    origin = {name: p.detach().clone() for name, p in measure.backbone.named_parameters() if name in first}
    points = _read_points(partial, settings)
    progress(len(points))
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open('a') as file:
            if not points and file.tell() == 0:
                file.write(json.dumps(dict(settings)) + '\n')
            for j, i in product(range(len(axes[1])), range(len(axes[0]))):
                if (j, i) in points:
                    continue
                move(measure.backbone, origin, first, second, axes[0][i], axes[1][j])
                points[j, i] = _floats(measure())
                file.write(json.dumps([j, i, points[j, i]]) + '\n')
                file.flush()
                progress(1)
    finally:
        move(measure.backbone, origin, first, second, 0.0, 0.0)
    return {
        name: [[points[j, i][name] for i in range(len(axes[0]))] for j in range(len(axes[1]))] for name in points[0, 0]
    }


def point_bar(total: int) -> Any:
    """A bar with points per second and the time left."""
    return tqdm(total=total, unit='point', desc='surface', dynamic_ncols=True, mininterval=_interval())


def _interval() -> float:
    return 0.2 if sys.stderr.isatty() else 15


def _placed(direction: Weights, backbone: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(backbone.named_parameters())
    return {name: tensor.to(parameters[name]) for name, tensor in direction.items()}


def _floats(values: Mapping[str, torch.Tensor]) -> Values:
    # All at once: each by itself would be a wait for the device.
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return {name: number if isfinite(number) else None for name, number in zip(values, numbers, strict=True)}


def _read_points(partial: Path, settings: Mapping[str, Any]) -> dict[tuple[int, int], Values]:
    if not partial.exists():
        return {}
    text = partial.read_text()
    whole = text[: text.rfind('\n') + 1]
    if whole != text:  # the line that a kill cut off
        partial.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != json.loads(json.dumps(dict(settings))):
        raise InputError(f'{partial} is the beginning of a surface by other settings; remove it, or give --output')
    return {(j, i): values for j, i, values in lines[1:]}
