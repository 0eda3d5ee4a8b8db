"""Average precision (AP) by width: a table, its history over a run, and a figure."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimclr_hub.files import atomic_files, write_text
from slimclr_hub.models import SlimmableResNet

KINDS = {'bbox': 'box', 'segm': 'mask'}
METRICS = ('AP', 'AP50', 'AP75')
"""The first three numbers of COCO's summary."""

Metrics = Mapping[str, Any]


def width_name(width: float) -> str:
    """Return the prefix of a width's metrics: 0.5 -> `width_0.50`, with more decimals if the width has more."""
    return f'width_{width:.2f}' if round(width, 2) == width else f'width_{width:g}'


def by_width(metrics: Metrics) -> dict[float, dict[str, float]]:
    """Convert metrics of MMDetection, `width_0.50/coco/bbox_mAP_50`, to width -> `bbox/AP50` -> AP from 0 to 1."""
    precision: dict[float, dict[str, float]] = {}
    for name, value in metrics.items():
        if match := re.fullmatch(r'width_([\d.]+)/coco/(bbox|segm)_mAP(_50|_75|)', name):
            width, kind, threshold = match.groups()
            precision.setdefault(float(width), {})[f'{kind}/AP{threshold[1:]}'] = value
    return precision


def precision_table(precision: Mapping[float, Mapping[str, float]], network: SlimmableResNet) -> str:
    """Format AP of boxes and masks, in percent, as a Markdown table; an empty string if there is none.

    Args:
        precision: Width -> `bbox/AP`, `bbox/AP50`, `bbox/AP75` and the same of `segm`, from 0 to 1; negative or nan
            without any instance.
        network: Backbone, whose parameters at each width are counted.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = [f'{kind}/{metric}' for kind in KINDS for metric in METRICS]
    columns = [column for column in columns if any(column in row for row in precision.values())]
    if not columns:
        return ''
    table = Table('width', 'backbone', *(f'{KINDS[c[:4]]} {c[5:]}' for c in columns), box=box.MARKDOWN)
    for column in table.columns:
        column.justify = 'right'
    rows = {width_name(width): row for width, row in precision.items()}
    for width in network.widths:
        if row := rows.get(width_name(width)):
            count = sum(parameter.numel() for parameter in network.extract(width).parameters())
            values = [row.get(column, -1) for column in columns]
            cells = [f'{100 * value:.1f}' if value >= 0 else '' for value in values]
            table.add_row(f'{width:g}', f'{count / 1e6:.1f} M', *cells)
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip()


class History:
    """Metrics of each evaluation, kept in a file that is written atomically; `resumed` goes on with its content."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self._path = path
        self.metrics: dict[int, dict[str, float]] = {}
        if resumed and path.exists():
            self.metrics = {int(step): metrics for step, metrics in json.loads(path.read_bytes()).items()}

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of an epoch or iteration and drop later ones, which a resumed run evaluates again."""
        self.metrics = {earlier: kept for earlier, kept in self.metrics.items() if earlier < step}
        self.metrics[step] = {key: float(value) for key, value in metrics.items() if isinstance(value, float | int)}
        write_text(self._path, json.dumps(self.metrics, indent=1) + '\n')


def draw_history(metrics: Mapping[int, Metrics], unit: str, path: Path) -> bool:
    """Draw AP over epochs or iterations into a PNG file, written atomically; return False if there is no AP of COCO.

    There is one curve for each width, and one panel each for boxes and masks. `metrics` are MMDetection's by epoch or
    iteration, and `unit` is `epoch` or `iteration`.
    """
    from matplotlib.figure import Figure

    history = {step: by_width(found) for step, found in metrics.items()}
    rows = [row for precision in history.values() for row in precision.values()]
    kinds = [kind for kind in KINDS if any(f'{kind}/AP' in row for row in rows)]
    if not kinds:
        return False
    figure = Figure(figsize=(5 * len(kinds), 4))
    for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        key = f'{kind}/AP'
        for width in sorted({width for precision in history.values() for width in precision}, reverse=True):
            points = [(step, 100 * of[width][key]) for step, of in history.items() if key in of.get(width, {})]
            panel.plot(*zip(*points, strict=True), marker='.', label=f'width {width:g}')
        panel.set(xlabel=unit, ylabel=f'{KINDS[kind]} AP (%)')
        panel.legend()
    figure.tight_layout()
    with atomic_files(path.parent) as partial:
        figure.savefig(partial / path.name, dpi=120)
    return True
