"""What a run ends with: a table by width and a figure over epochs."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import read_entry
from slimclr_hub.evaluate.compare.figure import draw_pareto
from slimclr_hub.evaluate.compare.speed import measure_speed
from slimclr_hub.evaluate.compare.tables import comparison_tables
from slimclr_hub.runs.figures import line_style, new_figure, save_figure
from slimclr_hub.runs.result import environment

_BATCH = 32
_SECONDS = 1.5


def compare_with_itself(folder: Path) -> list[Path]:
    """Print the comparison of a run with itself before training, and draw it: cost, speed and accuracy by width.

    Args:
        folder: The run's, with its result.

    Returns:
        The figure's path without suffix, if there was an accuracy to draw.
    """
    entries = [read_entry(str(folder), folder.name)]
    # Training may still hold the memory; a run that is done does not fail for its speed.
    with suppress(InputError):
        entries = measure_speed(entries, _BATCH, _SECONDS)
    for table in comparison_tables(entries, _BATCH, environment()['hardware']):
        table.print()
    return [folder / 'pareto'] if draw_pareto(entries, folder / 'pareto') else []


def draw_figure(metrics: Sequence[dict[str, Any]], widths: Sequence[float], path: Path) -> None:
    """Draw the loss of each width over epochs, and the accuracies that were measured.

    Args:
        metrics: Lines of metrics.jsonl.
        widths: The widths.
        path: Files to write, without suffix: a PNG and a PDF.
    """
    training = [record for record in metrics if record['kind'] == 'train']
    evaluations = [record for record in metrics if record['kind'] == 'eval']
    steps_per_epoch = training[-1]['step'] / training[-1]['epoch']
    panels = [
        (records, name, label)
        for records, name, label in (
            (training, 'info_nce', 'InfoNCE loss (nats)'),
            (training, 'cross_entropy', 'cross-entropy (nats)'),
            (evaluations, 'knn', 'k-NN accuracy (%)'),
            (evaluations, 'linear', 'accuracy of a linear classifier (%)'),
            (evaluations, 'top1', 'top-1 accuracy (%)'),
        )
        if any(f'{name}/{widths[0]:g}' in record for record in records)
    ]
    figure, axes = new_figure(len(panels))
    for axis, (records, name, label) in zip(axes, panels, strict=True):
        for i, width in enumerate(widths):
            key = f'{name}/{width:g}'
            points = [(record['step'] / steps_per_epoch, record[key]) for record in records if key in record]
            axis.plot(
                *zip(*points, strict=True),
                label=f'width {width:g}',
                marker='o' if records is evaluations else None,
                **line_style(i),
            )
        axis.set_xlabel('epoch')
        axis.set_ylabel(label)
        axis.legend()
    save_figure(figure, path)
