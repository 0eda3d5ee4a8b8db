"""Average precision by width and epoch: kept as a file, printed as a table, drawn as curves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimclr_hub.detection.mmdetection.names import width_name
from slimclr_hub.files import write_text, written_whole

_COLUMNS = {'mAP': 'AP', 'mAP_50': 'AP50', 'mAP_75': 'AP75'}
_KINDS = {'bbox': 'box', 'segm': 'mask'}

Metrics = Mapping[str, Any]


class History:
    """Metrics of each evaluation, in a file that is whole at any time.

    Args:
        path: The file.
        resumed: Whether to go on with what is in it.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self._path = path
        self.metrics: dict[int, dict[str, float]] = {}
        if resumed and path.exists():
            self.metrics = {int(step): metrics for step, metrics in json.loads(path.read_text()).items()}

    def add(self, step: int, metrics: Metrics) -> None:
        """Note the metrics of an epoch or iteration; later ones, of a run that was resumed before them, go."""
        self.metrics = {earlier: kept for earlier, kept in self.metrics.items() if earlier < step}
        self.metrics[step] = {key: float(value) for key, value in metrics.items() if isinstance(value, float | int)}
        write_text(self._path, json.dumps(self.metrics, indent=1) + '\n')


def precision_table(metrics: Metrics, parameters: Mapping[float, int]) -> str:
    """A table of the widths that were evaluated, in percent and in Markdown; nothing where there is no AP of COCO.

    Args:
        metrics: `width_0.50/coco/bbox_mAP` and so on -> AP from 0 to 1.
        parameters: Width -> parameters of the backbone.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = [
        (f'coco/{kind}_{key}', f'{_KINDS[kind]} {title}')
        for kind in _KINDS
        for key, title in _COLUMNS.items()
        if any(name.endswith(f'/coco/{kind}_{key}') for name in metrics)
    ]
    if not columns:
        return ''
    table = Table(box=box.MARKDOWN)
    for header in ['width', 'backbone', *(title for _, title in columns)]:
        table.add_column(header, justify='right', no_wrap=True)
    for width, count in parameters.items():
        values = [metrics.get(f'{width_name(width)}/{key}') for key, _ in columns]
        if any(value is not None for value in values):
            # COCO's -1 says that there was nothing to find.
            cells = ['' if value is None or value < 0 else f'{100 * value:.1f}' for value in values]
            table.add_row(f'{width:g}', f'{count / 1e6:.1f} M', *cells)
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip()


def draw_history(metrics: Mapping[int, Metrics], unit: str, path: Path) -> bool:
    """Draw AP over epochs or iterations, a curve for each width and a panel each for boxes and masks.

    Args:
        metrics: Epoch or iteration -> metrics of all widths.
        unit: What it is.
        path: Where to write a PNG file, whole or not at all.

    Returns:
        Whether there was any AP of COCO to draw.
    """
    from matplotlib.figure import Figure

    kinds = [kind for kind in _KINDS if any(key.endswith(f'/coco/{kind}_mAP') for m in metrics.values() for key in m)]
    if not kinds:
        return False
    figure = Figure(figsize=(5 * len(kinds), 4))
    for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        suffix = f'/coco/{kind}_mAP'
        names = sorted({key.removesuffix(suffix) for m in metrics.values() for key in m if key.endswith(suffix)})
        for name in reversed(names):
            points = [(step, 100 * m[name + suffix]) for step, m in metrics.items() if name + suffix in m]
            panel.plot(*zip(*points, strict=True), marker='.', label=name.replace('_', ' '))
        panel.set(xlabel=unit, ylabel=f'{_KINDS[kind]} AP (%)')
        panel.legend()
    figure.tight_layout()
    with written_whole(path.parent) as partial:
        figure.savefig(partial / path.name, dpi=120)
    return True
