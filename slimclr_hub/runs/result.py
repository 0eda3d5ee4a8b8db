"""Accuracies and ranks of a network and the protocols they were measured by, as training and evaluations write them.

`result.json` holds a list of results. An evaluation that tried several values of a parameter lists the best one first.
What raw pixels reach by the same protocols comes last, under the name of the network `raw pixels`.
"""

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from slimclr_hub.errors import InputError
from slimclr_hub.files import read_json_lines, write_text
from slimclr_hub.machine import processors
from slimclr_hub.settings import RECIPE
from slimclr_hub.version import __version__

RESULT = 'result.json'
METRICS = 'metrics.jsonl'
IMAGENET = 'ImageNet'
RAW_PIXELS = 'raw pixels'
"""Name in results of the network whose features are the image itself; it has the one width 1."""

RANDOM_WEIGHTS = 'random weights'
RAW_PIXELS_KEY = 'raw_pixels'
"""Prefix in `metrics.jsonl` of the accuracies that raw pixels reach."""

Kind = Literal['knn', 'linear', 'logistic', 'classifier', 'rank']

_IMAGENET_NAMES = ('imagenet', 'imagenet-1k', 'imagenet1k', 'ilsvrc2012')
_WORDS = {
    'knn': 'k-NN',
    'linear': 'linear evaluation',
    'logistic': 'logistic regression',
    'classifier': "the network's own classifier",
    'rank': 'effective rank (RankMe)',
}
_WHILE_TRAINING: dict[str, Kind] = {'knn': 'knn', 'linear': 'logistic', 'top1': 'classifier', 'rank': 'rank'}
_HIGHEST_RANK = 1e9
_MEASURED = ('top1', 'top5', 'start', 'rank')
_OLD_GRID = 'accuracies.json'  # k-NN at every k and tau, beside a result.json of version 0.1.0 before its release


@dataclass(frozen=True)
class Protocol:
    """The protocol of an accuracy or a rank; two of them compare if and only if their protocols are equal.

    Args:
        kind: `knn`, weighted k-NN; `linear`, a linear layer trained by SGD (paper, section 4.1); `logistic`, logistic
            regression on features of centre crops; `classifier`, the classifier that the network has; `rank`, no
            accuracy but the effective rank of features of training images.
        data: Name of the data set.
        train_images: Largest number of training images used; all where None.
        k: Neighbours of k-NN; None for `default_k` of the training images, or if it is unknown.
        temperature: tau of k-NN; None for votes without weights.
        head: `switchable` or `slimmable`.
        features: `cached`, of centre crops, or `augmented`.
        distillation: True if narrower widths also learned from the widest one's outputs.
        standardised: True if cached features were standardised.
        epochs: Epochs of the classifier.
        while_training: True if measured in the course of pre-training.
        source: Publication that reports the accuracy; None if it was measured here.
        choice: Words for the labelled images that were chosen, such as `1 % of the labels`; None for all.
    """

    kind: Kind
    data: str | None = None
    train_images: int | None = None
    k: int | None = None
    temperature: float | None = None
    head: str | None = None
    features: Literal['cached', 'augmented'] | None = None
    distillation: bool | None = None
    standardised: bool | None = None
    epochs: int | None = None
    while_training: bool = False
    source: str | None = None
    choice: str | None = None

    def __str__(self) -> str:
        words = [_WORDS[self.kind], *filter(None, (self.head, self.features))]
        if self.kind == 'knn':
            by_class = ['k by the images of a class'] if self.while_training else []
            words += by_class if self.k is None else [f'k={self.k}']
            words.append('unweighted' if self.temperature is None else f'tau={self.temperature:g}')
        words += ['without distillation'] if self.distillation is False else []
        words += [] if self.choice is None else [self.choice]
        words += [] if self.train_images is None else [f'at most {self.train_images} training images']
        words += ['not standardised'] if self.standardised is False and self.features == 'cached' else []
        words += [] if self.epochs is None else [f'{self.epochs} epoch{"" if self.epochs == 1 else "s"}']
        words += ['while training'] if self.while_training else []
        words += [] if self.source is None else [f'as reported by {self.source}']
        return ', '.join(words)

    @property
    def label(self) -> str:
        """Head of a column in one or two words."""
        words = {'knn': 'k-NN', 'linear': 'linear', 'logistic': 'linear', 'classifier': 'top-1', 'rank': 'rank'}
        label = words[self.kind]
        if self.source is not None:
            return f'{label}, reported'
        return label if self.while_training else f'{label} eval'


@dataclass(frozen=True)
class Result:
    """Accuracies, or ranks, of one network by one protocol.

    Args:
        network: Name or folder of the network.
        protocol: The protocol they were measured by.
        top1: Width -> top-1 accuracy in percent, in descending order of width; empty for ranks.
        top5: Width -> top-5 accuracy in percent, where measured.
        start: Width -> top-1 accuracy in percent, or rank, before training, where measured.
        images: Number of test images, where known; of a rank that of the images it was estimated from.
        settings: The configuration.
        environment: Command, hardware, versions and time, as `environment` gives them.
        rank: Width -> effective rank, for the protocol of ranks alone.
    """

    network: str
    protocol: Protocol
    top1: Mapping[float, float]
    top5: Mapping[float, float] = field(default_factory=dict)
    start: Mapping[float, float] = field(default_factory=dict)
    images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    rank: Mapping[float, float] = field(default_factory=dict)

    @property
    def values(self) -> Mapping[float, float]:
        """Width -> what the protocol measures: effective rank, or top-1 accuracy in percent."""
        return self.rank if self.protocol.kind == 'rank' else self.top1

    @property
    def mean(self) -> float:
        """Mean top-1 accuracy over the widths."""
        return mean(self.top1.values())

    def standard_error(self, width: float) -> float | None:
        """Binomial standard error of a width's top-1 accuracy in points; None if the number of images is unknown."""
        if not self.images:
            return None
        return 100 * sqrt(self.top1[width] / 100 * (1 - self.top1[width] / 100) / self.images)


def save(results: Sequence[Result], folder: Path) -> Path:
    """Write `result.json` into a folder, which is made if it does not exist, and return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps([asdict(result) for result in results], indent=2) + '\n')
    return folder / RESULT


def load(file: Path) -> list[Result]:
    """Read a `result.json`, also one from before protocols were typed; an InputError if the file is something else."""
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        if isinstance(content, dict):
            return _checked(_old_results(content, file.parent / _OLD_GRID))
        return _checked(
            Result(**{**each, 'protocol': Protocol(**each['protocol']), **_by_width(each, *_MEASURED)})
            for each in content
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f'{file} is not the result of an evaluation ({str(error)[:200]})') from error


def results_in(folder: Path) -> dict[Path, list[Result]]:
    """All results in the folder of a network: file -> its results, those of the network's own training first.

    Those of an unfinished run, or of one of before training wrote a `result.json`, come from its `metrics.jsonl`.
    """
    found = {}
    if (folder / RESULT).is_file():
        found[folder / RESULT] = load(folder / RESULT)
    elif (folder / RECIPE).is_file() and (folder / METRICS).is_file():
        from slimclr_hub.runs.command_line import read_recipe  # which takes a second that `list` does not have

        recipe, metrics = read_recipe(folder / RECIPE), read_metrics(folder / METRICS)
        try:
            found[folder / METRICS] = _checked(training_results(metrics, recipe, str(folder)))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(f'{folder / METRICS} and {RECIPE} are not those of a run ({error})') from error
    return {**found, **{file: load(file) for file in sorted(folder.glob(f'*/{RESULT}'))}}


def _checked(results: Iterable[Result]) -> list[Result]:
    """The results, if every value is of its type and in its range; a ValueError names one that is not."""
    results = list(results)
    hints = get_type_hints(Protocol)
    for result in results:
        for name, hint in hints.items():
            if not _is_a(getattr(result.protocol, name), hint):
                raise ValueError(f'{name} is {getattr(result.protocol, name)!r:.99}')
        for name in ('settings', 'environment'):
            if not isinstance(getattr(result, name), dict):
                raise ValueError(f'{name} is {getattr(result, name)!r:.99}')
        if not isinstance(result.network, str) or not _is_a(result.images, int | None):
            raise ValueError(f'network and images are {result.network!r:.99}, {result.images!r:.99}')
        for name in _MEASURED:
            most = 100 if name.startswith('top') else _HIGHEST_RANK
            for width, value in getattr(result, name).items():
                if not (0 < width <= 1 and _is_a(value, float) and 0 <= value <= most):
                    raise ValueError(f'{name} at width {width:g} is {value!r:.99}')
        if not result.values or (result.network == RAW_PIXELS and 1.0 not in result.values):
            raise ValueError(f'there is no value of {result.network!r:.99}')
        if not all(isinstance(value, str) for value in result.environment.values()):
            raise ValueError('environment holds more than texts')
    return results


def _is_a(value: object, hint: Any) -> bool:
    """True if a value of JSON is of the type that an annotation names."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:  # the latter with a Literal in it
        return any(_is_a(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return type(value) is hint


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; none where there is no such file.

    Raises:
        InputError: It cannot be read, or has a line without a step and a kind.
    """
    try:
        records = read_json_lines(file)
    except OSError as error:
        raise InputError(f'{file} cannot be read: {error.strerror}') from error
    for record in records:
        kinds = [type(record.get(name)) for name in ('step', 'kind')] if isinstance(record, dict) else []
        if kinds != [int, str]:
            raise InputError(f'{file} has a line that no run writes, {str(record)[:60]!r}; remove the line')
    return records


def training_results(
    metrics: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    network: str,
    k: int | None = None,
    images: int | None = None,
) -> list[Result]:
    """The last accuracies and ranks of a pre-training run, with the first ones as `start`; those of raw pixels last.

    `metrics` are lines of `metrics.jsonl`, `network` is the run's folder, and `k` is for a recipe that leaves it open.
    """
    knn = recipe.get('knn') or {}
    measured: dict[str, list[dict[float, float]]] = {name: [] for name in _WHILE_TRAINING}
    rank_images: int | None = None
    for record in metrics:
        rank_images = record.get('rank_images', rank_images)
        for name, accuracies in measured.items() if record.get('kind') == 'eval' else ():
            values = {key.partition('/')[2]: value for key, value in record.items() if key.startswith(f'{name}/')}
            if values:
                accuracies.append({float(width): value for width, value in values.items()})
    pixels = {key: value for record in metrics for key, value in record.items() if key.startswith(RAW_PIXELS_KEY)}
    results, baselines = [], []
    for name, accuracies in measured.items():
        if not accuracies:
            continue
        kind = _WHILE_TRAINING[name]
        protocol = Protocol(
            kind,
            data_name(recipe.get('data') or {}),
            train_images=None if kind == 'classifier' else knn.get('bank'),
            k=(knn.get('k') or k) if kind == 'knn' else None,
            temperature=knn.get('temperature') if kind == 'knn' else None,
            while_training=True,
        )
        start = accuracies[0] if len(accuracies) > 1 else {}
        last: dict[str, Any] = {'top1': accuracies[-1], 'images': images}
        if kind == 'rank':
            last = {'top1': {}, 'rank': accuracies[-1], 'images': rank_images}
        results.append(Result(network, protocol, **last, start=start, settings=dict(recipe)))
        if (top1 := pixels.get(f'{RAW_PIXELS_KEY}/{name}')) is not None:
            baselines.append(Result(RAW_PIXELS, protocol, {1.0: top1}, images=images))
    return results + baselines


def data_name(data: Mapping[str, Any]) -> str:
    """Name in tables of the data set in the `data` section of a configuration."""
    name, root = str(data.get('name', 'unknown data')), data.get('root')
    if name in ('folder', 'wds/') and root:
        name = Path(root).resolve().name
    return IMAGENET if name.rpartition('/')[2].lower() in _IMAGENET_NAMES else name


def environment() -> dict[str, str]:
    """Command, hardware, versions and time, to be kept with a measurement."""
    import timm
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processors()
    return {
        'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'hardware': device,
        'versions': f'slimclr_hub {__version__}, torch {torch.__version__}, timm {timm.__version__}, '
        f'Python {platform.python_version()}',
        'time': datetime.now(timezone.utc).isoformat(timespec='microseconds'),
    }


def _old_results(content: dict[str, Any], grid: Path) -> list[Result]:
    """Results of a `result.json` whose protocol was a sentence: typed ones, made from the settings."""
    settings = content['settings']
    data = data_name(settings.get('data') or {})
    records = [content]
    if content['kind'] == 'linear':
        probe, features = (settings.get(section) or {} for section in ('probe', 'features'))
        mode, standardise = features.get('mode'), features.get('standardise')
        about: dict[str, Any] = {key: probe.get(key) for key in ('head', 'distillation')}
        about |= {'features': mode, 'standardised': mode == 'cached' if standardise is None else standardise}
        epochs = (settings.get('optim') or {}).get('epochs')
        protocols = [Protocol('linear', data, features.get('train_images'), epochs=epochs, **about)]
    elif grid.is_file():
        records = sorted(json.loads(grid.read_text(encoding='utf-8')), key=lambda each: -mean(each['top1'].values()))
        protocols = [Protocol('knn', data, each['bank'], each['k'], each['temperature']) for each in records]
    else:
        only = {key: settings[key][0] for key in ('k', 'temperature') if len(settings.get(key) or ()) == 1}
        protocols = [Protocol('knn', data, settings.get('bank'), **only)]
    found = []
    for protocol, record in zip(protocols, records, strict=True):
        top1, top5 = _by_width(record, 'top1', 'top5').values()
        images = settings.get('validation_images')
        found.append(Result(content['network'], protocol, top1, top5, {}, images, settings, content['environment']))
    return found


def _by_width(record: Mapping[str, Any], *names: str) -> dict[str, dict[float, float]]:
    # JSON has no numbers as keys.
    return {name: {float(width): value for width, value in record.get(name, {}).items()} for name in names}
