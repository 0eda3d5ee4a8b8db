"""What a run ends with: a table by width and a figure over epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimclr_hub.hub.card import WidthFacts

_STYLES = ('-', '--', '-.', ':')
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe & Ito's, for all eyes


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
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

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
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (records, name, label) in zip(axes[0], panels, strict=True):
        for i, width in enumerate(widths):
            key = f'{name}/{width:g}'
            points = [(record['step'] / steps_per_epoch, record[key]) for record in records if key in record]
            axis.plot(
                *zip(*points, strict=True),
                label=f'width {width:g}',
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=_STYLES[i % len(_STYLES)],
                marker='o' if records is evaluations else None,
            )
        axis.set_xlabel('epoch')
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
