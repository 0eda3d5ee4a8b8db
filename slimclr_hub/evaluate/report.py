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
    columns = ['width', 'parameters', 'multiply-adds']
    if facts[0].end is not None:
        columns += ['k-NN start (%)', 'k-NN end (%)', 'gain']
    for column in columns:
        table.add_column(column, justify='right', no_wrap=True)
    for fact in facts:
        gain = [] if fact.start is None or fact.end is None else [f'{fact.end - fact.start:+.1f}']
        table.add_row(*fact.cells, *gain)
    Console().print(table)


def draw_figure(metrics: Sequence[dict[str, Any]], widths: Sequence[float], path: Path) -> None:
    """Draw the loss of each width over epochs and, where it was measured, its k-NN accuracy.

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
    figure, axes = plt.subplots(1, 2 if evaluations else 1, figsize=(10 if evaluations else 5, 4), squeeze=False)
    panels = [(axes[0][0], training, 'info_nce', 'InfoNCE loss (nats)')]
    if evaluations:
        panels.append((axes[0][1], evaluations, 'knn', 'k-NN accuracy (%)'))
    for axis, records, name, label in panels:
        for i, width in enumerate(widths):
            key = f'{name}/{width:g}'
            points = [(record['step'] / steps_per_epoch, record[key]) for record in records if key in record]
            axis.plot(
                *zip(*points, strict=True),
                label=f'width {width:g}',
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=_STYLES[i % len(_STYLES)],
                marker='o' if name == 'knn' else None,
            )
        axis.set_xlabel('epoch')
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
