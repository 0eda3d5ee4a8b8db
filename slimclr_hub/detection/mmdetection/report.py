"""Average precision by width and epoch: kept as a file, printed as a table, drawn as curves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimclr_hub.detection.mmdetection.names import width_name
from slimclr_hub.weights.whole import write_text

_COLUMNS = {'mAP': 'AP', 'mAP_50': 'AP50', 'mAP_75': 'AP75'}
_KINDS = {'bbox': 'box', 'segm': 'mask'}

Metrics = Mapping[str, Any]


class History:
    """Metrics of each epoch, in a file that is whole at any time.

    Args:
        path: The file.
        resumed: Whether to go on with what is in it.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self._path = path
        self.epochs: dict[int, dict[str, float]] = {}
        if resumed and path.exists():
            self.epochs = {int(epoch): metrics for epoch, metrics in json.loads(path.read_text()).items()}

    def add(self, epoch: int, metrics: Metrics) -> None:
        """Note the metrics of an epoch; those of later epochs, of a run that was resumed before them, go."""
        self.epochs = {e: kept for e, kept in self.epochs.items() if e < epoch}
        self.epochs[epoch] = {key: float(value) for key, value in metrics.items() if isinstance(value, float | int)}
        write_text(self._path, json.dumps(self.epochs, indent=1) + '\n')


def precision_table(metrics: Metrics, parameters: Mapping[float, int]) -> str:
    """A table of the widths that were evaluated, in percent.

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
    table = Table(box=box.SIMPLE_HEAD)
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
    return captured.get().rstrip()


def draw_history(epochs: Mapping[int, Metrics], path: Path) -> None:
    """Draw AP over epochs, a curve for each width and a panel each for boxes and masks."""
    import matplotlib.pyplot as plt

    kinds = [kind for kind in _KINDS if any(f'coco/{kind}_mAP' in key for m in epochs.values() for key in m)]
    figure, panels = plt.subplots(1, max(len(kinds), 1), figsize=(5 * max(len(kinds), 1), 4), squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=False):
        suffix = f'/coco/{kind}_mAP'
        names = sorted({key.removesuffix(suffix) for m in epochs.values() for key in m if key.endswith(suffix)})
        for name in reversed(names):
            points = [(epoch, 100 * m[name + suffix]) for epoch, m in epochs.items() if name + suffix in m]
            panel.plot(*zip(*points, strict=True), marker='.', label=name.replace('_', ' '))
        panel.set(xlabel='epoch', ylabel=f'{_KINDS[kind]} AP (%)')
        panel.legend()
    figure.tight_layout()
    partial = path.with_suffix('.partial.png')
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    partial.replace(path)
