"""What a linear evaluation ends with: the choice of a learning rate, a table beside the paper's row, and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from slimclr_hub.evaluate.figures import line_style, new_figure, save_figure
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig
from slimclr_hub.evaluate.linear_eval.training import Record
from slimclr_hub.evaluate.results import EvalResult, environment
from slimclr_hub.train.command_line import plain
from slimclr_hub.weights.published import Reported

_CHOICE = 'highest mean top-1 over the widths on the validation split, after the last epoch'


def best_rate(record: Record) -> int:
    """Number of the learning rate to keep: that of the highest mean top-1 accuracy over widths, the first of equals.

    Args:
        record: Of the last epoch.
    """
    means = [mean(each.values()) for each in record['top1']]
    return means.index(max(means))


def make_result(
    config: LinearEvalConfig, history: Sequence[Record], classes: int, images: int, names: Sequence[str] | None
) -> EvalResult:
    """The result of an evaluation, with all learning rates and how one was chosen in its settings.

    Args:
        config: The configuration.
        history: What each epoch gave.
        classes: Number of classes.
        images: Images that accuracies were measured on.
        names: Names of the classes, where they are known.
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
        },
        environment=environment(),
    )


def print_result(result: EvalResult, reported: Mapping[float, Reported]) -> None:
    """Print the accuracies of each width, those that the paper reports beside them, and how they were measured."""
    from rich.console import Console
    from rich.table import Table

    settings = result.settings
    sentences = [
        f'{settings["features"]["mode"].capitalize()} features, {settings["probe"]["head"]} head, '
        f'{"with" if settings["probe"]["distillation"] else "without"} distillation, '
        f'{settings["optim"]["epochs"]} epochs, {settings["validation_images"]} images.',
        f'Learning rate {settings["chosen_lr"]:g}'
        + (f' of {len(settings["sweep"])}: {settings["chosen_by"]}.' if len(settings['sweep']) > 1 else '.'),
    ]
    if reported:
        sentences.append('Reported: the paper, table 1 (switchable, augmented, with distillation, ImageNet).')
    table = Table(title='linear evaluation (%)')
    columns = {'width': [f'{width:g}' for width in result.top1]}
    for title, values in ('top-1', result.top1), ('top-5', result.top5):
        if values:
            columns[title] = [f'{value:.1f}' for value in values.values()]
    if reported:
        of = [reported.get(width) for width in result.top1]
        columns['top-1, reported'] = [f'{each.top1:.1f}' if each else '' for each in of]
        columns['top-5, reported'] = [f'{each.top5:.1f}' if each else '' for each in of]
    for title in columns:
        table.add_column(title, justify='right', no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    print(f'{result.network}: accuracies by width')
    Console().print(table)
    print('\n'.join(sentences))


def draw_accuracies(history: Sequence[Record], result: EvalResult, path: Path) -> None:
    """Draw accuracy by width over epochs at the chosen learning rate and, of a sweep, over learning rates.

    Args:
        history: What each epoch gave.
        result: What came of it.
        path: Files to write, without suffix: a PNG and a PDF.
    """
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
    axes[0].set_title(f'learning rate {result.settings["chosen_lr"]:g}')
    if len(sweep) > 1:
        axes[1].set_xscale('log')
        axes[1].set_xlabel('learning rate')
        axes[1].set_title('after the last epoch')
    for axis in axes:
        axis.set_ylabel('top-1 accuracy (%)')
        axis.legend()
    figure.suptitle(result.protocol)
    save_figure(figure, path)
