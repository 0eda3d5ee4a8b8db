"""`analyze trajectory`: weights of runs over training, in planes through their end (paper, section 4.4, figure 5).

Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, sections 4 and 7, https://arxiv.org/abs/1712.09913. A
point or direction is a mapping from tensor names to tensors. Biases and batch normalisation, whose tensors have one
dimension, take no part (their option `biasbn`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from slimclr_hub.analysis.base import Analysis, OutputOption, labels_of, output_stem, read_data, run_folders, write_data
from slimclr_hub.analysis.pca import principal_components
from slimclr_hub.analysis.replay import checkpoint_steps, recipe_of, saved_weights, slow_start_end, state_of
from slimclr_hub.errors import InputError
from slimclr_hub.runs.figures import marker, new_figure, save_figure
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import one_of, relevant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = Mapping[str, torch.Tensor]
"""Name -> tensor."""

NORMALISATIONS = ('none', 'filter')
_COLOURS = 'cividis'  # reads alike with and without red-green blindness
_PATH = '#D55E00'
_LEVELS = 20
_MARGIN = 1.1
_BACKBONE = 'backbone.'  # prefix of the trained network's tensors
_NEGLIGIBLE = 1e-9  # of the largest coordinate


def filter_normalise(direction: Weights, weights: Weights) -> dict[str, torch.Tensor]:
    """Scale each filter of a direction to the norm of the same filter of the weights: d <- d / |d| |w| (section 4).

    A filter makes one output channel, `weight[i]`. A filter of zeros stays so.
    """
    scaled = {}
    for name, d in direction.items():
        norms, lengths = (
            torch.linalg.vector_norm(tensor, dim=tuple(range(1, d.ndim)), keepdim=True)
            for tensor in (d, weights[name].to(d))
        )
        scaled[name] = d * torch.where(norms > 0, lengths / norms, 0.0)
    return scaled


def project(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Coordinates [T, 2] of a plane's points that are nearest to [T, D]; its directions need not be orthogonal."""
    gram = torch.stack([torch.stack([a.dot(b) for b in (first, second)]) for a in (first, second)])
    right = torch.stack([torch.stack([row.dot(first), row.dot(second)]) for row in rows])
    return torch.linalg.solve(gram, right.T).T


def _flat(point: Weights, names: Iterable[str]) -> torch.Tensor:
    return torch.cat([point[name].double().flatten() for name in names])


@dataclass(frozen=True)
class PlanePath:
    """A trajectory in its plane, as written to disk.

    Args:
        run: Folder of the run.
        steps: Optimizer steps of the points.
        epochs: The same in epochs.
        coordinates: Coordinates of each point along both directions, by least squares; 0 at the last.
        offsets: Largest distance from the last point along each direction; the paper reports the second (section 4.4).
        explained: Share of the variance of the points along each principal component.
        captured: Share of all squared distances from the last point in the plane.
        normalise: As in `Trajectory.plane`.
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
        slow_start: Epoch at which narrower widths begin to train; None for a run without slow start.
        points: Weights after each of `steps`, by their names within the backbone.
    """

    folder: Path
    steps: tuple[int, ...]
    steps_per_epoch: int
    slow_start: float | None
    points: Sequence[Weights]

    def plane(self, normalise: str) -> tuple[tuple[Weights, Weights], PlanePath]:
        """Return two directions from the last weights, and the trajectory along them.

        They are the first two principal components of [theta_1 - theta_n; ...; theta_n - theta_n] (section 7; the code
        of its authors has the last row, too). The components are those about the mean of the rows; coordinates are
        projections of the rows themselves, so that the last point is the origin. Along a component the first row that
        is not at zero is positive, so that all runs begin on the same side.

        Args:
            normalise: `filter` scales each filter of a component to the norm of the same filter of the last weights, so
                that a coordinate counts lengths of the weights. With `none` it is a distance between weights.

        Raises:
            InputError: Fewer than two points differ from the last one and each other.
        """
        end = self.points[-1]
        rows = torch.stack([_flat(point, end) for point in self.points]) - _flat(end, end)
        if len(rows) < 2 or (found := principal_components(rows)).ratios[1] == 0:
            raise InputError(
                f'{self.folder}: {len(rows)} points of a trajectory do not span a plane; train with '
                '--diagnostics.snapshots 20, or keep more checkpoints (--run.keep_checkpoints, --run.checkpoint_steps)'
            )
        directions = []
        for direction, way in zip(found.directions, found.projections.T, strict=True):
            sign = torch.sign(way[way.abs() > _NEGLIGIBLE * way.abs().max()][0])
            pieces = (sign * direction).split([tensor.numel() for tensor in end.values()])
            named = {name: piece.view_as(end[name]) for name, piece in zip(end, pieces, strict=True)}
            directions.append(filter_normalise(named, end) if normalise == 'filter' else named)
        first, second = (_flat(direction, end) for direction in directions)
        coordinates = project(rows, first, second)
        rest = (row - a * first - b * second for row, (a, b) in zip(rows, coordinates.tolist(), strict=True))
        path = PlanePath(
            run=str(self.folder),
            steps=self.steps,
            epochs=tuple(step / self.steps_per_epoch for step in self.steps),
            coordinates=tuple((a, b) for a, b in coordinates.tolist()),
            offsets=_pair(coordinates.abs().amax(0)),
            explained=_pair(found.ratios),
            captured=1 - sum(row.dot(row).item() for row in rest) / sum(row.dot(row).item() for row in rows),
            normalise=normalise,
            slow_start=self.slow_start,
        )
        return (directions[0], directions[1]), path


def _pair(values: torch.Tensor) -> tuple[float, float]:
    first, second = values.tolist()
    return first, second


def load_trajectory(folder: Path) -> Trajectory:
    """Read the weights of a run from its checkpoints and snapshots, up to its last checkpoint.

    Raises:
        InputError: There is no checkpoint, or a file cannot be read or holds another network.
    """
    checkpoints = checkpoint_steps(folder)
    if not checkpoints:
        raise InputError(f'{folder} has no checkpoint; give a run that has trained')
    last = checkpoints[-1]
    state = state_of(folder, last)
    files = {step: file for step, file in saved_weights(folder).items() if step <= last}
    points = [_read_weights(file) for file in files.values()]
    shapes = [{name: tensor.shape for name, tensor in point.items()} for point in points]
    for file, each in zip(files.values(), shapes, strict=True):
        if each != shapes[-1]:
            raise InputError(f'{file} does not hold the network that {folder} ends with; remove it')
    return Trajectory(folder, tuple(files), state['steps_per_epoch'], slow_start_end(recipe_of(folder)), points)


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, 'pt') as tensors:
            names = [name for name in tensors.keys() if name.startswith(_BACKBONE)]  # noqa: SIM118, no mapping
            found = {name.removeprefix(_BACKBONE): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f'{file} cannot be read ({error}); remove it') from error
    return {name: tensor for name, tensor in found.items() if tensor.ndim > 1}


@dataclass(frozen=True)
class Panel:
    """One run in its plane; a surface has values [B][A], and coordinates [A] and [B] along both directions."""

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

    `quantity` is the label of the surfaces' height, with its unit.
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


@dataclass(frozen=True)
class TrajectoryConfig(OutputOption):
    """Options of `analyze trajectory`.

    Args:
        normalise: Scale of the directions in the figure. none: norm 1, so that coordinates are distances between
            weights, like the paper's offsets; filter: each filter as long as that of the last weights.
    """

    normalise: str = 'none'

    def __post_init__(self) -> None:
        one_of('normalise', self.normalise, NORMALISATIONS)


def analyse_trajectory(runs: Sequence[str], config: TrajectoryConfig) -> None:
    """Write coordinates and figure of the trajectories of runs, and print their offsets."""
    folders = run_folders(runs)
    stem = output_stem('trajectory', folders, config.output)
    settings = {'runs': [str(folder) for folder in folders], **relevant(config)}
    read_data(stem, settings)
    paths: list[dict[str, PlanePath]] = []
    for folder in folders:
        trajectory = load_trajectory(folder)
        paths.append({how: trajectory.plane(how)[1] for how in NORMALISATIONS})
    found = [{how: asdict(path) for how, path in both.items()} for both in paths]
    write_data(stem, settings, trajectories=found)
    labels = labels_of(folders)
    panels = [Panel(label, both[config.normalise]) for label, both in zip(labels, paths, strict=True)]
    save_figure(planes_figure(panels, ''), stem)
    _table(labels, [both['none'] for both in paths]).print()
    print(f'Figure: {stem}.png\nData: {stem}.json')


def _table(labels: Sequence[str], paths: Sequence[PlanePath]) -> TextTable:
    first = paths[0].offsets[1]
    rows = [
        [
            label,
            str(len(path.steps)),
            ', '.join(f'{100 * share:.1f}' for share in path.explained),
            ', '.join(f'{distance:.3g}' for distance in path.offsets),
            '' if path is paths[0] else f'{100 * (path.offsets[1] / first - 1):+.1f} %',
        ]
        for label, path in zip(labels, paths, strict=True)
    ]
    return TextTable(
        'Trajectories of weights: largest distance from the end along the first two PCA components',
        ('run', 'saved weights', 'explained by 1st, 2nd (%)', 'distance along 1st, 2nd', "2nd over the first run's"),
        rows,
        ['Paper, section 4.4, 2nd: supervised 21.75 alone, 28.49 slimmable (+31.0 %); MoCo 13.26, 18.75 (+41.4 %).'],
    )


ANALYSIS = Analysis(
    TrajectoryConfig,
    analyse_trajectory,
    'RUN [RUN ...]',
    'Trajectories of the weights of runs over training, and their distances from the end.',
)
