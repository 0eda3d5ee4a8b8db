"""The Pareto figure of a comparison: accuracy over multiply-adds."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import Entry, Measure
from slimclr_hub.evaluate.compare.reported import REPORTED, TABLE_1
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure
from slimclr_hub.runs.result import IMAGENET
from slimclr_hub.weights.published import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = '#888888'
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*', '<', '>', 'p', 'h', 'd')  # one for each series of the paper's
_COLUMNS = 3
_PAPER = (IMAGENET, 'linear, reported', TABLE_1)
_LIKE_THE_PAPERS = 'linear evaluation, switchable, augmented, '  # what the protocol of such an evaluation begins with
_SIZE = (5, 4)  # inches of a panel
_SIZE_WITH_PAPER = (8.5, 5.5)  # its legend stands beside it
_LINE = 0.21  # inches of a line of a legend


def draw_pareto(entries: Sequence[Entry], path: Path, reported: bool = False) -> bool:
    """Draw accuracy over multiply-adds, a panel for each data set and protocol, as only those compare.

    Args:
        entries: The networks.
        path: Files to write, without suffix: a PNG and a PDF.
        reported: As in `pareto_figure`.

    Returns:
        Whether there was any accuracy to draw.
    """
    figure = pareto_figure(entries, reported)
    if figure is not None:
        save_figure(figure, path)
    return figure is not None


def pareto_figure(entries: Sequence[Entry], reported: bool = False) -> 'Figure | None':
    """The figure that `draw_pareto` writes, if there is any accuracy to draw.

    The widths of a network are joined by a line and marked by their numbers; a network of one width is a point.

    Args:
        entries: The networks.
        reported: Whether to add the rows of the paper's table 1, in grey, to linear evaluations on ImageNet by the
            paper's protocol, or in a panel of their own where there is none.
    """
    panels = list(dict.fromkeys(measure.key for entry in entries for measure in entry.measures))
    if reported and not any(_is_like_the_papers(key) for key in panels):
        panels.append(_PAPER)
    if not panels:
        return None
    columns = min(len(panels), _COLUMNS)
    sizes = [_size(entries, key, reported and _is_like_the_papers(key)) for key in panels]
    rows = [sizes[start : start + columns] for start in range(0, len(sizes), columns)]
    widths = [max(width for width, _ in sizes[column::columns]) for column in range(columns)]
    figure, axes = new_figure(columns, len(rows), widths, [max(height for _, height in row) for row in rows])
    for axis, key in zip(axes, panels, strict=False):
        points: list[tuple[float, float, float]] = []
        for i, entry in enumerate(entries):
            for measure in (measure for measure in entry.measures if measure.key == key):
                points += _draw(axis, entry, measure, i, alone=len(entries) == 1)
        _mark_widths(axis, points)
        with_paper = reported and _is_like_the_papers(key)
        if with_paper:
            _draw_paper(axis, {entry.name for entry in entries})
        _finish(axis, key, beside=with_paper)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def figure_path(path: Path) -> Path:
    """Where a figure that was asked for as `path` goes, without its suffix.

    Raises:
        InputError: The suffix is of another format, or it is a folder.
    """
    if path.suffix not in ('', '.png', '.pdf'):
        raise InputError(f'--figure {path}: figures are written as PNG and PDF; give a name in .png or without suffix')
    if path.is_dir():
        raise InputError(f'--figure {path} is a folder; give the name of a file in it')
    return path.with_suffix('')


def _size(entries: Sequence[Entry], key: tuple[str, str, str], with_paper: bool) -> tuple[float, float]:
    if with_paper:
        return _SIZE_WITH_PAPER
    width, height = _SIZE
    return width, height + _LINE * sum(any(of.key == key for of in entry.measures) for entry in entries)


def _draw(
    axis: 'Axes', entry: Entry, measure: Measure, number: int, alone: bool
) -> Sequence[tuple[float, float, float]]:
    """Draw a network, and return multiply-adds, accuracy and width of its points."""
    points = [
        (fact.multiply_adds, measure.top1[fact.width], fact.width) for fact in entry.facts if fact.width in measure.top1
    ]
    style = line_style(number) if len(points) > 1 else {**line_style(number), 'linestyle': 'none'}
    xs, ys = zip(*(point[:2] for point in points), strict=True)
    axis.plot(xs, ys, label=entry.name, marker=marker(number), zorder=3, **style)
    if alone and measure.start:
        began = [(x, measure.start[width]) for x, _, width in points if width in measure.start]
        axis.plot(*zip(*began, strict=True), label='before training', marker='x', color=_GREY, linestyle=':')
    return points


def _mark_widths(axis: 'Axes', points: Sequence[tuple[float, float, float]]) -> None:
    """Write each width above its points; networks of the same cost share one number, above the highest of them."""
    highest: dict[tuple[float, float], float] = {}
    for x, y, width in points:
        highest[x, width] = max(y, highest.get((x, width), y))
    for (x, width), y in highest.items():
        axis.annotate(f'{width:g}', (x, y), textcoords='offset points', xytext=(0, 7), ha='center', fontsize='small')


def _draw_paper(axis: 'Axes', shown: set[str]) -> None:
    series = list(dict.fromkeys(row.series for row in REPORTED))
    # Those that are there in colour already are the same numbers.
    theirs = {f'SlimCLR-{of.method}, {of.epochs} epochs' for of in PUBLISHED.values() if of.name in shown}
    for i, name in enumerate(series):
        if name in theirs:
            continue
        rows = [row for row in REPORTED if row.series == name]
        axis.plot(
            [row.multiply_adds for row in rows],
            [row.top1 for row in rows],
            label=f'{name} (reported)',
            marker=_MARKERS[i],
            markersize=5,
            markerfacecolor='none' if rows[0].teacher else _GREY,
            color=_GREY,
            linestyle='-' if rows[0].slimmable else 'none',
            linewidth=0.8,
            zorder=2,
        )


def _finish(axis: 'Axes', key: tuple[str, str, str], beside: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    data, _, protocol = key
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1, y=0.12)
    axis.set_xlabel('multiply-adds for one image')
    axis.set_ylabel('top-1 accuracy (%)')
    axis.set_title(f'{data}\n{_folded(protocol)}', fontsize='medium')
    # Where it covers nothing.
    if beside:
        axis.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), fontsize='small')
    else:
        axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), fontsize='small')


def _folded(text: str) -> str:
    return '\n'.join(wrap(text, 60))


def _short(value: float) -> str:
    for unit, factor in ('G', 1e9), ('M', 1e6), ('k', 1e3):
        if value >= factor:
            return f'{value / factor:g} {unit}'
    return f'{value:g}'


def _is_like_the_papers(key: tuple[str, str, str]) -> bool:
    data, _, protocol = key
    return key == _PAPER or (
        data == IMAGENET and protocol.startswith(_LIKE_THE_PAPERS) and 'without distillation' not in protocol
    )
