"""What a linear evaluation ends with: the choice of a learning rate, a table beside the paper's row, and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING

from slimclr_hub.evaluate.compare.reported import REPORTED_SLIMMABLE_PROBE
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig
from slimclr_hub.evaluate.linear_eval.training import Record
from slimclr_hub.evaluate.result import EvalResult
from slimclr_hub.runs.figures import line_style, new_figure, save_figure
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import print_table
from slimclr_hub.settings import plain
from slimclr_hub.weights.published import Published, Reported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHOICE = 'highest mean top-1 over the widths on the validation split, after the last epoch'
_ACROSS = 55  # letters above a panel


@dataclass(frozen=True)
class PaperRow:
    """What the paper reports of the network that is judged, or of the nearest to it.

    Args:
        accuracies: Width -> accuracies.
        source: Where they stand, and of what they are.
    """

    accuracies: Mapping[float, Reported]
    source: str


def paper_row(published: Published | None, head: str) -> PaperRow | None:
    """The paper's row for a network under a head.

    Args:
        published: The network, if it is one of the published.
        head: `switchable`, which table 1 has for each of them, or `slimmable`, which table 3a has for one alone.
    """
    if published is None:
        return None
    if head == 'switchable':
        return PaperRow(published.reported, 'table 1 (switchable, augmented, with distillation, ImageNet)')
    if (published.method, published.epochs) != ('MoCo v2', 200):
        return None
    return PaperRow(
        REPORTED_SLIMMABLE_PROBE,
        'table 3a (slimmable, augmented, ImageNet; of a network without slow start, distillation and loss weights, '
        'which this one has)',
    )


def best_rate(record: Record) -> int:
    """Number of the learning rate to keep: that of the highest mean top-1 accuracy over widths, the first of equals.

    Args:
        record: Of the last epoch.
    """
    means = [mean(each.values()) for each in record['top1']]
    return means.index(max(means))


def make_result(
    config: LinearEvalConfig,
    history: Sequence[Record],
    classes: int,
    images: int,
    names: Sequence[str] | None,
    weights: str,
) -> EvalResult:
    """The result of an evaluation, with all learning rates and how one was chosen in its settings.

    Args:
        config: The configuration.
        history: What each epoch gave.
        classes: Number of classes.
        images: Images that accuracies were measured on.
        names: Names of the classes, where they are known.
        weights: Hash of the network's weights, which it had before and has now.
    """
    last = history[-1]
    best = best_rate(last)
    measured = {name: last[name] for name in ('top1', 'top5') if name in last}
    rates = config.optim.rates
    return EvalResult(
        kind='linear',
        protocol=config.protocol,
        network=config.network,
        **{name: {float(width): value for width, value in each[best].items()} for name, each in measured.items()},
        settings={
            **plain(asdict(config)),
            'chosen_lr': rates[best],
            'chosen_by': _CHOICE if len(rates) > 1 else 'the only one',
            'sweep': [{'lr': lr, **{name: each[i] for name, each in measured.items()}} for i, lr in enumerate(rates)],
            'classes': classes,
            'class_names': names,
            'validation_images': images,
            'frozen': weights,
        },
        environment=environment(),
    )


def print_result(result: EvalResult, row: PaperRow | None) -> None:
    """Print the accuracies of each width, those that the paper reports beside them, and how they were measured."""
    from rich.table import Table

    settings = result.settings
    sentences = [
        f'{settings["features"]["mode"].capitalize()} features, {settings["probe"]["head"]} head, '
        f'{"with" if settings["probe"]["distillation"] else "without"} distillation, '
        f'{settings["optim"]["epochs"]} epochs, {settings["validation_images"]} images.',
        *_about_rates(settings['chosen_lr'], [each['lr'] for each in settings['sweep']], settings['chosen_by']),
    ]
    if 'frozen' in settings:
        sentences.append(
            'Checked: the network has not moved; all its tensors have the hash that they had before '
            f'({settings["frozen"][:12]}).'
        )
    if row is not None:
        sentences.append(f'Reported: the paper, {row.source}.')
    table = Table(title='linear evaluation (%)')
    columns = {'width': [f'{width:g}' for width in result.top1]}
    for title, values in ('top-1', result.top1), ('top-5', result.top5):
        if values:
            columns[title] = [f'{value:.1f}' for value in values.values()]
    if row is not None:
        of = [row.accuracies.get(width) for width in result.top1]
        columns['top-1, reported'] = [f'{each.top1:.1f}' if each else '' for each in of]
        columns['top-5, reported'] = [f'{each.top5:.1f}' if each else '' for each in of]
    for title in columns:
        table.add_column(title, justify='right', no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    print(f'{result.network}: accuracies by width')
    print_table(table)
    print('\n'.join(sentences))


def _about_rates(chosen: float, rates: Sequence[float], why: str) -> list[str]:
    """Which learning rate was kept of which, and that one beyond them may be better where it is the last of them."""
    if len(rates) == 1:
        return [f'Learning rate {_rate(chosen)}.']
    lowest, highest = min(rates), max(rates)
    between = 'and' if len(rates) == 2 else '...'
    sentences = [f'Learning rate {_rate(chosen)}, the best of {_rate(lowest)} {between} {_rate(highest)}: {why}.']
    if chosen in (lowest, highest):
        end, beyond = ('lowest', chosen / 3) if chosen == lowest else ('highest', chosen * 3)
        sentences.append(
            f'Note: it is the {end} of the sweep, and one beyond may be better; give --optim.lr with {beyond:.1g}, too.'
        )
    return sentences


def _rate(rate: float) -> str:
    # With a decimal point: "1 of 5" would read as the first of them.
    return str(float(rate))


def draw_accuracies(history: Sequence[Record], result: EvalResult, path: Path) -> None:
    """Draw accuracy by width over epochs at the chosen learning rate and, of a sweep, over learning rates.

    Args:
        history: What each epoch gave.
        result: What came of it.
        path: Files to write, without suffix: a PNG and a PDF.
    """
    save_figure(accuracies_figure(history, result), path)


def accuracies_figure(history: Sequence[Record], result: EvalResult) -> 'Figure':
    """The figure that `draw_accuracies` writes."""
    from matplotlib.ticker import MaxNLocator

    best = best_rate(history[-1])
    sweep = result.settings['sweep']
    figure, axes = new_figure(2 if len(sweep) > 1 else 1)
    for i, width in enumerate(result.top1):
        key = f'{width:g}'
        epochs = [record['epoch'] for record in history]
        values = [record['top1'][best][key] for record in history]
        few = 'o' if len(epochs) < 3 else None
        axes[0].plot(epochs, values, label=f'width {key}', marker=few, **line_style(i))
        if len(sweep) > 1:
            points = sorted((each['lr'], each['top1'][key]) for each in sweep)
            axes[1].plot(*zip(*points, strict=True), label=f'width {key}', marker='o', **line_style(i))
    axes[0].set_xlabel('epoch')
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_title(f'learning rate {_rate(result.settings["chosen_lr"])}')
    if len(sweep) > 1:
        axes[1].set_xscale('log')
        axes[1].set_xlabel('learning rate')
        axes[1].set_title('after the last epoch')
    for axis in axes:
        axis.set_ylabel('top-1 accuracy (%)')
        axis.legend()
    figure.suptitle(fill(result.protocol, _ACROSS * len(axes)), fontsize='medium')
    return figure
