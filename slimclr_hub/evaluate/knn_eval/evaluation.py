"""Weighted k-NN of a network at every width, for several k and tau: what `recipes/knn_eval.py` runs."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from slimclr_hub.data import DataConfig, ImagesConfig
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import vote
from slimclr_hub.evaluate.knn_eval.report import Accuracy, best_of, draw_accuracies, print_accuracies, write_accuracies
from slimclr_hub.evaluate.knn_eval.shares import neighbours_in_all, share_features, share_loader
from slimclr_hub.evaluate.result import RESULT, EvalResult, load_result
from slimclr_hub.evaluate.subject import (
    Subject,
    check_channels,
    check_images,
    data_defaults,
    default_output,
    open_subject,
)
from slimclr_hub.models.calibrate import is_calibrated
from slimclr_hub.models.widths import check_width, check_widths
from slimclr_hub.runs.command_line import make_parser, parse, run_script
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.result import environment
from slimclr_hub.settings import PRECISIONS, above, at_least, one_of, plain

_TOP = 5
_NO_EFFECT = ('output', 'chunk')


@dataclass(frozen=True)
class KNNEvalConfig:
    """Weighted k-NN of a network: each image of the validation split by its neighbours in the training split.

    Args:
        network: Folder of a run or a network, a tag, or hf-hub:USER/NAME.
        data: The images; those of the run unless given, else ImageNet. `data.batch_size` is that of one process.
        k: Numbers of neighbours; one search serves all.
        temperature: Values of tau; null for votes without weights, the limit of a large one.
        widths: Widths to evaluate; all of the network where null.
        bank: Training images to search at most, a fixed random choice; all where null.
        seed: Seed of that choice.
        precision: no for float32, bf16 or fp16; what accelerate was told where null.
        chunk: Queries of all processes at a time. A process needs about chunk x 65,536 numbers for it at most.
        output: Folder of the result; knn_eval in the folder of the network where null.
    """

    network: str
    data: DataConfig = field(default_factory=DataConfig)
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: tuple[float | None, ...] = (0.07, 0.1)
    widths: tuple[float, ...] | None = None
    bank: int | None = None
    seed: int = 0
    precision: str | None = None
    chunk: int = 1024
    output: str | None = None

    def __post_init__(self) -> None:
        for name in 'k', 'temperature':
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(f'{name} is {list(values)}; give one value or several different ones')
        for k in self.k:
            at_least('k', k, 1)
        for temperature in self.temperature:
            if temperature is not None:
                above('temperature', temperature, 0)
        if self.widths is not None:
            check_widths(self.widths)
        if self.bank is not None:
            at_least('bank', self.bank, 1)
        at_least('chunk', self.chunk, 1)
        if not 0 <= self.seed < 2**32:
            raise InputError(f'seed is {self.seed}; give 0 to 2**32 - 1')
        if self.precision is not None:
            one_of('precision', self.precision, PRECISIONS)

    @property
    def folder(self) -> Path:
        """Where the result lies."""
        return Path(self.output) if self.output is not None else default_output(self.network, 'knn_eval')


def main() -> None:
    """Read the command line, evaluate, and end with a table and a figure."""
    run_script(lambda: _knn_eval(sys.argv[1:]))


def _knn_eval(argv: Sequence[str]) -> None:
    parser = make_parser(KNNEvalConfig, 'knn_eval.py', '--network NETWORK', 'Weighted k-NN at every width.')
    parser.set_defaults(data_defaults(argv))
    built = parse(parser, argv)
    config = KNNEvalConfig(**{name: built[name] for name in KNNEvalConfig.__dataclass_fields__})
    _check_output(config)
    check_images(config.data)
    try:
        accelerator = Accelerator(mixed_precision=config.precision)
    except ValueError as error:
        raise InputError(f'precision {config.precision}: {error}') from error
    accuracies = evaluate(config, open_subject(config.network), accelerator)
    if accelerator.is_main_process:
        best = best_of(accuracies)
        # What lies beside the result is there before it is.
        write_accuracies(accuracies, config.folder)
        draw_accuracies(accuracies, config.folder / 'knn')
        result = EvalResult(
            'knn', best.protocol, config.network, best.top1, best.top5, plain(asdict(config)), environment()
        )
        result.save(config.folder)
        print_accuracies(accuracies, config.network)
        print(f'Result: {config.folder / RESULT}\nFigure: {config.folder / "knn.png"}')
    accelerator.end_training()


def evaluate(config: KNNEvalConfig, subject: Subject, accelerator: Accelerator) -> list[Accuracy]:
    """Accuracies for every k and tau, the same on all processes.

    With P processes, each holds the features of 1/P of the training images and 1/P of the validation images at all
    widths in main memory, 4 bytes a number: for ImageNet and ResNet-50 at four widths 27 GB / P.
    On its device are those of the training images at one width at a time, 10.5 GB / P at most, and one chunk of the
    search. No process holds all features or all similarities.

    Args:
        config: What to do.
        subject: The network; it loses its classifier.
        accelerator: The processes.

    Raises:
        InputError: The images have no labels, are fewer than k, not apart from each other or not such as the network
            takes; or a width is not one of the network's or has never been trained.
    """
    model = subject.model
    widths = model.widths if config.widths is None else check_widths(config.widths)
    for width in widths:
        if not is_calibrated(model, check_width(width, model.widths)):
            raise InputError(
                f'{config.network} has never been trained at width {width:g}; leave it out of --widths, or see '
                'slimclr_hub.models.calibrate'
            )
    check_images(config.data)
    check_channels(subject, config.data)
    assert config.data.val_split is not None
    bank_loader, size = share_loader(config.data, config.data.train_split, config.bank, config.seed, accelerator)
    query_loader, count = share_loader(config.data, config.data.val_split, None, config.seed, accelerator)
    if max(config.k) > size:
        raise InputError(f'k {max(config.k)} is more than the {size} training images to search; give at most {size}')
    model.reset_classifier(0)
    model.to(accelerator.device)
    bank, labels = share_features(accelerator, model, bank_loader, widths, size)
    queries, truth = share_features(accelerator, model, query_loader, widths, count)
    labels, truth = labels.to(accelerator.device), truth.to(accelerator.device)
    classes = classes_of(accelerator, torch.cat([labels, truth]), config.data.name)
    hits = {}
    with progress_bar(count * len(widths), 'neighbours', accelerator.is_main_process) as bar:
        for width in widths:
            hits[width] = _hits(accelerator, config, (queries[width], truth), (bank[width], labels), classes, bar)
    return [
        Accuracy(
            k=k,
            temperature=temperature,
            bank=size if config.bank is not None else None,
            top1={width: 100 * hits[width][k, temperature][0] / count for width in widths},
            top5={width: 100 * hits[width][k, temperature][1] / count for width in widths} if classes > _TOP else {},
        )
        for temperature in config.temperature
        for k in sorted(config.k)
    ]


def _hits(
    accelerator: Accelerator,
    config: KNNEvalConfig,
    queries: tuple[torch.Tensor, torch.Tensor],
    bank: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    bar: Any,
) -> dict[tuple[int, float | None], list[int]]:
    """Queries of all processes whose class is the first, and among the first five, for each k and tau."""
    (features, truth), (others, labels) = queries, bank
    others = others.to(accelerator.device)
    combinations = product(config.k, config.temperature)
    counts = {combination: torch.zeros(2, dtype=torch.long, device=truth.device) for combination in combinations}
    done = 0
    for neighbours in neighbours_in_all(accelerator, features, others, labels, max(config.k), config.chunk):
        expected = truth[done : done + len(neighbours.labels)]
        done += len(expected)
        for temperature in config.temperature:
            for k, votes in vote(neighbours, config.k, temperature, classes):
                rank = rank_of(votes, expected)
                counts[k, temperature] += torch.stack([(rank < top).sum() for top in (1, _TOP)])
        bar.update(len(expected) * accelerator.num_processes)
    summed = accelerator.reduce(torch.stack(list(counts.values())), 'sum')
    return dict(zip(counts, summed.tolist(), strict=True))


def rank_of(votes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Place of the true class by votes, from 0; equal votes are in the order of the classes, and no vote is the last.

    Args:
        votes: Votes for each class [Q, C].
        truth: True classes [Q].

    Returns:
        Integers [Q].
    """
    truth = truth[:, None]
    own = votes.gather(1, truth)
    earlier = torch.arange(votes.shape[1], device=votes.device) < truth
    rank = ((votes > own) | ((votes == own) & earlier)).sum(1)
    return torch.where(own[:, 0] > 0, rank, votes.shape[1])


def classes_of(accelerator: Accelerator, labels: torch.Tensor, name: str) -> int:
    """Number of classes, from the labels of all processes.

    Args:
        accelerator: The processes.
        labels: Those of this one, integers [N] on the device, of which there may be none.
        name: Of the data set, for the error.

    Raises:
        InputError: A label is negative, as where there are none.
    """
    lowest, highest = labels.aminmax() if len(labels) else (labels.new_zeros(()), labels.new_zeros(()))
    of_all = accelerator.gather(torch.stack([lowest, highest]))
    if of_all.min() < 0:
        raise InputError(f'k-NN needs a label for every image, and some of data.name {name} have none')
    return int(of_all.max()) + 1


def _check_output(config: KNNEvalConfig) -> None:
    file = config.folder / RESULT
    if not file.exists():
        return
    before, now = (_with_effect(settings) for settings in (load_result(file).settings, plain(asdict(config))))
    if before != now:
        changed = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise InputError(
            f'{file} is there already, by other settings ({", ".join(changed)}); give another folder, such as '
            f'--output {config.folder}-2, or remove it'
        )


def _with_effect(settings: Any) -> dict[str, Any]:
    images = {field.name for field in fields(ImagesConfig)}
    data = {f'data.{key}': value for key, value in settings.get('data', {}).items() if key in images}
    return {key: value for key, value in settings.items() if key not in ('data', *_NO_EFFECT)} | data
