"""Logistic regression on several data sets, at every width: `recipes/suite_eval.py`.

FOLDER/suite.json           scores of each data set and width, with what decides them
       suite.png, .pdf      scores by width
       features/            features of the images, which may be removed
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator

from slimclr_hub.data import DataConfig
from slimclr_hub.data.subset import held_out
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.evaluate.features import FeatureCache, SplitFeatures
from slimclr_hub.evaluate.logistic import fit_linear
from slimclr_hub.evaluate.network import check_images, data_defaults, default_output, open_encoder
from slimclr_hub.files import write_text
from slimclr_hub.runs.command_line import config_of, make_parser, parse, run_script
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure
from slimclr_hub.runs.launcher import launched
from slimclr_hub.runs.lock import folder_lock
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import check_fraction, check_precision, check_seed, one_of, read_yaml
from slimclr_hub.weights.hashes import state_hash

RESULT = 'suite.json'
METRICS = ('top1', 'mean_per_class')
WEIGHT_DECAYS = tuple(10 ** (power / 2) for power in range(-12, 1))
_LOOK = ('size', 'channels', 'mean', 'std', 'crop_pct')
_ITERATIONS = 1000


@dataclass(frozen=True)
class SuiteSet:
    """One data set of a suite: its images, tested on `data.val_split`, and the metric that is usual for it."""

    data: DataConfig
    metric: str = 'top1'

    def __post_init__(self) -> None:
        one_of('metric', self.metric, METRICS)
        if self.data.streams:
            raise InputError(f'data.name {self.data.name} is a stream, and features are kept by index; give hfds/')
        check_images(self.data)


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Multinomial logistic regression on features of a frozen network, on several data sets.

    Args:
        network: Folder, tag or hf-hub:USER/NAME of a network, `raw pixels`, or `random weights of NETWORK`.
        suite: YAML file with a section for each data set: keys are those of `--data`, and `metric`, which is top1 or
            mean_per_class. Size and normalisation are the network's where they are not given.
        hold_out: Share of the training images of each class on which the strength of regularisation is chosen.
        seed: Seed of that choice of images, and of random weights.
        precision: no for float32, bf16 or fp16; what accelerate was told where null.
        output: Folder of the result; `suite_eval` in the folder of the network where null.
    """

    network: str
    suite: str
    hold_out: float = 0.2
    seed: int = 0
    precision: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        check_fraction('hold_out', self.hold_out)
        check_seed('seed', self.seed)
        check_precision('precision', self.precision)

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return Path(self.output) if self.output is not None else default_output(self.network, 'suite_eval')


def main() -> None:
    """Read the command line, evaluate, print a table and draw a figure."""
    run_script(lambda: _suite_eval(sys.argv[1:]))


def _suite_eval(argv: Sequence[str]) -> None:
    parser = make_parser(
        SuiteConfig,
        'suite_eval.py',
        '--network NETWORK --suite FILE',
        'Logistic regression on several data sets, at every width.',
    )
    config = config_of(SuiteConfig, parse(parser, argv))
    look = {key.removeprefix('data.'): value for key, value in data_defaults(argv).items()}
    sets = read_suite(Path(config.suite), {key: look[key] for key in _LOOK})
    accelerator = launched(config.precision, 'precision', trains=False)
    config.folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(config.folder, accelerator):
        found = evaluate(config, sets, accelerator)
        if accelerator.is_main_process:
            _draw(found, config.folder / 'suite')
            print_table(config.network, found)
            print(f'Result: {config.folder / RESULT}\nFigure: {config.folder / "suite.png"}')
    accelerator.end_training()


def read_suite(path: Path, look: Mapping[str, Any]) -> dict[str, SuiteSet]:
    """Read the data sets of a suite, by name; `look` has the size and normalisation of those that give none.

    Raises:
        InputError: The file is not one of a suite, or its images are not there.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content or not all(isinstance(each, dict) for each in content.values()):
        raise InputError(f'{path} is no suite; give a section of keys such as `name` and `root` for each data set')
    known = [field.name for field in fields(DataConfig)]
    sets = {}
    for name, section in content.items():
        if unknown := [str(key) for key in section if key not in (*known, 'metric')]:
            raise InputError(f'{path}, {name}: there is no key {shorten(unknown)}; give {", ".join(known)} or metric')
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
        metric: Any = values.pop('metric', 'top1')
        try:
            sets[str(name)] = SuiteSet(DataConfig(**{**look, **values}), metric)
        except (InputError, TypeError) as error:
            raise InputError(f'{path}, {name}: {error}') from error
    return sets


Found = dict[str, dict[str, Any]]
"""Data set -> `scores` and `weight_decays` by width, `metric`, numbers of images and classes, and `settings`."""


def evaluate(config: SuiteConfig, sets: Mapping[str, SuiteSet], accelerator: Accelerator) -> Found:
    """Measure the scores of all sets that the folder does not have yet, and write each at once.

    Raises:
        InputError: Images or their classes do not suit the network, or the folder has a file of something else.
    """
    recorded = from_main_process(lambda: _read(config.folder / RESULT))
    found: Found = {}
    for name, each in sets.items():
        encoder = open_encoder(config.network, each.data, config.seed)
        encoder.reset_classifier(0)
        encoder.eval().requires_grad_(False).to(accelerator.device)
        settings = {
            **each.data.fingerprint(),
            'metric': each.metric,
            'hold_out': config.hold_out,
            'seed': config.seed,
            'precision': accelerator.mixed_precision,
            'weights': state_hash(encoder),
        }
        if recorded.get(name, {}).get('settings') == settings:
            accelerator.print(f'{name}: measured before')
            found[name] = recorded[name]
            continue
        cache = FeatureCache(config.folder / 'features', accelerator, encoder, each.data, 'output')
        assert each.data.val_split is not None
        train, test = cache.features(each.data.train_split), cache.features(each.data.val_split)
        scores, decays = from_main_process(partial(_scores, name, each, train, test, config))
        found[name] = {
            'metric': each.metric,
            'scores': scores,
            'weight_decays': decays,
            'train_images': len(train.labels),
            'images': len(test.labels),
            'settings': settings,
        }
        recorded |= found
        if accelerator.is_main_process:
            content = {'network': config.network, 'sets': recorded, 'environment': environment()}
            write_text(config.folder / RESULT, json.dumps(content, indent=2) + '\n')
    return found


def _read(path: Path) -> Found:
    if not path.is_file():
        return {}
    try:
        sets = json.loads(path.read_text(encoding='utf-8'))['sets']
        for each in sets.values():
            for key in 'scores', 'weight_decays':
                each[key] = {float(width): float(value) for width, value in each[key].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is not the result of a suite ({error!r}); give another --output') from error
    return sets


def _scores(
    name: str, each: SuiteSet, train: SplitFeatures, test: SplitFeatures, config: SuiteConfig
) -> tuple[dict[float, float], dict[float, float]]:
    """Score and weight decay of each width: the decay is chosen on held-out images, and then all of them are used."""
    where = f'{name}: data.name {each.data.name}'
    classes = len(train.class_names) if train.class_names else int(train.labels.max()) + 1
    for split, labels in ((each.data.train_split, train.labels), (each.data.val_split, test.labels)):
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(f'{where}, split {split}: images have no class, or one that no training image has')
    try:
        out = torch.from_numpy(held_out(train.labels.cpu().numpy(), config.hold_out, config.seed))
    except InputError as error:
        raise InputError(f'{where}: {error}') from error
    kept = torch.ones(len(train.labels), dtype=torch.bool)
    kept[out] = False
    kept, out = kept.to(train.labels.device), out.to(train.labels.device)
    measure = top1 if each.metric == 'top1' else mean_per_class
    scores, decays = {}, {}
    for width, x in train.by_width.items():

        def score(
            decay: float, x: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor
        ) -> float:
            linear, shift, deviation = fit_linear(x, labels, decay, _ITERATIONS, classes)
            with torch.no_grad():
                return measure(linear((queries - shift) * deviation).argmax(1), truth)

        held = {d: score(d, x[kept], train.labels[kept], x[out], train.labels[out]) for d in WEIGHT_DECAYS}
        # The strongest of those that are as good.
        decays[width] = max(held, key=lambda decay: (held[decay], decay))
        scores[width] = score(decays[width], x, train.labels, test.by_width[width], test.labels)
    return scores, decays


def top1(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose class [N] was found, in percent."""
    return 100 * (found == labels).double().mean().item()


def mean_per_class(found: torch.Tensor, labels: torch.Tensor) -> float:
    """The same within each class that occurs, in the mean over classes."""
    count = labels.bincount()
    hits = labels[found == labels].bincount(minlength=len(count))
    return 100 * (hits[count > 0].double() / count[count > 0]).mean().item()


def print_table(network: str, found: Found) -> None:
    """Print the score of each data set at each width, and their mean."""
    widths = list(next(iter(found.values()))['scores'])
    rows = [
        [name, each['metric'].replace('_', ' '), str(each['images']), *(f'{each["scores"][w]:.1f}' for w in widths)]
        for name, each in found.items()
    ]
    if len(found) > 1:
        rows.append(['mean', '', '', *(f'{mean(each["scores"][w] for each in found.values()):.1f}' for w in widths)])
    notes = [
        'Logistic regression on features of centre crops, regularised as was best on held-out training images '
        '(Kornblith et al. 2019).'
    ]
    headers = ['data set', 'metric', 'images', *(f'width {width:g}' for width in widths)]
    TextTable(f'{network}: scores (%) by data set', headers, rows, notes, names=2).print()


def _draw(found: Found, path: Path) -> None:
    figure, (axis,) = new_figure()
    for i, (name, each) in enumerate(found.items()):
        axis.plot(list(each['scores']), list(each['scores'].values()), label=name, marker=marker(i), **line_style(i))
    axis.set_xlabel('width')
    axis.set_ylabel('score (%)')
    axis.legend()
    save_figure(figure, path)
