"""One style for all figures: colours and line styles that can be told apart without seeing colour, PNG and PDF."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimclr_hub.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ('-', '--', '-.', ':')
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')  # Okabe & Ito's, for all eyes
GREY = '#888888'
"""Colour of references: before training, reported by others, marks."""

_MARKERS = ('o', 's', '^', 'D', 'v', 'P')


def new_figure(
    columns: int = 1, rows: int = 1, width: float = 5, height: float | Sequence[float] = 4
) -> 'tuple[Figure, list[Axes]]':
    """Make a figure and its panels, row by row, of a width and a height, or one for each row, in inches."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    heights = [height] * rows if isinstance(height, int | float) else list(height)
    size = (columns * width, sum(heights))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, list(axes.flat)


def line_style(number: int) -> dict[str, Any]:
    """Colour and line style of the `number`-th series; series differ in both."""
    return {'color': _COLOURS[number % len(_COLOURS)], 'linestyle': _STYLES[number % len(_STYLES)]}


def marker(number: int) -> str:
    """Marker of the `number`-th series."""
    return _MARKERS[number % len(_MARKERS)]


def mark_slow_start(axis: 'Axes', epoch: float) -> None:
    """Mark the end of slow start in a panel over epochs; an epoch of 0 marks nothing."""
    if epoch > 0:
        axis.axvline(epoch, color=GREY, linestyle='--', linewidth=0.8, zorder=0)
        place: dict[str, Any] = {'xy': (epoch, 1), 'xytext': (-3, -3), 'textcoords': 'offset points', 'rotation': 90}
        text = 'end of slow start'
        axis.annotate(text, xycoords=('data', 'axes fraction'), ha='right', va='top', color=GREY, fontsize=7, **place)


def mark_baseline(axis: 'Axes', name: str, value: float) -> None:
    """Draw a value that nothing on the horizontal axis changes, such as the accuracy of raw pixels."""
    axis.axhline(value, label=name, color=GREY, linestyle='-.', linewidth=1, zorder=1)


def figure_name(path: Path) -> Path:
    """The name for `save_figure` of a file that a user has given, with or without a suffix of a figure."""
    return path.with_suffix('') if path.suffix in ('.png', '.pdf') else path


def save_figure(figure: 'Figure', path: Path) -> None:
    """Write a figure as `path`.png and `path`.pdf into a folder that is made if need be, and close it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    for suffix in 'png', 'pdf':
        content = BytesIO()  # the writers of images have errors of their own for a disk that is full
        figure.savefig(content, format=suffix, dpi=150)
        write_bytes(path.parent / f'{path.name}.{suffix}', content.getvalue())
    plt.close(figure)
