"""The Pareto figure of a comparison: accuracy over multiply-adds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from textwrap import wrap
from typing import TYPE_CHECKING

from slimclr_hub.evaluate.compare.entries import Entry
from slimclr_hub.evaluate.compare.tables import raw_pixels_of, reported_networks
from slimclr_hub.evaluate.reported import TABLE_1
from slimclr_hub.runs.figures import GREY, line_style, mark_baseline, marker, new_figure, save_figure
from slimclr_hub.runs.result import IMAGENET, RANDOM_WEIGHTS, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*', '<', '>', 'p', 'h', 'd')  # one for each method of the paper's
_COLUMNS = 3
_LIKE_THE_PAPERS = Protocol('linear', IMAGENET, head='switchable', features='augmented', distillation=True)
_WIDTH, _HEIGHT = 5.5, 4.2  # inches of a panel without its legend
_LINE = 0.18  # inches of a line of a legend


def draw_pareto(entries: Sequence[Entry], path: Path, reported: bool = False) -> bool:
    """Write `pareto_figure` into `path`.png and `path`.pdf, and return False if there is no accuracy to draw."""
    figure = pareto_figure(entries, reported)
    if figure is not None:
        save_figure(figure, path)
    return figure is not None


def pareto_figure(entries: Sequence[Entry], reported: bool = False) -> 'Figure | None':
    """Draw accuracy over multiply-adds, a panel for each data set and protocol, as only those compare.

    The widths of a network are joined by a line and marked by their numbers; a network of one width is a point. Bars
    are standard deviations over seeds. None is returned if there is no accuracy to draw.

    With `reported`, networks of about the same cost from the paper's table 1 are added in grey, to linear evaluations
    by its protocol, or in a panel of their own if there is none.
    """
    measured = dict.fromkeys(protocol for entry in entries for protocol in entry.results)
    panels = [protocol for protocol in measured if protocol.kind != 'rank']
    if reported and reported_networks(entries) and not any(map(_is_like_the_papers, panels)):
        panels.append(TABLE_1)
    if not panels:
        return None
    columns = min(len(panels), _COLUMNS)
    grey = {protocol for protocol in panels if reported and _is_like_the_papers(protocol)}
    methods = len({network.method for network, _ in reported_networks(entries)})
    lines = [
        sum(protocol in entry.results for entry in entries)
        + len(raw_pixels_of(entries, [protocol]))
        + methods * (protocol in grey)
        for protocol in panels
    ]
    heights = [_HEIGHT + _LINE * max(lines[start : start + columns]) for start in range(0, len(panels), columns)]
    figure, axes = new_figure(columns, len(heights), _WIDTH, heights)
    for axis, protocol in zip(axes, panels, strict=False):
        points: list[tuple[float, float, float]] = []
        for i, entry in enumerate(entries):
            if protocol in entry.results:
                points += _draw(axis, entry, protocol, i, alone=len(entries) == 1)
        _mark_widths(axis, points)
        for name, found in raw_pixels_of(entries, [protocol]).items():
            mark_baseline(axis, name, found[protocol].top1[1.0])
        if protocol in grey:
            _draw_paper(axis, entries)
        _finish(axis, protocol)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _draw(
    axis: 'Axes', entry: Entry, protocol: Protocol, number: int, alone: bool
) -> Sequence[tuple[float, float, float]]:
    """Draw a network, and return multiply-adds, accuracy and width of its points."""
    found = [(fact, entry.values(protocol, 'top1', fact.width)) for fact in entry.facts]
    points = [(fact.multiply_adds, mean(values), fact.width) for fact, values in found if values]
    spreads = [stdev(values) if len(values) > 1 else 0 for _, values in found if values]
    style = line_style(number) if len(points) > 1 else {**line_style(number), 'linestyle': 'none'}
    xs, ys = zip(*(point[:2] for point in points), strict=True)
    axis.plot(xs, ys, label=entry.name, marker=marker(number), zorder=3, **style)
    if any(spreads):
        axis.errorbar(xs, ys, spreads, fmt='none', capsize=3, zorder=3, color=style['color'])
    began = [(x, mean(values)) for x, _, width in points if (values := entry.values(protocol, 'start', width))]
    if alone and began:
        axis.plot(*zip(*began, strict=True), label=RANDOM_WEIGHTS, marker='x', color=GREY, linestyle=':')
    return points


def _mark_widths(axis: 'Axes', points: Sequence[tuple[float, float, float]]) -> None:
    """Write each width above its points; networks of the same cost share one number, above the highest of them."""
    highest: dict[tuple[float, float], float] = {}
    for x, y, width in points:
        highest[x, width] = max(y, highest.get((x, width), y))
    for (x, width), y in highest.items():
        axis.annotate(f'{width:g}', (x, y), textcoords='offset points', xytext=(0, 7), ha='center', fontsize='small')


def _draw_paper(axis: 'Axes', entries: Sequence[Entry]) -> None:
    found = reported_networks(entries)
    for i, method in enumerate(dict.fromkeys(network.method for network, _ in found)):
        networks = [(network, widths) for network, widths in found if network.method == method]
        points = [(network.costs[w][1], network.result.top1[w]) for network, widths in networks for w in widths]
        first = networks[0][0]
        axis.plot(
            *zip(*points, strict=True),
            label=f'{method} (reported)',
            marker=_MARKERS[i],
            markersize=5,
            markerfacecolor='none' if first.teacher else GREY,
            color=GREY,
            linestyle='-' if first.slimmable else 'none',
            linewidth=0.8,
            zorder=2,
        )


def _finish(axis: 'Axes', protocol: Protocol) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1, y=0.12)
    axis.set_xlabel('multiply-adds for one image')
    axis.set_ylabel('top-1 accuracy (%)')
    axis.set_title('\n'.join([str(protocol.data), *wrap(str(protocol), 60)]), fontsize='medium')
    # Below the panel it covers nothing, and panels are of one size.
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.16), fontsize='small')


def _is_like_the_papers(protocol: Protocol) -> bool:
    return protocol == TABLE_1 or replace(protocol, epochs=None, standardised=None) == _LIKE_THE_PAPERS
