"""Figures of surfaces and trajectories: runs side by side, with the same axes and colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimclr_hub.analysis.landscape import PlanePath
from slimclr_hub.runs.figures import marker, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = 'cividis'  # reads alike with and without red-green blindness
_PATH = '#D55E00'
_LEVELS = 20
_MARGIN = 1.1


@dataclass(frozen=True)
class Panel:
    """One run in its plane.

    Args:
        title: Title of the panel.
        path: The trajectory.
        axes: Coordinates of the surface along both directions, [A] and [B]; None without a surface.
        values: The surface, [B][A].
    """

    title: str
    path: PlanePath
    axes: tuple[Sequence[float], Sequence[float]] | None = None
    values: Sequence[Sequence[float | None]] | None = None


def reach_of(paths: Sequence[PlanePath]) -> tuple[float, float]:
    """Largest coordinate of several trajectories along each direction, with a margin."""
    first, second = (max(path.offsets[i] for path in paths) * _MARGIN for i in (0, 1))
    return first, second


def planes_figure(panels: Sequence[Panel], quantity: str) -> 'Figure':
    """Draw trajectories; if the runs have surfaces, over their contours, with the surfaces in perspective above.

    Args:
        panels: The runs.
        quantity: Label of the surfaces' height, with its unit.
    """
    raised = all(panel.values is not None for panel in panels)
    columns = len(panels)
    figure, axes = new_figure(columns, 1 + raised, width=5.4, height=4.4)
    lows, highs = zip(*(_span(panel) for panel in panels), strict=True)
    levels = _levels(min(lows), max(highs))
    reach = reach_of([panel.path for panel in panels])
    last = max(panel.path.epochs[-1] for panel in panels)
    for i, panel in enumerate(panels):
        if raised:
            _draw_raised(figure, axes[i], i, 1 + raised, columns, panel, levels, quantity)
        axis = axes[columns * raised + i]
        if panel.values is not None:
            assert panel.axes is not None
            axis.grid(False)
            values = _array(panel)
            filled = axis.contourf(*panel.axes, values, levels=levels, cmap=_COLOURS, extend='both')
            axis.contour(*panel.axes, values, levels=levels, colors='white', linewidths=0.4, alpha=0.6)
            figure.colorbar(filled, ax=axis, label=quantity)
            axis.set_xlim(min(panel.axes[0]), max(panel.axes[0]))
            axis.set_ylim(min(panel.axes[1]), max(panel.axes[1]))
        else:
            axis.set_xlim(-reach[0], reach[0])
            axis.set_ylim(-reach[1], reach[1])
        _draw_path(axis, panel.path)
        if panel.values is None:
            along, across = zip(*panel.path.coordinates, strict=True)
            style: dict[str, Any] = {'cmap': _COLOURS, 's': 36, 'zorder': 2.5, 'edgecolor': 'black'}
            # One scale of epochs for all panels.
            dots = axis.scatter(along, across, c=panel.path.epochs, vmin=0, vmax=last, **style)
            figure.colorbar(dots, ax=axis, label='epoch')
        if not raised:
            axis.set_title(panel.title)
        axis.set_xlabel(_label(panel.path, 0))
        axis.set_ylabel(_label(panel.path, 1))
        axis.legend(loc='upper left', fontsize='small', framealpha=0.9)
    return figure


def _draw_path(axis: 'Axes', path: PlanePath) -> None:
    along, across = np.array(path.coordinates).T
    axis.plot(along, across, color='white', linewidth=3.5, solid_capstyle='round')
    axis.plot(along, across, color=_PATH, linewidth=1.5, marker='o', markersize=4, markeredgecolor='white')
    style: dict[str, Any] = {'linestyle': 'none', 'markeredgecolor': 'black', 'zorder': 3}
    axis.plot(
        along[:1], across[:1], color=_PATH, marker=marker(1), markersize=9, label=f'epoch {path.epochs[0]:.3g}', **style
    )
    if path.slow_start is not None and path.epochs[0] < path.slow_start < path.epochs[-1]:
        end = [[np.interp(path.slow_start, path.epochs, coordinates)] for coordinates in (along, across)]
        label = f'slow start ends ({path.slow_start:g})'
        axis.plot(*end, color='white', marker=marker(3), markersize=8, label=label, **style)
    origin = f'epoch {path.epochs[-1]:.3g}, the origin'
    axis.plot([0], [0], color='white', marker='*', markersize=15, label=origin, **style)


def _draw_raised(
    figure: Any, flat: 'Axes', i: int, rows: int, columns: int, panel: Panel, levels: Any, quantity: str
) -> None:
    assert panel.axes is not None
    flat.remove()
    axis = figure.add_subplot(rows, columns, i + 1, projection='3d')
    along, across = np.meshgrid(*panel.axes)
    low, high = levels[0], levels[-1]
    values = np.clip(np.ma.filled(_array(panel), high), low, high)
    axis.plot_surface(
        along, across, values, cmap=_COLOURS, vmin=low, vmax=high, rstride=1, cstride=1, linewidth=0.1, edgecolor='k'
    )
    axis.set_zlim(low, high)
    axis.view_init(elev=35, azim=-60)
    axis.set_title(panel.title)
    axis.set_xlabel('1st direction', labelpad=6)
    axis.set_ylabel('2nd direction', labelpad=10)
    axis.set_zlabel(quantity)


def _label(path: PlanePath, i: int) -> str:
    scale = 'filter-normalised' if path.normalise == 'filter' else 'distance of weights'
    return f'{("1st", "2nd")[i]} PCA component, {100 * path.explained[i]:.1f} % explained\n({scale})'


def _array(panel: Panel) -> Any:
    return np.ma.masked_invalid(np.array(panel.values, dtype=float))


def _span(panel: Panel) -> tuple[float, float]:
    """Lowest value and 95th percentile of a surface: steep corners go beyond the colours."""
    if panel.values is None:
        return float('inf'), float('-inf')
    values = _array(panel).compressed()
    return float(values.min()), float(np.percentile(values, 95))


def _levels(low: float, high: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    if not low < high:  # no surface, or a flat one
        low, high = (low - 0.5, low + 0.5) if low == high else (0.0, 1.0)
    return MaxNLocator(_LEVELS).tick_values(low, high)
