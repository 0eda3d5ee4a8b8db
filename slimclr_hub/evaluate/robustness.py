"""Accuracy of a network's classifier at every width on corrupted and other images: `recipes/robustness.py`.

FOLDER/robustness.json      accuracies of every corruption, severity and width
       robustness.png, .pdf mean over corruptions, by severity
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import Accelerator
from timm.data import ImageNetInfo

from slimclr_hub.data import DataConfig
from slimclr_hub.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import make_dataset, split_folder
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import extract_features, with_progress
from slimclr_hub.evaluate.linear_eval.probe import accuracies
from slimclr_hub.evaluate.network import (
    check_channels,
    check_images,
    check_same,
    data_defaults,
    default_output,
    open_for_test,
)
from slimclr_hub.files import try_folder, write_text
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import config_of, make_parser, parse, run_script
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure
from slimclr_hub.runs.launcher import launched
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import at_least, check_precision, check_seed, one_of, plain
from slimclr_hub.weights.bounded import read_json
from slimclr_hub.weights.hashes import state_hash

RESULT = 'robustness.json'
_IMAGENET = 1000
CLEAN = 'clean'

Found = dict[str, dict[int, dict[float, float]]]
"""Corruption -> severity -> width -> top-1 accuracy in percent; `clean` has the severity 0 alone."""


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """Accuracy of the network's own classifier on corrupted validation images.

    Args:
        network: Folder, tag or hf-hub:USER/NAME of a network with a classifier, as fine-tuning and a linear evaluation
            with --save_to leave it.
        data: The images; those of the run unless given, else ImageNet. Classes have to be those of the classifier; for
            ImageNet's thousand also some of them, in folders named by synset or number, as ImageNet-V2, R, A and Sketch
            have them.
        corruptions: Corruptions to try; all where null, none where empty.
        severities: Severities to try, of 1 to 5.
        images: Images to test on, a fixed random choice; all where null.
        seed: Seed of that choice, and of the corruptions.
        precision: no for float32, bf16 or fp16; what accelerate was told where null.
        output: Folder of the result; `robustness` in the folder of the network where null.
    """

    network: str
    data: DataConfig = field(default_factory=DataConfig)
    corruptions: tuple[str, ...] | None = None
    severities: tuple[int, ...] = SEVERITIES
    images: int | None = None
    seed: int = 0
    precision: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for name in self.corruptions or ():
            one_of('corruptions', name, CORRUPTIONS)
        for severity in self.severities:
            one_of('severities', severity, SEVERITIES)
        if not self.severities or len(set(self.severities)) < len(self.severities):
            raise InputError(f'severities is {list(self.severities)}; give one or several different ones')
        if self.images is not None:
            at_least('images', self.images, 1)
        check_seed('seed', self.seed)
        check_precision('precision', self.precision)

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions."""
        return tuple(CORRUPTIONS) if self.corruptions is None else self.corruptions

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return Path(self.output) if self.output is not None else default_output(self.network, 'robustness')


def main() -> None:
    """Read the command line, evaluate, print a table and draw a figure."""
    run_script(lambda: _robustness(sys.argv[1:]))


def _robustness(argv: Sequence[str]) -> None:
    parser = make_parser(
        RobustnessConfig, 'robustness.py', '--network NETWORK', 'Accuracy on corrupted images at every width.'
    )
    parser.set_defaults(data_defaults(argv))
    config = config_of(RobustnessConfig, parse(parser, argv))
    if not _has_folder(config.data):
        check_images(config.data)
    accelerator = launched(config.precision, 'precision', trains=False)
    model = open_for_test(config.network)
    weights = state_hash(model)
    from_main_process(lambda: _check_output(config, weights))
    found, tested = evaluate(config, accelerator, model)
    if accelerator.is_main_process:
        record = {
            'settings': {**plain(asdict(config)), 'weights': weights},
            'images': tested,
            'top1': found,
            'environment': environment(),
        }
        write_text(config.folder / RESULT, json.dumps(record, indent=2) + '\n')
        print_table(config.network, found, tested)
        print(f'Result: {config.folder / RESULT}')
        if len(found) > 1:
            _draw(found, config.folder / 'robustness')
            print(f'Figure: {config.folder / "robustness.png"}')
    accelerator.end_training()


def _check_output(config: RobustnessConfig, weights: str) -> None:
    file = config.folder / RESULT
    if file.exists():
        try:
            recorded = dict(read_json(file)['settings'])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f'{file} is not the result of robustness.py ({error!r}); give another --output') from error
        check_same(file, recorded, config, weights)
    try_folder(config.folder, 'output')


def _has_folder(data: DataConfig) -> bool:
    """True if the images to test on are a folder of their own, wherever training images may be."""
    if data.name != 'folder' or data.root is None or data.val_split in (None, data.train_split):
        return False
    return split_folder(Path(data.root), str(data.val_split)) is not None


def imagenet_classes(names: Sequence[str] | None) -> list[int] | None:
    """Classes 0 to 999 of ImageNet that are called by synsets, or by numbers as in ImageNet-V2; None of other names."""
    numbers = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    numbers |= {str(number): number for number in numbers.values()}
    return [numbers[name] for name in names] if names and all(name in numbers for name in names) else None


def evaluate(config: RobustnessConfig, accelerator: Accelerator, model: SlimmableResNet) -> tuple[Found, int]:
    """Measure accuracies on clean images and on each corruption at each severity; and the number of images.

    Raises:
        InputError: The network has no classifier, or the images do not suit it.
    """
    if not model.num_classes:
        raise InputError(
            f'{config.network} has no classifier; `recipes/finetune.py`, or `recipes/linear_eval.py` with --save_to, '
            'gives it one'
        )
    check_channels(config.network, model, config.data)
    assert config.data.val_split is not None
    model.to(accelerator.device)
    found: Found = {}
    tested = 0
    # Opened once for all cases: listing a large folder takes a while.
    images = None if config.data.streams else make_dataset(config.data, config.data.val_split)
    classes: list[int] | None = None
    cases = [Corruption(name, severity, config.seed) for name in config.names for severity in config.severities]
    for case in (None, *cases):
        loader = eval_loader(
            config.data,
            config.data.val_split,
            config.images,
            config.seed,
            accelerator.num_processes,
            alter=case,
            images=images,
        )
        title = CLEAN if case is None else f'{case.name} {case.severity}'
        batches = with_progress(accelerator, loader.prepared(accelerator), loader.total, title)
        logits, labels = extract_features(accelerator, model, batches, model.widths)
        if model.num_classes == _IMAGENET:
            classes = imagenet_classes(loader.source.class_names)
        if classes is not None:
            # Only these compete, as where ImageNet-R and A were published (Hendrycks et al. 2021).
            logits = {width: x[:, classes] for width, x in logits.items()}
        least, most = labels.min().item(), labels.max().item()
        if least < 0 or most >= next(iter(logits.values())).shape[1]:
            raise InputError(
                f'data.name {config.data.name}, split {config.data.val_split}: there are images of class {most} or of '
                f'none, and the classifier of {config.network} has {model.num_classes} classes; give images of these'
            )
        name, severity = (CLEAN, 0) if case is None else (case.name, case.severity)
        found.setdefault(name, {})[severity] = accuracies(lambda x, _: x, logits, labels, 1)
        tested = len(labels)
    if classes is not None and len(classes) < _IMAGENET:
        accelerator.print(f'Of the classes of ImageNet the {len(classes)} that these images have compete')
    return found, tested


def print_table(network: str, found: Found, tested: int) -> None:
    """Print accuracies by width: clean, of each corruption in the mean over severities, and relative to clean."""
    clean = found[CLEAN][0]
    rows = [[CLEAN, *(f'{value:.1f}' for value in clean.values())]]
    means: dict[float, list[float]] = {width: [] for width in clean}
    for name, by_severity in found.items():
        if name == CLEAN:
            continue
        cells = []
        for width in clean:
            value = mean(of[width] for of in by_severity.values())
            means[width].append(value)
            cells.append(f'{value:.1f}')
        rows.append([name.replace('_', ' '), *cells])
    if len(found) == 1:
        TextTable(f'{network}: top-1 accuracy (%)', ['', *_heads(clean)], rows, [f'{tested} images.']).print()
        return
    rows.append(['mean', *(f'{mean(values):.1f}' for values in means.values())])
    relative = (mean(values) / clean[width] if clean[width] else 0.0 for width, values in means.items())
    rows.append(['relative to clean', *(f'{value:.2f}' for value in relative)])
    severities = ', '.join(str(severity) for severity in next(of for name, of in found.items() if name != CLEAN))
    notes = [
        f'{tested} images; each corruption in the mean over the severities {severities}.',
        'Kinds and strengths after Hendrycks & Dietterich 2019; the draws are our own, so none of it compares with '
        'ImageNet-C.',
    ]
    TextTable(f'{network}: top-1 accuracy (%) on corrupted images', ['', *_heads(clean)], rows, notes).print()


def _heads(clean: Mapping[float, float]) -> list[str]:
    return [f'width {width:g}' for width in clean]


def _draw(found: Found, path: Path) -> None:
    clean = found[CLEAN][0]
    figure, (axis,) = new_figure()
    severities: list[Any] = sorted(next(of for name, of in found.items() if name != CLEAN))
    for i, width in enumerate(clean):
        values = [mean(of[severity][width] for name, of in found.items() if name != CLEAN) for severity in severities]
        axis.plot(
            [0, *severities], [clean[width], *values], label=f'width {width:g}', marker=marker(i), **line_style(i)
        )
    axis.set_xlabel('severity')
    axis.set_ylabel('top-1 accuracy (%), mean over corruptions')
    axis.legend()
    save_figure(figure, path)
