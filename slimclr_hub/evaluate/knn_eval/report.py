"""What the k-NN evaluation ends with: a table over k and tau, and a figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from rich.table import Table

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure
from slimclr_hub.runs.tables import print_table

ACCURACIES = 'accuracies.json'
"""File beside the result of a k-NN evaluation that holds the accuracies of every k and tau."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies by one k and one tau.

    Args:
        k: Neighbours.
        temperature: tau; None for votes without weights.
        bank: Training images that were searched, where these are not all.
        top1: Width -> top-1 accuracy in percent.
        top5: Width -> top-5 accuracy in percent; empty where there are no more than five classes.
    """

    k: int
    temperature: float | None
    bank: int | None
    top1: Mapping[float, float]
    top5: Mapping[float, float]

    @property
    def protocol(self) -> str:
        """How it was measured, in a few words."""
        images = '' if self.bank is None else f', {self.bank} training images'
        return f'k-NN, k={self.k}, {_weights(self.temperature)}{images}'


def write_accuracies(accuracies: Sequence[Accuracy], folder: Path) -> None:
    """Write `accuracies.json` into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ACCURACIES, json.dumps([asdict(accuracy) for accuracy in accuracies], indent=2) + '\n')


def read_accuracies(file: Path) -> dict[str, Accuracy]:
    """Read what `write_accuracies` wrote, by protocol.

    Raises:
        InputError: It is not such a file.
    """
    try:
        records = json.loads(file.read_text())
        for record in records:
            for name in 'top1', 'top5':
                record[name] = {float(width): value for width, value in record[name].items()}
        accuracies = [Accuracy(**record) for record in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f'{file} does not hold accuracies of a k-NN evaluation ({error!r})') from error
    return {accuracy.protocol: accuracy for accuracy in accuracies}


def best_of(accuracies: Sequence[Accuracy]) -> Accuracy:
    """Those of the highest top-1 accuracy in the mean over widths; the first of equal ones."""
    return max(accuracies, key=lambda accuracy: mean(accuracy.top1.values()))


def print_accuracies(accuracies: Sequence[Accuracy], name: str) -> None:
    """Print top-1 / top-5 of every width for every k and tau; the best in the mean over widths is marked."""
    best = best_of(accuracies)
    has_top5 = bool(best.top5)
    table = Table(title=f'{name}: k-NN, {"top-1 / top-5" if has_top5 else "top-1"} accuracy (%) by width')
    for title in 'k', 'tau', *(f'{width:g}' for width in best.top1), '':
        table.add_column(title, justify='right', no_wrap=True)
    for accuracy in accuracies:
        cells = [
            f'{top1:.1f} / {accuracy.top5[width]:.1f}' if has_top5 else f'{top1:.1f}'
            for width, top1 in accuracy.top1.items()
        ]
        temperature = '-' if accuracy.temperature is None else f'{accuracy.temperature:g}'
        marked = ('best', 'bold') if accuracy is best else ('', None)
        table.add_row(str(accuracy.k), temperature, *cells, marked[0], style=marked[1])
    print_table(table)
    if len(accuracies) > 1:
        print('Best in the mean over widths, chosen on the very images that it is measured on.')


def draw_accuracies(accuracies: Sequence[Accuracy], path: Path) -> None:
    """Draw top-1 accuracy over k, a line for each width and a panel for each tau.

    Args:
        accuracies: What was measured.
        path: Files to write, without suffix: a PNG and a PDF.
    """
    temperatures = list(dict.fromkeys(accuracy.temperature for accuracy in accuracies))
    figure, axes = new_figure(len(temperatures))
    lowest, highest = (f(value for one in accuracies for value in one.top1.values()) for f in (min, max))
    margin = max(0.05 * (highest - lowest), 0.5)
    for axis, temperature in zip(axes, temperatures, strict=True):
        shown = [accuracy for accuracy in accuracies if accuracy.temperature == temperature]
        ks = [accuracy.k for accuracy in shown]
        for i, width in enumerate(shown[0].top1):
            values = [accuracy.top1[width] for accuracy in shown]
            axis.plot(ks, values, label=f'width {width:g}', marker=marker(i), **line_style(i))
        axis.set_xscale('log')
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_ylim(lowest - margin, highest + margin)
        axis.set_xlabel('k, neighbours')
        axis.set_ylabel('k-NN accuracy, top-1 (%)')
        axis.set_title(_weights(temperature))
        axis.legend()
    save_figure(figure, path)


def _weights(temperature: float | None) -> str:
    return 'unweighted' if temperature is None else f'tau={temperature:g}'
