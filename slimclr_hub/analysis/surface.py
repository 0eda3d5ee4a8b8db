"""`analyze surface`: the error surface about the end of runs, with their trajectories (paper, section 4.4, figure 5).

Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, sections 4 and 7, https://arxiv.org/abs/1712.09913.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from slimclr_hub.analysis.base import Analysis, OutputOption, labels_of, output_stem, read_data, run_folders, write_data
from slimclr_hub.analysis.replay import Replay, recipe_of
from slimclr_hub.analysis.trajectory import (
    NORMALISATIONS,
    Panel,
    PlanePath,
    Weights,
    load_trajectory,
    planes_figure,
    reach_of,
)
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.files import append_json_line, read_json_lines
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.methods.objective import LOSSES
from slimclr_hub.runs.figures import save_figure
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import above, at_least, differences, one_of

_QUANTITIES = ('error', 'full', 'total')


@dataclass(frozen=True)
class SurfaceConfig(OutputOption):
    """Options of `analyze surface`; the defaults draw what the paper's figure 5 shows.

    Args:
        quantity: Height of the surface. error: 100 - accuracy of the full width on validation images, by k-NN for a
            network without classifier; full: training loss of the full width, which all runs of a method have; total:
            the loss that was trained, the weighted sum over all widths.
        resolution: Points along each direction, an odd number.
        batches: Training batches, each of an optimizer step, over which a loss is averaged.
        images: Validation images on which an error is measured, and training images that k-NN searches.
        reach: Largest coordinate along each of both directions; what all the trajectories need by default.
        normalise: Scale of the directions. none: norm 1, so that coordinates are distances between weights; filter:
            each filter as long as that of the last weights.
    """

    quantity: str = 'error'
    resolution: int = 21
    batches: int = 4
    images: int = 1024
    reach: tuple[float, float] | None = None
    normalise: str = 'none'

    def __post_init__(self) -> None:
        one_of('quantity', self.quantity, _QUANTITIES)
        one_of('normalise', self.normalise, NORMALISATIONS)
        at_least('resolution', self.resolution, 3)
        at_least('batches', self.batches, 1)
        at_least('images', self.images, 1)
        if self.resolution % 2 == 0:
            even = f'resolution is {self.resolution}, which has no point at the origin'
            raise InputError(f'{even}; give {self.resolution + 1}')
        for reach in self.reach or ():
            above('reach', reach, 0)


class LossMeasure:
    """Training loss on a fixed set of training batches, the next ones of the run.

    Images, views, random numbers, keys and queue are the same at every point: the momentum encoder does not follow the
    weights, and nothing is enqueued. Batches are normalised by their own statistics, as in training, and running
    statistics stay. So at the origin it is the loss of the checkpoint. The weights that move are those of `backbone`.
    """

    def __init__(self, replay: Replay, batches: int) -> None:
        self.backbone = replay.method.backbone
        self._replay = replay
        self._steps = replay.next_steps(batches)

    def __call__(self) -> Mapping[str, torch.Tensor]:
        """Return `loss`, the weighted sum over all widths, and the method's other outputs at the present weights."""
        return self._replay.losses(self._steps, momentum=False)


class ErrorMeasure:
    """100 - accuracy (%) at every width, by the network's own classifier, or by k-NN if it has none, as in the paper.

    Running statistics of batch normalisation belong to the weights of the origin alone. So at every point, the origin
    included, batches of centre crops are normalised by their own statistics; the value at the origin is close to the
    error in evaluation, but not equal.

    Args:
        replay: The run, at a checkpoint.
        images: Validation images to classify, and for k-NN as many training images to search; fewer if the split has
            fewer, in whole batches.

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
        self._knn = config.knn
        assert config.data.val_split is not None
        self._queries = self._read(config.data.val_split, images)
        self._bank = [] if self.backbone.num_classes else self._read(config.data.train_split, images)

    def _read(self, split: str, images: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        replay = self._replay
        loader = eval_loader(replay.config.data, split, images, replay.config.run.seed)
        size, left, found = loader.batch_size, images, []
        for batch, labels in loader.readable():
            if left < size:
                break
            if len(batch) != size:  # statistics of a smaller batch would differ in kind
                continue
            if labels.min() < 0:
                raise InputError(f'images of {split} have no class; give --quantity full')
            left -= len(batch)
            found.append((batch.to(replay.device), labels.to(replay.device)))
        if not found:
            few = f'{min(images, loader.total)} images of {split} make no batch of {size}'
            raise InputError(f'{few}; give --images {size} or more where there are so many, or --quantity full')
        return found

    @torch.no_grad()
    def __call__(self) -> Mapping[str, torch.Tensor]:
        """Return `error/w` for each width w, in percent, at the present weights."""
        widths = self.backbone.widths
        outputs, truth = self._run(self._queries, widths)
        if self.backbone.num_classes:
            predicted = {width: output.argmax(1) for width, output in outputs.items()}
        else:
            bank, labels = self._run(self._bank, widths)
            predicted = {
                width: knn_predict(output, bank[width], labels, self._knn.neighbours(labels), self._knn.temperature)
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
    """Coordinates from -`reach` to `reach`; if `resolution` is odd, the middle one is exactly 0."""
    return [reach * (2 * i - (resolution - 1)) / (resolution - 1) for i in range(resolution)]


def move(backbone: nn.Module, origin: Weights, first: Weights, second: Weights, a: float, b: float) -> None:
    """Set the weights of a network to `origin` + a `first` + b `second`, in place; other tensors stay."""
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, tensor in origin.items():
            parameters[name].copy_(tensor + a * first[name] + b * second[name])


def measure_surface(
    measure: LossMeasure | ErrorMeasure,
    directions: tuple[Weights, Weights],
    axes: tuple[Sequence[float], Sequence[float]],
    partial: Path,
    settings: Mapping[str, Any],
    progress: Callable[[int], object] = lambda points: None,
) -> dict[str, list[list[float | None]]]:
    """Measure on a grid of a plane through the network's weights, which are restored afterwards.

    Args:
        measure: What to measure.
        directions: Name -> tensor, of the parameters of `measure.backbone` that move.
        axes: Coordinates along the first direction [A] and along the second [B].
        partial: File with a line for each point, from which an interrupted surface is resumed.
        settings: Settings of this surface.
        progress: Called with a number of finished points.

    Returns:
        Quantity -> values [B][A], None where one is not finite.

    Raises:
        InputError: `partial` belongs to a surface of other settings.
    """
    parameters = dict(measure.backbone.named_parameters())
    first, second = ({name: d.to(parameters[name]) for name, d in direction.items()} for direction in directions)
    origin = {name: parameters[name].detach().clone() for name in first}
    lines = read_json_lines(partial)
    if lines and (changes := differences(lines[0], settings)):
        raise InputError(
            f'{partial} has a part of a surface of other settings ({"; ".join(changes)}); remove it, or give --output'
        )
    points = {(j, i): values for j, i, values in lines[1:]}
    progress(len(points))
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not lines:
            append_json_line(partial, dict(settings))
        for (j, b), (i, a) in product(enumerate(axes[1]), enumerate(axes[0])):
            if (j, i) in points:
                continue
            move(measure.backbone, origin, first, second, a, b)
            outputs = measure()
            # One transfer, since each would synchronise the device.
            numbers = torch.stack([value.float() for value in outputs.values()]).tolist()
            points[j, i] = {name: x if isfinite(x) else None for name, x in zip(outputs, numbers, strict=True)}
            append_json_line(partial, [j, i, points[j, i]])
            progress(1)
    finally:
        move(measure.backbone, origin, first, second, 0.0, 0.0)
    return {
        name: [[points[j, i][name] for i in range(len(axes[0]))] for j in range(len(axes[1]))] for name in points[0, 0]
    }


def analyse_surface(runs: Sequence[str], config: SurfaceConfig) -> None:
    """Measure the points of runs' surfaces that are still missing, and draw them."""
    folders = run_folders(runs)
    methods = [recipe_of(folder).method.name for folder in folders]
    if config.quantity != 'error' and len(set(methods)) > 1:
        named = ' and '.join(sorted(set(methods)))
        raise InputError(f'losses of {named} do not compare; give runs of one method, or --quantity error')
    planes, paths = zip(*(load_trajectory(folder).plane(config.normalise) for folder in folders), strict=True)
    reach = config.reach or reach_of(paths)
    axes = (grid(reach[0], config.resolution), grid(reach[1], config.resolution))
    kind = 'error-surface' if config.quantity == 'error' else 'loss-surface'
    stem = output_stem(kind, folders, config.output)
    settings = {
        'runs': [path.run for path in paths],
        'steps': [list(path.steps) for path in paths],
        'resolution': config.resolution,
        'reach': list(reach),
        'normalise': config.normalise,
        # Not the quantity: one measurement of losses has both of them.
        **({'images': config.images} if config.quantity == 'error' else {'batches': config.batches}),
    }
    known = read_data(stem, settings)
    if known is not None:
        measured = known['runs']
    else:
        partials = [stem.with_name(f'{stem.name}.{number}.partial.jsonl') for number in range(len(folders))]
        measured = _measure_all(config, paths, planes, axes, partials, settings)
        write_data(stem, settings, runs=measured)
        for partial in partials:
            partial.unlink()
    keys, label = _height(config, measured)
    panels = [
        Panel(name, path, axes, run['values'][key])
        for name, path, run, key in zip(labels_of(folders), paths, measured, keys, strict=True)
    ]
    figure = stem if config.quantity != 'total' else stem.with_name(f'{stem.name}-total')
    save_figure(planes_figure(panels, label), figure)
    _table(panels, label).print()
    print(f'Figure: {figure}.png\nData: {stem}.json')


def _measure_all(
    config: SurfaceConfig,
    paths: Sequence[PlanePath],
    planes: Sequence[tuple[Weights, Weights]],
    axes: tuple[Sequence[float], Sequence[float]],
    partials: Sequence[Path],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    results = []
    interval = 0.2 if sys.stderr.isatty() else 15
    points = len(paths) * config.resolution**2
    with tqdm(total=points, unit='point', desc='surface', dynamic_ncols=True, mininterval=interval) as bar:
        for path, plane, partial in zip(paths, planes, partials, strict=True):
            replay = Replay(Path(path.run))
            replay.load(path.steps[-1])
            for note in replay.notes:
                bar.write(note)
            if replay.step < (total := replay.schedule.total_steps):
                cut = f'{replay.folder}: the last checkpoint is after step {replay.step} of {total}'
                bar.write(f'{cut}; the surface is about that one')
            errors = config.quantity == 'error'
            measure = ErrorMeasure(replay, config.images) if errors else LossMeasure(replay, config.batches)
            values = measure_surface(measure, plane, axes, partial, {**settings, 'run': path.run}, bar.update)
            results.append({'path': asdict(path), 'axes': axes, 'values': values})
    return results


def _height(config: SurfaceConfig, runs: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """Key of each run's quantity to draw, and its label."""
    if config.quantity == 'total':
        return ['loss'] * len(runs), 'training loss, all widths (nats)'
    labels = {'error': 'error (%)', **{name: f'{words} (nats)' for name, words in LOSSES.items()}}
    found = [[key for key in run['values'] if key.partition('/')[0] in labels] for run in runs]
    if not all(found):
        raise InputError(f'the method logs no {" and no ".join(LOSSES)} of each width; give --quantity total')
    # The widest of each run, which may be a narrower width alone.
    keys = [max(each, key=lambda key: float(key.partition('/')[2])) for each in found]
    return keys, labels[keys[0].partition('/')[0]]


def _table(panels: Sequence[Panel], label: str) -> TextTable:
    rows = []
    for panel in panels:
        assert panel.values is not None
        middle = len(panel.values) // 2
        heights = [value for row in panel.values for value in row if value is not None]
        centre = panel.values[middle][middle]
        rows.append(
            [
                panel.title,
                'not finite' if centre is None else f'{centre:.3f}',
                f'{min(heights):.3f}' if heights else '',
                f'{max(heights):.3f}' if heights else '',
                ', '.join(f'{100 * share:.1f}' for share in panel.path.explained),
                ', '.join(f'{distance:.3g}' for distance in panel.path.offsets),
            ]
        )
    headers = ('run', 'at the end', 'lowest', 'highest', 'explained by 1st, 2nd (%)', 'trajectory along 1st, 2nd')
    return TextTable(f'Surface about the end of training: {label}', headers, rows)


ANALYSIS = Analysis(
    SurfaceConfig, analyse_surface, 'RUN [RUN ...]', 'Error surface about the end of training, with the trajectory.'
)
