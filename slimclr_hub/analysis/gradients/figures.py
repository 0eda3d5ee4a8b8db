"""Figures of gradients over training, after the paper's figures 3 and 4."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimclr_hub.analysis.gradients.data import RunGradients
from slimclr_hub.analysis.gradients.summary import components
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 3  # panels beside each other
_MANY = 100  # points of a line, from which on they are smoothed
_FAINTEST = 0.25


def draw_imbalance(runs: Sequence[RunGradients], path: Path) -> None:
    """Ratios of gradient norms over epochs, a panel for each run (paper, Fig. 3).

    Args:
        runs: The runs, each with norms.
        path: Files to write, without suffix: a PNG and a PDF.
    """
    figure, axes = _panels(len(runs), width=4.6, height=3.6)
    highest = max(value for run in runs for record in run.norms for value in (record.all_ratio, 1) if isfinite(value))
    for axis, run in zip(axes, runs, strict=True):
        width = run.norms[0].width
        epochs = [record.step / run.steps_per_epoch for record in run.norms]
        _draw_ratio(axis, epochs, [record.all_ratio for record in run.norms], f'all / width {width:g}', 0)
        _draw_ratio(axis, epochs, [record.rest_ratio for record in run.norms], f'rest / width {width:g}', 1)
        axis.axhline(1, color='0.3', linewidth=0.9)
        if run.slow_start is not None:
            axis.axvline(run.slow_start, color='0.3', linestyle=':', label=f'slow start ends ({run.slow_start:g})')
        axis.set_ylim(0, 1.35 * highest)  # one scale, so that panels compare, with room for the legend
        axis.set_xlim(left=0)
        axis.set_xlabel('epoch')
        axis.set_ylabel('ratio of gradient norms')
        axis.set_title(run.name, fontsize='medium')
        axis.legend(fontsize='small', loc='upper right')
    save_figure(figure, path)


def draw_divergence(runs: Sequence[RunGradients], path: Path, unit_length: bool = False) -> None:
    """The last linear layer's gradients in the plane that shows most of them (paper, Fig. 4).

    An arrow for each step, the later the darker; many are points alone. At unit length one would reach the circle if
    its direction lay in the plane.

    Args:
        runs: The runs, each with gradients.
        path: Files to write, without suffix: a PNG and a PDF.
        unit_length: Draw directions alone, as `components` has them.
    """
    figure, axes = _panels(len(runs), width=4.2, height=4.4)
    for axis, run in zip(axes, runs, strict=True):
        found = components(run, unit_length)
        points, steps = found.projections.numpy(), run.steps.numpy()
        darkness = _FAINTEST + (1 - _FAINTEST) * np.linspace(0, 1, len(steps))
        slowly = np.array([run.starts_slowly(step) for step in steps.tolist()])
        names = ('all epochs', '') if run.slow_start is None else (f'from epoch {run.slow_start:g} on', 'slow start')
        for i, (name, chosen) in reversed([*enumerate(zip(names, (~slowly, slowly), strict=True))]):
            if chosen.any():
                _draw_arrows(axis, points[chosen], darkness[chosen], name, i, heads_only=len(steps) >= _MANY)
        reach = 1 if unit_length else np.abs(points).max() or 1
        if unit_length:
            turn = np.linspace(0, 2 * np.pi, 200)
            axis.plot(np.cos(turn), np.sin(turn), color='0.6', linewidth=0.8)
        axis.set_aspect('equal')
        axis.set_xlim(-1.1 * reach, 1.1 * reach)
        axis.set_ylim(-1.45 * reach, 1.1 * reach)  # room for the legend
        first, second = (f'{100 * ratio:.0f} %' for ratio in found.ratios.tolist())
        axis.set_xlabel(f'first principal component ({first})')
        axis.set_ylabel(f'second principal component ({second})')
        axis.set_title(run.name, fontsize='medium')
        axis.legend(fontsize='small', loc='lower center')
    what = 'directions of gradients, the later the darker;\non the circle: all of it in this plane'
    figure.suptitle(what if unit_length else 'gradients, the later the darker', fontsize='small')
    save_figure(figure, path)


def _draw_arrows(
    axis: 'Axes', points: np.ndarray, darkness: np.ndarray, name: str, number: int, heads_only: bool
) -> None:
    from matplotlib.colors import to_rgba_array

    (x, y), colour = points.T, line_style(number)['color']
    colours = to_rgba_array([colour] * len(x), darkness)
    if not heads_only:
        scale: dict[str, Any] = {'angles': 'xy', 'scale_units': 'xy', 'scale': 1, 'width': 0.004}
        axis.quiver(*np.zeros((2, len(x))), x, y, color=colours, **scale)
    axis.scatter(x, y, s=10 if heads_only else 22, marker=marker(number), color=colours)
    axis.scatter([], [], s=22, marker=marker(number), color=colour, label=name)


def _draw_ratio(axis: 'Axes', epochs: Sequence[float], values: Sequence[float], label: str, number: int) -> None:
    style = line_style(number)
    if len(values) < _MANY:
        axis.plot(epochs, values, label=label, marker=marker(number), markersize=4, **style)
        return
    axis.plot(epochs, values, alpha=0.25, linewidth=0.7, color=style['color'])
    axis.plot(epochs, _running_mean(values, len(values) // (_MANY // 2)), label=f'{label} (running mean)', **style)


def _running_mean(values: Sequence[float], count: int) -> np.ndarray:
    """Means over up to `count` values on either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), count)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _panels(count: int, width: float, height: float) -> 'tuple[Figure, list[Axes]]':
    across = min(count, _ACROSS)
    figure, axes = new_figure(across, -(-count // across), width=width, height=height)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]
