"""`analyze gradients`: gradient imbalance and gradient direction divergence (paper, section 3.2, figures 3 and 4)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimclr_hub.analysis.base import Analysis, OutputOption, read_data, run_folders, write_data
from slimclr_hub.analysis.run_gradients import RunGradients, components, gradients_of, phases
from slimclr_hub.files import write_text
from slimclr_hub.models.widths import check_widths
from slimclr_hub.runs.figures import line_style, mark_slow_start, marker, new_figure, save_figure
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import at_least, relevant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = (
    *('run', 'step', 'epoch', 'slow_start'),
    *('smallest', 'all', 'rest', 'all_ratio', 'rest_ratio'),
    *('pc1', 'pc2', 'direction1', 'direction2'),
)
_PHASES = {'all': 'all', 'before S': 'slow start', 'after S': 'after slow start'}
_PANELS = 3  # side by side
_MANY = 100  # points from which on a line is smoothed, and arrows are heads alone
_FAINTEST = 0.25


@dataclass(frozen=True)
class GradientsConfig(OutputOption):
    """Options of `analyze gradients`.

    Args:
        from_checkpoints: Use the next step of every checkpoint even if the run has recorded its gradients.
        batches: Batches over which the gradient of a checkpoint is averaged.
        smallest: Width whose share of the gradient is measured; the run's diagnostics.smallest by default.
    """

    from_checkpoints: bool = False
    batches: int = 1
    smallest: float | None = None

    def __post_init__(self) -> None:
        at_least('batches', self.batches, 1)
        if self.smallest is not None:
            check_widths([self.smallest])


def analyse_gradients(runs: Sequence[str], config: GradientsConfig) -> None:
    """Write gradients.csv, gradients.json and three figures of runs, and print a table.

    Raises:
        InputError: A run has no gradients, or the folder has results of other settings.
    """
    folders = run_folders(runs)
    output = Path(config.output) if config.output is not None else folders[0] / 'analysis'
    settings = {'runs': [str(folder.resolve()) for folder in folders], **relevant(config)}
    read_data(output / 'gradients', settings)
    found = [
        gradients_of(
            folder,
            smallest=config.smallest,
            batches=config.batches,
            from_checkpoints=config.from_checkpoints,
        )
        for folder in folders
    ]
    draw_imbalance(found, output / 'gradient_imbalance')
    draw_divergence(found, output / 'gradient_divergence')
    draw_divergence(found, output / 'gradient_directions', unit_length=True)
    write_text(output / 'gradients.csv', _csv(found))
    write_data(output / 'gradients', settings, environment=environment(), runs=[_summary(run) for run in found])
    _table(found).print()
    names = ('gradient_imbalance', 'gradient_divergence', 'gradient_directions')
    print(f'Figures: {", ".join(str(output / f"{name}.png") for name in names)}')


def _csv(runs: Sequence[RunGradients]) -> str:
    """One line per run and step: norms, ratios, and projections of the last layer's gradient and its direction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(_COLUMNS)
    for run in runs:
        norms = {record.step: record for record in run.norms}
        planes = [components(run.gradients, unit_length).projections for unit_length in (False, True)]
        projections = dict(zip(run.steps.tolist(), torch.cat(planes, 1).tolist(), strict=True))
        for step in sorted({*norms, *projections}):
            record = norms.get(step)
            values = (record.smallest, record.all, record.rest, record.all_ratio, record.rest_ratio) if record else ()
            writer.writerow(
                [
                    *(run.name, step, f'{step / run.steps_per_epoch:.6g}', int(run.in_slow_start(step))),
                    *(values or [''] * 5),
                    *projections.get(step, [''] * 4),
                ]
            )
    return text.getvalue()


def _summary(run: RunGradients) -> dict[str, Any]:
    return {
        'name': run.name,
        'smallest': run.norms[0].width,
        'norms_from': run.norms_from,
        'gradients_from': run.gradients_from,
        'slow_start_epochs': run.slow_start,
        'explained': components(run.gradients).ratios.tolist(),
        'explained_directions': components(run.gradients, unit_length=True).ratios.tolist(),
        'phases': [{key: _finite(value) for key, value in asdict(phase).items()} for phase in phases(run)],
        'notes': run.notes,
    }


def _finite(value: Any) -> Any:
    """Replace nan, which JSON lacks, by None."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _table(runs: Sequence[RunGradients]) -> TextTable:
    headers = (
        *('run', 'epochs', 'steps', 'norm, all over smallest width', 'norm, rest over smallest width'),
        *('norm, last layer', 'cosine to next step', 'cosine of all pairs'),
    )
    rows = [
        [
            *(run.name, _PHASES[phase.name], str(phase.norms), f'{phase.all_ratio:.2f}', f'{phase.rest_ratio:.2f}'),
            *(f'{phase.length:.2g}', f'{phase.consecutive:.2f}', f'{phase.pairwise:.2f}'),
        ]
        for run in runs
        for phase in phases(run)
    ]
    notes = dict.fromkeys(f'Note: {note}' for run in runs for note in run.notes)
    title = 'Gradients: imbalance of norms (Fig. 3), and divergence of the last layer (Fig. 4)'
    return TextTable(title, headers, rows, [*notes], names=2)


def draw_imbalance(runs: Sequence[RunGradients], path: Path) -> None:
    """Draw ratios of gradient norms over epochs, one panel per run (paper, Fig. 3).

    Args:
        runs: Runs with norms.
        path: PNG and PDF to write, without suffix.
    """
    figure, axes = _panels(len(runs), width=4.6, height=3.6)
    highest = max(value for run in runs for record in run.norms for value in (record.all_ratio, 1) if isfinite(value))
    for axis, run in zip(axes, runs, strict=True):
        width = run.norms[0].width
        epochs = [record.step / run.steps_per_epoch for record in run.norms]
        _draw_ratio(axis, epochs, [record.all_ratio for record in run.norms], f'all / width {width:g}', 0)
        _draw_ratio(axis, epochs, [record.rest_ratio for record in run.norms], f'rest / width {width:g}', 1)
        axis.axhline(1, color='0.3', linewidth=0.9)
        mark_slow_start(axis, run.slow_start or 0)
        axis.set_ylim(0, 1.35 * highest)  # one scale for all panels, with room for the legend
        axis.set_xlim(left=0)
        axis.set_xlabel('epoch')
        axis.set_ylabel('ratio of gradient norms')
        axis.set_title(run.name, fontsize='medium')
        axis.legend(fontsize='small', loc='upper right')
    save_figure(figure, path)


def draw_divergence(runs: Sequence[RunGradients], path: Path, unit_length: bool = False) -> None:
    """Draw the last linear layer's gradients in the plane of their first two principal components (paper, Fig. 4).

    Each step is an arrow, the later the darker; of many only the heads are drawn. At unit length an arrow reaches the
    circle if its direction lies in the plane.

    Args:
        runs: Runs with gradients.
        path: PNG and PDF to write, without suffix.
        unit_length: Draw directions alone, as in `components`.
    """
    figure, axes = _panels(len(runs), width=4.2, height=4.4)
    for axis, run in zip(axes, runs, strict=True):
        found = components(run.gradients, unit_length)
        points, steps = found.projections.numpy(), run.steps.numpy()
        darkness = _FAINTEST + (1 - _FAINTEST) * np.linspace(0, 1, len(steps))
        slow = np.array([run.in_slow_start(step) for step in steps.tolist()])
        names = ('all epochs', '') if run.slow_start is None else (f'from epoch {run.slow_start:g} on', 'slow start')
        for i, (name, chosen) in reversed([*enumerate(zip(names, (~slow, slow), strict=True))]):
            if chosen.any():
                _draw_arrows(axis, points[chosen], darkness[chosen], name, i, heads_only=len(steps) >= _MANY)
        reach = 1 if unit_length else np.abs(points).max() or 1
        if unit_length:
            angles = np.linspace(0, 2 * np.pi, 200)
            axis.plot(np.cos(angles), np.sin(angles), color='0.6', linewidth=0.8)
        axis.set_aspect('equal')
        axis.set_xlim(-1.1 * reach, 1.1 * reach)
        axis.set_ylim(-1.45 * reach, 1.1 * reach)  # room for the legend
        first, second = (f'{100 * ratio:.0f} %' for ratio in found.ratios.tolist())
        axis.set_xlabel(f'first principal component ({first})')
        axis.set_ylabel(f'second principal component ({second})')
        axis.set_title(run.name, fontsize='medium')
        axis.legend(fontsize='small', loc='lower center')
    title = 'directions of gradients, the later the darker;\non the circle: all of it in this plane'
    figure.suptitle(title if unit_length else 'gradients, the later the darker', fontsize='small')
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
    """Mean over up to `count` values on either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    indices = np.arange(len(values))
    reach = np.minimum(np.minimum(indices, indices[::-1]), count)
    return (sums[indices + reach + 1] - sums[indices - reach]) / (2 * reach + 1)


def _panels(count: int, width: float, height: float) -> 'tuple[Figure, list[Axes]]':
    columns = min(count, _PANELS)
    figure, axes = new_figure(columns, -(-count // columns), width=width, height=height)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


ANALYSIS = Analysis(
    GradientsConfig,
    analyse_gradients,
    'RUN [RUN ...]',
    'Gradient imbalance and gradient direction divergence of runs, from what they recorded (`diagnostics:` in the '
    'recipe) or from their checkpoints.',
)
