"""What a run ends with: a table by width and a figure over epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimclr_hub.evaluate.figures import line_style, new_figure, save_figure
from slimclr_hub.hub.card import WidthFacts


def print_table(facts: Sequence[WidthFacts], title: str) -> None:
    """Print cost and accuracy of each width."""
    table = Table(title=title)
    rows = [fact.cells for fact in facts]
    for row, fact in zip(rows, facts, strict=True):
        if fact.start is not None and fact.end is not None:
            row['gain'] = f'{fact.end - fact.start:+.1f}'
    for title in rows[0]:
        table.add_column(title, justify='right', no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


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
