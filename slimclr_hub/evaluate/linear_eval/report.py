"""The end of a linear evaluation: choice of a learning rate, result, table, figure, and the network with its probe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from slimclr_hub.data import DataConfig
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig
from slimclr_hub.evaluate.linear_eval.training import Record
from slimclr_hub.hub.card import probe_card
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import width_facts
from slimclr_hub.runs.figures import line_style, new_figure
from slimclr_hub.runs.result import Result, environment, save
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHOICE = 'highest mean top-1 over the widths on the validation split, after the last epoch'
_ACROSS = 55  # letters above a panel
_WORDNET = re.compile(r'n\d{8}')


def best_rate(record: Record) -> int:
    """Index of the learning rate with the highest mean top-1 accuracy over widths; of equal ones the first."""
    means = [mean(each.values()) for each in record['top1']]
    return means.index(max(means))


def make_result(
    config: LinearEvalConfig,
    history: Sequence[Record],
    classes: int,
    images: int,
    names: Sequence[str] | None,
    weights: str,
) -> Result:
    """Make the result of an evaluation, measured on `images` images by a network whose weights have the hash `weights`.

    Its settings tell all learning rates and how one was chosen, and the names of the classes where they are known.
    """
    last = history[-1]
    best = best_rate(last)
    measured = {name: last[name] for name in ('top1', 'top5') if name in last}
    rates = config.optim.rates
    return Result(
        config.network,
        config.protocol,
        **{name: {float(width): value for width, value in each[best].items()} for name, each in measured.items()},
        images=images,
        settings={
            **plain(asdict(config)),
            'chosen_lr': rates[best],
            'chosen_by': _CHOICE if len(rates) > 1 else 'the only one',
            'sweep': [{'lr': lr, **{name: each[i] for name, each in measured.items()}} for i, lr in enumerate(rates)],
            'classes': classes,
            'class_names': names,
            'frozen': weights,
        },
        environment=environment(),
    )


def print_result(result: Result, reported: Result | None, pixels: Result | None = None) -> None:
    """Print the accuracies of each width, those that the paper reports and baselines beside them, and how they came."""
    protocol, settings = result.protocol, result.settings
    sentences = [
        f'{str(protocol.features).capitalize()} features, {protocol.head} head, '
        f'{"with" if protocol.distillation else "without"} distillation, {protocol.epochs} epochs, '
        f'{result.images} images.',
        *_about_rates(settings['chosen_lr'], [each['lr'] for each in settings['sweep']], settings['chosen_by']),
    ]
    if 'frozen' in settings:
        sentences.append(
            'Checked: the network has not moved; all its tensors have the hash that they had before '
            f'({settings["frozen"][:12]}).'
        )
    measured = {'top-1': result.top1, **({'top-5': result.top5} if result.top5 else {})}
    if reported is not None:
        sentences.append(f'Reported: {reported.protocol.data}, {reported.protocol}.')
        measured |= {'top-1, reported': reported.top1, 'top-5, reported': reported.top5}
    if result.start:
        measured['random weights'] = result.start
    if pixels is not None:
        measured[pixels.network] = dict.fromkeys(result.top1, pixels.top1[1.0])
    columns = {'width': [f'{width:g}' for width in result.top1]}
    for title, values in measured.items():
        columns[title] = [f'{values[width]:.1f}' if width in values else '' for width in result.top1]
    print(f'{result.network}: accuracies by width')
    rows = list(zip(*columns.values(), strict=True))
    TextTable('linear evaluation (%)', list(columns), rows, sentences, names=0).print()


def _about_rates(chosen: float, rates: Sequence[float], why: str) -> list[str]:
    """Tell which learning rate was kept, and that one beyond the sweep may be better if it is at its end."""
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


def accuracies_figure(history: Sequence[Record], result: Result) -> 'Figure':
    """Draw accuracy by width over epochs at the chosen learning rate and, of a sweep, over learning rates."""
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
    figure.suptitle(fill(str(result.protocol), _ACROSS * len(axes)), fontsize='medium')
    return figure


def save_with_head(
    backbone: SlimmableResNet, head: Mapping[str, torch.Tensor], folder: Path, result: Result, data: DataConfig
) -> None:
    """Write the network with the probe as its head, and beside it the result, whose settings name the classes.

    The backbone stays without a head; `head` has the linear layers for features as the network gives them, and `data`
    are the images that it was tested on.
    """
    settings, kind = result.settings, str(result.protocol.head)
    backbone.reset_classifier(settings['classes'], head=kind)
    backbone.fc.load_state_dict(head)
    about = {
        'name': folder.name,
        'folder': str(folder),
        'data': data.name,
        'split': str(data.val_split),
        'size': str(data.size),
    }
    card = probe_card(width_facts(backbone, data.size), about, result)
    names = settings['class_names']
    if names is not None and (len(names) != settings['classes'] or all(map(_WORDNET.fullmatch, names))):
        names = None  # for ImageNet's own numbers there are better names, which timm knows
    save_folder(backbone, folder, **data.look, card=card, label_names=names)
    save([result], folder / 'linear_eval')  # where comparisons find it
    backbone.reset_classifier(0)
