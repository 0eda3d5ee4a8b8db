"""`analyze gradients`: gradient imbalance and gradient direction divergence (paper, section 3.2, figures 3 and 4)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from slimclr_hub.analysis.base import Analysis, OutputOption, labels_of, read_data, run_folders, write_data
from slimclr_hub.analysis.pca import Components, principal_components
from slimclr_hub.analysis.replay import Replay, checkpoint_steps, recipe_of, slow_start_end, state_of
from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.models.widths import check_widths
from slimclr_hub.runs.figures import line_style, mark_slow_start, marker, new_figure, save_figure
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import at_least, relevant
from slimclr_hub.train.diagnostics import NormRecord, Records, last_linear, layer_slices, mean_norms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = (
    *('run', 'step', 'epoch', 'slow_start'),
    *('smallest', 'all', 'rest', 'all_ratio', 'rest_ratio'),
    *('pc1', 'pc2', 'direction1', 'direction2'),
)
_MIN_GRADIENTS = 3  # of the last layer, for two principal components
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


@dataclass(frozen=True)
class RunGradients:
    """Gradients of one run over its training.

    Args:
        name: Name of the run.
        slow_start: Epoch at which narrower widths begin to train; None for a run without slow start.
        steps_per_epoch: Optimizer steps in an epoch.
        norms: Gradient norms, in order of steps.
        norms_from: `records` of the run, or its `checkpoints`.
        steps: [N], steps of `gradients`, in order.
        gradients: [N, D], gradients of the last linear layer.
        gradients_from: As `norms_from`.
        notes: Sentences for the reader.
    """

    name: str
    slow_start: float | None
    steps_per_epoch: int
    norms: list[NormRecord]
    norms_from: str
    steps: torch.Tensor
    gradients: torch.Tensor
    gradients_from: str
    notes: tuple[str, ...] = ()

    def in_slow_start(self, step: int) -> bool:
        """True if the step after `step` trains the full width alone."""
        return self.slow_start is not None and step < self.slow_start * self.steps_per_epoch


def gradients_of(folder: Path, options: GradientsConfig) -> RunGradients:
    """Read the gradients that a run recorded; compute those of its checkpoints' next steps if it recorded none.

    Raises:
        InputError: There are too few records and checkpoints, or the checkpoints do not fit the run.
    """
    config, smallest = recipe_of(folder), options.smallest
    norms: list[NormRecord] = []
    steps, gradients = torch.zeros(0), torch.zeros(0, 0)
    if not options.from_checkpoints:
        norms, (steps, gradients) = Records(folder).norms(), Records(folder).gradients()
    # In float16 a step may overflow; the optimizer skips it, after its gradients were recorded.
    kept, finite = [record for record in norms if isfinite(record.all)], gradients.isfinite().all(1)
    notes: tuple[str, ...] = ()
    if lost := len(norms) - len(kept) + int((~finite).sum()):
        notes = (f'{folder.name}: {lost} records whose gradient is not finite are left out',)
    norms, steps, gradients = kept, steps[finite], gradients[finite]
    if smallest is not None and any(record.width != smallest for record in norms):
        raise InputError(
            f'{folder} has recorded the share of width {norms[0].width:g}, not of {smallest:g}; drop --smallest, or '
            'give --from_checkpoints true'
        )
    recorded_norms, recorded_gradients = bool(norms), len(steps) >= _MIN_GRADIENTS
    if not (recorded_norms and recorded_gradients):
        if (count := len(checkpoint_steps(folder))) < _MIN_GRADIENTS:
            raise InputError(
                f'{folder} has recorded too few gradients, and has {count} checkpoints; train with --diagnostics.every '
                f'10 --diagnostics.gradients 10, or keep {_MIN_GRADIENTS} checkpoints or more by run.keep_checkpoints'
            )
        diagnostics = replace(config.diagnostics, smallest=smallest or config.diagnostics.smallest)
        width = diagnostics.smallest_of(config.model.widths, config.model.overlap)
        replayed, *others, replay_notes = _replay_gradients(Replay(folder), width, options.batches)
        norms, notes = norms or replayed, (*notes, *replay_notes)
        if not recorded_gradients:
            steps, gradients = others
    return RunGradients(
        name=folder.name,
        slow_start=slow_start_end(config),
        steps_per_epoch=_steps_per_epoch(folder),
        norms=norms,
        norms_from='records' if recorded_norms else 'checkpoints',
        steps=steps,
        gradients=gradients,
        gradients_from='records' if recorded_gradients else 'checkpoints',
        notes=notes,
    )


def _replay_gradients(
    replay: Replay, smallest: float, batches: int
) -> tuple[list[NormRecord], torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Norms, steps [N], gradients of the last layer [N, D] and notes of all checkpoints."""
    layers, last = layer_slices(replay.method, smallest), last_linear(replay.method)
    norms, gradients = [], []
    notes: dict[str, None] = {}
    for step in tqdm(replay.steps, desc=f'{replay.folder.name}: checkpoints', unit='checkpoint', dynamic_ncols=True):
        replay.load(step)
        replay.losses(replay.next_steps(batches), backward=True)
        within, total, rest = mean_norms(layers).tolist()
        norms.append(NormRecord(step, smallest, within, total, rest, len(replay.schedule.widths_at(step))))
        assert last.grad is not None
        gradients.append(last.grad.flatten().cpu())
        notes |= dict.fromkeys(replay.notes)
    return norms, torch.tensor(replay.steps), torch.stack(gradients), tuple(notes)


def _steps_per_epoch(folder: Path) -> int:
    # A checkpoint tells it without the images.
    for step in checkpoint_steps(folder):
        return state_of(folder, step)['steps_per_epoch']
    return Replay(folder).schedule.steps_per_epoch


@dataclass(frozen=True)
class Phase:
    """Means over a run's slow start, over the epochs after it, or over all epochs of a run without slow start.

    Args:
        name: `all`, or `before S` and `after S`.
        norms: Steps with gradient norms.
        all_ratio: Norm of the whole gradient over that of the smallest width's slice (Fig. 3).
        rest_ratio: Norm of the rest over that of the smallest width's slice (Fig. 3).
        gradients: Steps with a gradient of the last layer.
        length: Norm of the last layer's gradient.
        consecutive: Cosine of one gradient and the next.
        pairwise: Cosine of all pairs: 1 if all have one direction, 0 if they have none in common.
        explained: Share of the variance of these gradients, each of unit length, along their first and second principal
            component; nan for fewer than three.
    """

    name: str
    norms: int
    all_ratio: float
    rest_ratio: float
    gradients: int
    length: float
    consecutive: float
    pairwise: float
    explained: tuple[float, float]


def phases(run: RunGradients) -> list[Phase]:
    """Summarise the phases of a run that have at least one step."""
    found = []
    names = {'all': None} if run.slow_start is None else {'before S': True, 'after S': False}
    for name, slow in names.items():
        records = [record for record in run.norms if slow in (None, run.in_slow_start(record.step))]
        chosen = [slow in (None, run.in_slow_start(step)) for step in run.steps.tolist()]
        gradients = run.gradients[torch.tensor(chosen, dtype=torch.bool)]
        consecutive, pairwise = mean_cosines(gradients)
        few = len(gradients) < _MIN_GRADIENTS
        first, second = (nan, nan) if few else components(gradients, unit_length=True).ratios.tolist()
        found.append(
            Phase(
                name=name,
                norms=len(records),
                all_ratio=_mean([record.all_ratio for record in records]),
                rest_ratio=_mean([record.rest_ratio for record in records]),
                gradients=len(gradients),
                length=_mean(gradients.norm(dim=1).tolist()),
                consecutive=consecutive,
                pairwise=pairwise,
                explained=(first, second),
            )
        )
    return [phase for phase in found if phase.norms or phase.gradients]


def components(gradients: torch.Tensor, unit_length: bool = False) -> Components:
    """First two principal components of gradients [N, D] (paper, Fig. 4).

    With `unit_length` every step counts alike, and the length of a projection is the share of the direction that lies
    in the plane. Otherwise, as in the paper, large gradients decide on the plane, and projections show sizes, too.
    """
    rows = gradients.double()
    return principal_components(F.normalize(rows, dim=1) if unit_length else rows)


def mean_cosines(gradients: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of consecutive rows of [N, D], and of all pairs; nan for fewer than two rows."""
    if len(gradients) < 2:
        return nan, nan
    rows = F.normalize(gradients.double(), dim=1)
    cosines = rows @ rows.T
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    return cosines.diagonal(1).mean().item(), cosines[pairs].mean().item()


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value)]
    return fmean(finite) if finite else nan


def analyse_gradients(runs: Sequence[str], config: GradientsConfig) -> None:
    """Write gradients.csv, gradients.json and three figures of runs, and print a table.

    Raises:
        InputError: A run has no gradients, or the folder has results of other settings.
    """
    folders = run_folders(runs)
    output = Path(config.output) if config.output is not None else folders[0] / 'analysis'
    settings = {'runs': [str(folder) for folder in folders], **relevant(config)}
    read_data(output / 'gradients', settings)
    found = [
        replace(gradients_of(folder, config), name=label)
        for folder, label in zip(folders, labels_of(folders), strict=True)
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
    """Draw ratios of gradient norms over epochs, one panel per run (paper, Fig. 3)."""
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
