"""Trajectories of weights over training, planes through their end, and their figures (paper, section 4.4, figure 5).

Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, sections 4 and 7, https://arxiv.org/abs/1712.09913. A
point or direction is a mapping from tensor names to tensors. Biases and batch normalisation, whose tensors have one
dimension, take no part (their option `biasbn`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from slimclr_hub.analysis.pca import principal_components
from slimclr_hub.analysis.replay import checkpoint_steps, recipe_of, saved_weights, slow_start_end
from slimclr_hub.errors import InputError
from slimclr_hub.runs.figures import marker, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = Mapping[str, torch.Tensor]
"""Name -> tensor."""

NORMALISATIONS = ('filter', 'none')
_COLOURS = 'cividis'  # reads alike with and without red-green blindness
_PATH = '#D55E00'
_LEVELS = 20
_MARGIN = 1.1
_BACKBONE = 'backbone.'  # prefix of the trained network's tensors
_NEGLIGIBLE = 1e-9  # of the largest coordinate


@dataclass(frozen=True)
class Directions:
    """Two directions from an origin, and the coordinates of other points in their plane.

    Args:
        first: First direction, float64 tensors.
        second: Second direction, likewise.
        explained: Share of the points' squared distances from the origin along each principal component.
        coordinates: Coordinates of the points, float64 [T, 2], by least squares.
        captured: Share of the squared distances in the plane.
    """

    first: Weights
    second: Weights
    explained: tuple[float, float]
    coordinates: torch.Tensor
    captured: float

    @property
    def offsets(self) -> tuple[float, float]:
        """Largest distance from the origin along each direction; the paper reports the second (section 4.4)."""
        largest = self.coordinates.abs().amax(0)
        return largest[0].item(), largest[1].item()


def find_directions(points: Sequence[Weights], origin: Weights, filter_normalised: bool) -> Directions:
    """Compute the principal components of a trajectory, and its coordinates along them.

    Args:
        points: Weights over training; at least two differ from the origin.
        origin: The final weights.
        filter_normalised: Scale each filter of a component to the norm of the same filter of `origin`, so that a
            coordinate counts lengths of the weights. Otherwise it is a distance between weights.

    Raises:
        InputError: Fewer than two points differ from the origin and each other.
    """
    offsets = [offset(point, origin) for point in points]
    (first, second), explained = principal_directions(offsets)
    if filter_normalised:
        first, second = filter_normalise(first, origin), filter_normalise(second, origin)
    coordinates = project(offsets, first, second)
    total = sum(_dot(each, each) for each in offsets)
    rest = 0.0
    for each, (a, b) in zip(offsets, coordinates.tolist(), strict=True):
        left = {name: tensor - a * first[name] - b * second[name] for name, tensor in each.items()}
        rest += _dot(left, left)
    return Directions(first, second, explained, coordinates, 1 - rest / total)


def _takes_part(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1


def offset(point: Weights, origin: Weights) -> dict[str, torch.Tensor]:
    """Return `point` - `origin` in the weights of convolutions and linear layers, float64."""
    return {name: point[name].double() - tensor.double() for name, tensor in origin.items() if _takes_part(tensor)}


def filter_normalise(direction: Weights, weights: Weights) -> dict[str, torch.Tensor]:
    """Scale each filter of a direction to the norm of the same filter of the weights: d <- d / |d| |w| (section 4).

    Args:
        direction: Any direction. A filter of zeros stays so.
        weights: The point from which it starts. A filter makes one output channel, `weight[i]`.

    Returns:
        The tensors of more than one dimension; missing tensors count as zero.
    """
    scaled = {}
    for name, d in direction.items():
        if not _takes_part(d):
            continue
        w = weights[name].to(d)
        axes = tuple(range(1, d.ndim))
        norms = torch.linalg.vector_norm(d, dim=axes, keepdim=True)
        scale = torch.where(norms > 0, torch.linalg.vector_norm(w, dim=axes, keepdim=True) / norms, 0.0)
        scaled[name] = d * scale
    return scaled


def principal_directions(offsets: Sequence[Weights]) -> tuple[list[dict[str, torch.Tensor]], tuple[float, float]]:
    """First two principal components of the matrix [theta_1 - theta_n; ...; theta_{n-1} - theta_n] (section 7).

    The origin is the final point, not the mean of the rows, which scikit-learn's PCA (and so the code of the authors of
    that paper) subtracts: about the mean, the plane need not follow the way to the minimum, and offsets would not be
    offsets from the minimum. Along a component the first row that is not at zero is positive, so that all runs begin on
    the same side.

    Args:
        offsets: Rows from `offset`; the final point's own row of zeros changes nothing.

    Returns:
        Both components, each of norm 1 over all tensors, and their shares of the sum of squares.

    Raises:
        InputError: The rows do not span a plane.
    """
    rows = torch.stack([_flat(row) for row in offsets]) if offsets else torch.zeros(0, 1)
    found = principal_components(rows, 2, torch.zeros(rows.shape[1])) if len(rows) > 1 else None
    if found is None or found.ratios[1] == 0:
        raise InputError(
            f'{len(offsets)} points of a trajectory do not span a plane; train with --diagnostics.snapshots 20, or '
            'keep more checkpoints (--run.keep_checkpoints, --run.checkpoint_steps)'
        )
    components = []
    for direction, path in zip(found.directions, found.projections.T, strict=True):
        sign = torch.sign(path[path.abs() > _NEGLIGIBLE * path.abs().max()][0])
        pieces = (sign * direction).split([tensor.numel() for tensor in offsets[0].values()])
        named = zip(offsets[0].items(), pieces, strict=True)
        components.append({name: piece.reshape(tensor.shape) for (name, tensor), piece in named})
    return components, (found.ratios[0].item(), found.ratios[1].item())


def project(offsets: Sequence[Weights], first: Weights, second: Weights) -> torch.Tensor:
    """Coordinates [T, 2] of the nearest points of a plane; its directions need not be orthogonal."""
    ab = _dot(first, second)
    gram = torch.tensor([[_dot(first, first), ab], [ab, _dot(second, second)]], dtype=torch.float64)
    right = torch.tensor([[_dot(row, first), _dot(row, second)] for row in offsets], dtype=torch.float64)
    return torch.linalg.solve(gram, right.T).T


def _flat(point: Weights) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in point.values()])


def _dot(a: Weights, b: Weights) -> float:
    return torch.dot(_flat(a), _flat(b)).item()


@dataclass(frozen=True)
class Trajectory:
    """Weights of a run over training.

    They are the convolutions (in supervised training also the classifier) of the trained backbone at full size, which
    holds all widths; in contrastive methods it is the query encoder's. Biases and batch normalisation, of which each
    width has its own, and projection heads are left out.

    Args:
        folder: Folder of the run.
        steps: Optimizer steps after which the weights were saved, in ascending order.
        steps_per_epoch: Optimizer steps in an epoch.
        points: Weights after each of `steps`, by their names within the backbone.
    """

    folder: Path
    steps: tuple[int, ...]
    steps_per_epoch: int
    points: list[dict[str, Any]]

    @property
    def origin(self) -> Weights:
        """The last weights, from which offsets are taken."""
        return self.points[-1]

    def directions(self, normalise: str) -> Directions:
        """Principal components of the trajectory about its end, and its coordinates along them.

        Args:
            normalise: `filter` scales each filter of a component to the norm of the same filter of the last weights;
                `none` does not.

        Raises:
            InputError: There are too few points.
        """
        try:
            return find_directions(self.points, self.origin, normalise == 'filter')
        except InputError as error:
            raise InputError(f'{self.folder}: {error}') from error


@dataclass(frozen=True)
class PlanePath:
    """A trajectory in its plane, as written to disk.

    Args:
        run: Folder of the run.
        steps: Optimizer steps of the points.
        epochs: The same in epochs.
        coordinates: Coordinates of each point along both directions; 0 at the last.
        offsets: Largest distance from the last point along each direction.
        explained: Share of all squared distances from the last point along each principal component.
        captured: Share of them in the plane.
        normalise: As in `Trajectory.directions`.
        slow_start: Epoch at which narrower widths begin to train; None for a run without slow start.
    """

    run: str
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    coordinates: tuple[tuple[float, float], ...]
    offsets: tuple[float, float]
    explained: tuple[float, float]
    captured: float
    normalise: str
    slow_start: float | None = None


def load_trajectory(folder: Path) -> Trajectory:
    """Read the weights of a run from its checkpoints and snapshots, up to its last checkpoint.

    Raises:
        InputError: There is no checkpoint, or a file cannot be read or holds another network.
    """
    checkpoints = checkpoint_steps(folder)
    if not checkpoints:
        raise InputError(f'{folder} has no checkpoint; give a run that has trained')
    last = checkpoints[-1]
    state = json.loads((folder / 'checkpoints' / f'step-{last:08d}' / 'state.json').read_text())
    files = {step: file for step, file in saved_weights(folder).items() if step <= last}
    points = [_read_weights(file) for file in files.values()]
    shapes = [{name: tensor.shape for name, tensor in point.items()} for point in points]
    for file, each in zip(files.values(), shapes, strict=True):
        if each != shapes[-1]:
            raise InputError(f'{file} does not hold the network that {folder} ends with; remove it')
    return Trajectory(folder, tuple(files), state['steps_per_epoch'], points)


def _read_weights(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, 'pt') as tensors:
            names = [name for name in tensors.keys() if name.startswith(_BACKBONE)]  # noqa: SIM118, no mapping
            found = {name.removeprefix(_BACKBONE): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f'{file} cannot be read ({error}); remove it') from error
    return {name: tensor for name, tensor in found.items() if _takes_part(tensor)}


def plane_path(trajectory: Trajectory, directions: Directions, normalise: str) -> PlanePath:
    """Summarise a trajectory in the plane of its directions."""
    return PlanePath(
        run=str(trajectory.folder),
        steps=trajectory.steps,
        epochs=tuple(step / trajectory.steps_per_epoch for step in trajectory.steps),
        coordinates=tuple((a, b) for a, b in directions.coordinates.tolist()),
        offsets=directions.offsets,
        explained=directions.explained,
        captured=directions.captured,
        normalise=normalise,
        slow_start=slow_start_end(recipe_of(trajectory.folder)),
    )


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
    surfaces = [np.ma.masked_invalid(np.array(panel.values, float)) for panel in panels if panel.values is not None]
    figure, axes = new_figure(len(panels), 2 if surfaces else 1, width=5.4, height=4.4)
    reach = reach_of([panel.path for panel in panels])
    last = max(panel.path.epochs[-1] for panel in panels)
    for i, panel in enumerate(panels):
        axis, path = axes[i - len(panels)], panel.path
        axes[i].set_title(panel.title)
        if surfaces:
            _draw_surface(figure, axes[i], axis, panel, surfaces[i], _levels(surfaces), quantity)
        else:
            axis.set_xlim(-reach[0], reach[0])
            axis.set_ylim(-reach[1], reach[1])
            along, across = zip(*path.coordinates, strict=True)
            style: dict[str, Any] = {'cmap': _COLOURS, 's': 36, 'zorder': 2.5, 'edgecolor': 'black'}
            # One scale of epochs for all panels.
            dots = axis.scatter(along, across, c=path.epochs, vmin=0, vmax=last, **style)
            figure.colorbar(dots, ax=axis, label='epoch')
        _draw_path(axis, path)
        scale = 'filter-normalised' if path.normalise == 'filter' else 'distance of weights'
        first, second = (f'{100 * share:.1f} % explained\n({scale})' for share in path.explained)
        axis.set_xlabel(f'1st PCA component, {first}')
        axis.set_ylabel(f'2nd PCA component, {second}')
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


def _draw_surface(
    figure: Any, raised: Any, flat: 'Axes', panel: Panel, values: Any, levels: Any, quantity: str
) -> None:
    """Draw contours in the panel `flat`, and the surface in perspective in the place of the panel `raised`."""
    assert panel.axes is not None
    along, across = panel.axes
    low, high = levels[0], levels[-1]
    flat.grid(False)
    filled = flat.contourf(along, across, values, levels=levels, cmap=_COLOURS, extend='both')
    flat.contour(along, across, values, levels=levels, colors='white', linewidths=0.4, alpha=0.6)
    figure.colorbar(filled, ax=flat, label=quantity)
    flat.set_xlim(min(along), max(along))
    flat.set_ylim(min(across), max(across))
    raised.remove()
    axis = figure.add_subplot(raised.get_subplotspec(), projection='3d')
    style: dict[str, Any] = {'cmap': _COLOURS, 'rstride': 1, 'cstride': 1, 'linewidth': 0.1, 'edgecolor': 'k'}
    heights = np.clip(np.ma.filled(values, high), low, high)
    axis.plot_surface(*np.meshgrid(along, across), heights, vmin=low, vmax=high, **style)
    axis.set_zlim(low, high)
    axis.view_init(elev=35, azim=-60)
    axis.set_title(panel.title)
    axis.set_xlabel('1st direction', labelpad=6)
    axis.set_ylabel('2nd direction', labelpad=10)
    axis.set_zlabel(quantity)


def _levels(surfaces: Sequence[Any]) -> Any:
    """Levels of all surfaces up to the 95th percentile: steep corners go beyond the colours."""
    from matplotlib.ticker import MaxNLocator

    found = [values.compressed() for values in surfaces]
    low, high = min(values.min() for values in found), max(np.percentile(values, 95) for values in found)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return MaxNLocator(_LEVELS).tick_values(low, high)
