"""`analyze.py surface`: the error surface about the end of runs, with their trajectories (paper, figure 5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimclr_hub.analysis.entry import Analysis, folders_of, on_one_process
from slimclr_hub.analysis.files import check_settings, data_file, labels_of, stem_of
from slimclr_hub.analysis.landscape.directions import Directions
from slimclr_hub.analysis.landscape.figure import Panel, draw_planes, reach_of
from slimclr_hub.analysis.landscape.surface import ErrorMeasure, LossMeasure, Measure, grid, measure_surface, point_bar
from slimclr_hub.analysis.landscape.trajectory import NORMALISATIONS, Path2D, load_trajectory, path_of
from slimclr_hub.analysis.replay import Replay, recipe_of
from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.runs.tables import print_table
from slimclr_hub.settings import above, at_least, one_of

_QUANTITIES = ('full', 'total', 'error')


@dataclass(frozen=True)
class SurfaceConfig:
    """How error surfaces are measured and shown.

    Args:
        output: Folder of data and figure; `analysis` in the folder of the first run where null.
        quantity: Height of the surface. full: training loss of the full width, which is the same for all runs of a
            method; total: the loss that was trained, over all widths with their weights; error: 100 - accuracy of the
            full width, by k-NN where there is no classifier.
        resolution: Points along each direction, an odd number.
        batches: Training batches, of an optimizer step each, that a loss is averaged over.
        images: Validation images that an error is taken on, and training images that k-NN searches.
        reach: Largest coordinate along each of both directions; what all the trajectories need where null.
        normalise: filter: each filter of a direction is as long as that of the last weights; none: of norm 1.
    """

    output: str | None = None
    quantity: str = 'full'
    resolution: int = 21
    batches: int = 4
    images: int = 1024
    reach: tuple[float, float] | None = None
    normalise: str = 'filter'

    def __post_init__(self) -> None:
        one_of('quantity', self.quantity, _QUANTITIES)
        one_of('normalise', self.normalise, NORMALISATIONS)
        at_least('resolution', self.resolution, 3)
        at_least('batches', self.batches, 1)
        at_least('images', self.images, 1)
        if self.resolution % 2 == 0:
            raise InputError(
                f'resolution is {self.resolution}, which has no point at the origin; give {self.resolution + 1}'
            )
        for reach in self.reach or ():
            above('reach', reach, 0)


def analyse_surface(runs: Sequence[str], config: SurfaceConfig) -> None:
    """Measure the surfaces of runs, those points that are not there yet, and draw them."""
    on_one_process()
    folders = folders_of(runs)
    methods = [recipe_of(folder).method.name for folder in folders]
    if config.quantity != 'error' and len(set(methods)) > 1:
        named = ' and '.join(sorted(set(methods)))
        raise InputError(f'losses of {named} do not compare; give runs of one method, or --quantity error')
    trajectories = [load_trajectory(folder) for folder in folders]
    directions = [trajectory.directions(config.normalise) for trajectory in trajectories]
    paths = [
        path_of(str(folder), trajectory, found, config.normalise)
        for folder, trajectory, found in zip(folders, trajectories, directions, strict=True)
    ]
    reach = config.reach or reach_of(paths)
    kind = 'error-surface' if config.quantity == 'error' else 'loss-surface'
    stem = stem_of(kind, folders, config.output)
    settings = _settings(config, paths, reach)
    known = check_settings(data_file(stem), settings)
    if known is None:
        known = {'settings': settings, 'runs': _measure_all(config, paths, directions, reach, stem, settings)}
        write_text(data_file(stem), json.dumps(known, indent=1) + '\n')
        for partial in _partials(stem, len(folders)):
            partial.unlink()
    key, label = _height(config, methods[0], known['runs'])
    axes = [grid(each, config.resolution) for each in reach]
    panels = [
        Panel(name, path, (axes[0], axes[1]), run['values'][chosen])
        for name, path, run, chosen in zip(labels_of(folders), paths, known['runs'], key, strict=True)
    ]
    figure = stem if config.quantity != 'total' else stem.with_name(f'{stem.name}-total')
    draw_planes(panels, label, figure)
    _print_heights(panels, label)
    print(f'Figure: {figure}.png\nData: {stem}.json')


def _settings(config: SurfaceConfig, paths: Sequence[Path2D], reach: Sequence[float]) -> dict[str, Any]:
    amount = {'images': config.images} if config.quantity == 'error' else {'batches': config.batches}
    return {
        'runs': [path.run for path in paths],
        'steps': [list(path.steps) for path in paths],
        'resolution': config.resolution,
        'reach': list(reach),
        'normalise': config.normalise,
        **amount,
    }


def _partials(stem: Path, count: int) -> list[Path]:
    return [stem.with_name(f'{stem.name}.{number}.partial.jsonl') for number in range(count)]


def _measure_all(
    config: SurfaceConfig,
    paths: Sequence[Path2D],
    directions: Sequence[Directions],
    reach: Sequence[float],
    stem: Path,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    axes = [grid(each, config.resolution) for each in reach]
    results = []
    with point_bar(len(paths) * config.resolution**2) as bar:
        for path, found, partial in zip(paths, directions, _partials(stem, len(paths)), strict=True):
            replay = Replay(Path(path.run))
            replay.load(path.steps[-1])
            for note in _notes(replay):
                bar.write(note)
            measure: Measure = (
                ErrorMeasure(replay, config.images)
                if config.quantity == 'error'
                else LossMeasure(replay, config.batches)
            )
            plane = found.first, found.second
            own = {**settings, 'run': path.run}
            values = measure_surface(measure, plane, (axes[0], axes[1]), partial, own, bar.update)
            results.append({'path': path.as_json(), 'axes': axes, 'values': values})
    return results


def _notes(replay: Replay) -> list[str]:
    notes = list(replay.notes)
    if replay.step < replay.schedule.total_steps:
        notes.append(
            f'{replay.folder}: the last checkpoint is after step {replay.step} of {replay.schedule.total_steps}; the '
            'surface is about that one'
        )
    return notes


def _height(config: SurfaceConfig, method: str, runs: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """The quantity to draw of each run, and what the figure calls it."""
    if config.quantity == 'total':
        return ['loss'] * len(runs), 'training loss, all widths (nats)'
    loss = 'cross_entropy' if method == 'supervised' else 'info_nce'
    begin = 'error/' if config.quantity == 'error' else f'{loss}/'
    # A run of a narrower width alone has no full one.
    widest = [max((name for name in run['values'] if name.startswith(begin)), key=_width) for run in runs]
    if config.quantity == 'error':
        return widest, 'error (%)'
    return widest, 'cross-entropy (nats)' if method == 'supervised' else 'InfoNCE loss (nats)'


def _width(name: str) -> float:
    return float(name.partition('/')[2])


def _print_heights(panels: Sequence[Panel], label: str) -> None:
    from rich.table import Table

    table = Table(title=f'Surface: {label}')
    for title in 'run', 'origin', 'lowest', 'highest', 'explained (%)', 'offsets':
        table.add_column(title, justify='left' if title == 'run' else 'right', no_wrap=True)
    for panel in panels:
        assert panel.values is not None
        middle = len(panel.values) // 2
        heights = [value for row in panel.values for value in row if value is not None]
        centre = panel.values[middle][middle]
        path = panel.path
        table.add_row(
            panel.title,
            'not finite' if centre is None else f'{centre:.3f}',
            f'{min(heights):.3f}' if heights else '',
            f'{max(heights):.3f}' if heights else '',
            ', '.join(f'{100 * share:.1f}' for share in path.explained),
            ', '.join(f'{offset:.3g}' for offset in path.offsets),
        )
    print_table(table)


SURFACE = Analysis(
    SurfaceConfig, analyse_surface, 'RUN [RUN ...]', 'Error surface about the end of training, with the trajectory.'
)
