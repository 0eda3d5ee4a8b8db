"""Gradient imbalance and gradient direction divergence of runs (paper, section 3.2, figures 3 and 4)."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from slimclr_hub.analysis.entry import Analysis, folders_of, on_one_process
from slimclr_hub.analysis.files import check_settings
from slimclr_hub.analysis.gradients.data import RunGradients, gradients_of
from slimclr_hub.analysis.gradients.figures import draw_divergence, draw_imbalance
from slimclr_hub.analysis.gradients.summary import components, phases
from slimclr_hub.files import write_text
from slimclr_hub.models.widths import check_widths
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import print_table
from slimclr_hub.settings import at_least

_DATA = 'gradients'
_COLUMNS = (
    *('run', 'step', 'epoch', 'slow_start'),
    *('smallest', 'all', 'rest', 'all_ratio', 'rest_ratio'),
    *('pc1', 'pc2', 'direction1', 'direction2'),
)


@dataclass(frozen=True)
class GradientsConfig:
    """How gradients are analysed.

    Args:
        output: Folder of figures and data; `analysis` in the folder of the first run where null.
        from_checkpoints: Use the next step of every checkpoint even where the run has recorded its gradients.
        batches: Batches to average the gradient of a checkpoint over.
        smallest: Width whose share of the gradient is measured; diagnostics.smallest of the run where null.
    """

    output: str | None = None
    from_checkpoints: bool = False
    batches: int = 1
    smallest: float | None = None

    def __post_init__(self) -> None:
        at_least('batches', self.batches, 1)
        if self.smallest is not None:
            check_widths([self.smallest])


def analyse_gradients(runs: Sequence[str], config: GradientsConfig) -> None:
    """Measure, write gradients.csv, gradients.json and three figures, and print a table.

    Raises:
        InputError: A run has nothing to measure, or there are results of another analysis.
    """
    on_one_process()
    folders = folders_of(runs)
    output = Path(config.output) if config.output is not None else folders[0] / 'analysis'
    settings = {'runs': [str(folder.resolve()) for folder in folders], **asdict(config), 'output': None}
    check_settings(output / f'{_DATA}.json', settings)
    found = [
        gradients_of(
            folder,
            smallest=config.smallest,
            batches=config.batches,
            from_checkpoints=config.from_checkpoints,
        )
        for folder in folders
    ]
    output.mkdir(parents=True, exist_ok=True)
    draw_imbalance(found, output / 'gradient_imbalance')
    draw_divergence(found, output / 'gradient_divergence')
    draw_divergence(found, output / 'gradient_directions', unit_length=True)
    write_text(output / f'{_DATA}.csv', _rows(found))
    summary = {
        'settings': settings,
        'environment': environment(),
        'runs': [_summary(run) for run in found],
    }
    write_text(output / f'{_DATA}.json', json.dumps(summary, indent=2) + '\n')
    _print_table(found)
    for note in dict.fromkeys(note for run in found for note in run.notes):
        print(f'Note: {note}')
    names = ('gradient_imbalance', 'gradient_divergence', 'gradient_directions')
    print(f'Figures: {", ".join(str(output / f"{name}.png") for name in names)}')


def _rows(runs: Sequence[RunGradients]) -> str:
    """A line for each run and step: norms, ratios, and projections of the last layer's gradient and its direction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(_COLUMNS)
    for run in runs:
        norms = {record.step: record for record in run.norms}
        planes = components(run).projections, components(run, unit_length=True).projections
        places = dict(zip(run.steps.tolist(), torch.cat(planes, 1).tolist(), strict=True))
        for step in sorted({*norms, *places}):
            record = norms.get(step)
            values = (record.smallest, record.all, record.rest, record.all_ratio, record.rest_ratio) if record else ()
            writer.writerow(
                [
                    run.name,
                    step,
                    f'{step / run.steps_per_epoch:.6g}',
                    int(run.starts_slowly(step)),
                    *(values or [''] * 5),
                    *places.get(step, [''] * 4),
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
        'explained': components(run).ratios.tolist(),
        'explained_directions': components(run, unit_length=True).ratios.tolist(),
        'phases': [{key: _plain(value) for key, value in asdict(phase).items()} for phase in phases(run)],
        'notes': run.notes,
    }


def _plain(value: Any) -> Any:
    """None in the place of nan, which JSON does not have."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _print_table(runs: Sequence[RunGradients]) -> None:
    from rich.table import Table

    table = Table(title='Gradients: ratios of norms (Fig. 3); norm and cosines of the last layer (Fig. 4)')
    table.add_column('run', no_wrap=True)
    table.add_column('phase', no_wrap=True)
    for title in 'steps', 'all / small', 'rest / small', 'norm of last', 'cos. next', 'cos. pairs':
        table.add_column(title, justify='right')
    for run in runs:
        for phase in phases(run):
            table.add_row(
                run.name,
                phase.name,
                str(phase.norms),
                f'{phase.all_ratio:.2f}',
                f'{phase.rest_ratio:.2f}',
                f'{phase.length:.2g}',
                f'{phase.consecutive:.2f}',
                f'{phase.pairwise:.2f}',
            )
    print_table(table)


GRADIENTS = Analysis(
    GradientsConfig,
    analyse_gradients,
    'RUN [RUN ...]',
    'Gradient imbalance and gradient direction divergence of runs, from what they recorded (`diagnostics:` in the '
    'recipe) or from their checkpoints.',
)
