"""Weighted k-NN accuracy of a network at every width, for several k and tau, and rank: `recipes/knn_eval.py`.

The features of training and validation images are divided over the processes, so that none of them holds all.
Shapes: Q queries of this process, N labelled images of this process, D features.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from slimclr_hub.data import DataConfig
from slimclr_hub.data.labels import UNREADABLE
from slimclr_hub.data.loaders import EvalLoader, eval_loader
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.evaluate.baselines import Encoder, RawPixels, is_small, random_weights, raw_pixels
from slimclr_hub.evaluate.features import NOTHING_READ, readable, with_progress
from slimclr_hub.evaluate.knn import Neighbours, default_k, merge, nearest, vote
from slimclr_hub.evaluate.network import (
    check_channels,
    check_images,
    check_network,
    check_same,
    data_defaults,
    default_output,
    open_for_test,
)
from slimclr_hub.evaluate.rank import RANK_IMAGES, gram_matrix, rank_of_gram, rank_rows
from slimclr_hub.files import try_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import is_calibrated
from slimclr_hub.models.widths import check_width, check_widths
from slimclr_hub.runs.command_line import config_of, make_parser, parse, run_script
from slimclr_hub.runs.figures import GREY, line_style, marker, new_figure, save_figure
from slimclr_hub.runs.launcher import launched
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.result import (
    RANDOM_WEIGHTS,
    RAW_PIXELS,
    RESULT,
    Protocol,
    Result,
    data_name,
    environment,
    load,
    save,
)
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import Incidental, above, at_least, check_precision, check_seed, plain
from slimclr_hub.weights.hashes import state_hash

_TOP = 5


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Incidental):
    """Memory, output, and what to compare with.

    Args:
        chunk: Queries of all processes at a time. A process needs at most about chunk x 65,536 numbers for it.
        output: Folder of the result; knn_eval in the folder of the network where null.
        baselines: State what random weights and the pixels of the images reach, too; never for images of more than 64
            pixels a side.
    """

    chunk: int = 1024
    output: str | None = None
    baselines: bool = True


@dataclass(frozen=True, kw_only=True)
class KNNEvalConfig(OutputConfig):
    """Weighted k-NN of a network: each validation image is classified by its neighbours among the training images.

    Args:
        network: Folder of a run or a network, a tag, or hf-hub:USER/NAME.
        data: The images; those of the run unless given, else ImageNet. `data.batch_size` is that of one process.
        k: Numbers of neighbours, which one search serves; a tenth of the training images of a class where null, but at
            least 5 and at most 200.
        temperature: Values of tau; null for votes without weights, the limit of a large one.
        widths: Widths to evaluate; all of the network where null.
        bank: Number of training images to search, a fixed random choice, where there are more; all where null.
        seed: Seed of that choice.
        precision: no for float32, bf16 or fp16; what accelerate was told where null.
    """

    network: str
    data: DataConfig = field(default_factory=DataConfig)
    k: tuple[int, ...] | None = None
    temperature: tuple[float | None, ...] = (0.07, 0.1)
    widths: tuple[float, ...] | None = None
    bank: int | None = None
    seed: int = 0
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in 'k', 'temperature':
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise InputError(f'{name} is {list(values)}; give one value or several different ones')
        for k in self.k or ():
            at_least('k', k, 1)
        for temperature in self.temperature:
            if temperature is not None:
                above('temperature', temperature, 0)
        if self.widths is not None:
            check_widths(self.widths)
        if self.bank is not None:
            at_least('bank', self.bank, 1)
        at_least('chunk', self.chunk, 1)
        check_seed('seed', self.seed)
        check_precision('precision', self.precision)

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return Path(self.output) if self.output is not None else default_output(self.network, 'knn_eval')


def main() -> None:
    """Read the command line, evaluate, print a table and draw a figure."""
    run_script(lambda: _knn_eval(sys.argv[1:]))


def _knn_eval(argv: Sequence[str]) -> None:
    parser = make_parser(KNNEvalConfig, 'knn_eval.py', '--network NETWORK', 'Weighted k-NN at every width.')
    parser.set_defaults(data_defaults(argv))
    config = config_of(KNNEvalConfig, parse(parser, argv))
    check_network(config.network)
    check_images(config.data)
    accelerator = launched(config.precision, 'precision', trains=False)
    results = evaluate(config, accelerator)
    if accelerator.is_main_process:
        pixels = [result for result in results if result.network == RAW_PIXELS]
        *results, rank = results[: len(results) - len(pixels)]
        draw_results(results, config.folder / 'knn', pixels)
        best_first = sorted(results, key=lambda result: -result.mean)
        save([*best_first, rank, *pixels], config.folder)  # last: its presence says that the evaluation is finished
        print_results(results, best_first[0], rank, pixels)
        print(f'Result: {config.folder / RESULT}\nFigure: {config.folder / "knn.png"}')
    accelerator.end_training()


def evaluate(config: KNNEvalConfig, accelerator: Accelerator) -> list[Result]:
    """Measure accuracies for every k and tau, then the rank of training images, then accuracies of raw pixels.

    What random weights reach is the `start` of the network's own results.

    The result is the same on all processes.

    Of P processes each holds the features of 1/P of the training images and 1/P of the validation images at all widths
    in main memory, 4 bytes a number: for ImageNet and ResNet-50 at four widths 27 GB / P. Its device holds those of the
    training images at one width at a time, at most 10.5 GB / P, and one chunk of the search.

    Raises:
        InputError: The images have no labels, are fewer than k or do not suit the network; a width is not one of the
            network's or has never been trained; or the folder has a result of other settings.
    """
    model = open_for_test(config.network)
    widths = model.widths if config.widths is None else check_widths(config.widths)
    for width in widths:
        if not is_calibrated(model, check_width(width, model.widths)):
            raise InputError(
                f'{config.network} has never been trained at width {width:g}; leave it out of --widths, or see '
                'slimclr_hub.models.calibrate'
            )
    check_channels(config.network, model, config.data)
    model.reset_classifier(0)
    weights = state_hash(model)
    if (config.folder / RESULT).exists():
        check_same(config.folder / RESULT, load(config.folder / RESULT)[0].settings, config, weights)
    assert config.data.val_split is not None
    share = (accelerator.process_index, accelerator.num_processes)
    bank_loader = eval_loader(config.data, config.data.train_split, config.bank, config.seed, share=share)
    query_loader = eval_loader(config.data, config.data.val_split, None, config.seed, share=share)
    _check_k(config, bank_loader.total)
    from_main_process(lambda: try_folder(config.folder, 'output'))
    model.to(accelerator.device)
    bank, labels = _share_features(accelerator, model, bank_loader, widths)
    ranks = {width: _rank_in_all(accelerator, bank[width], bank_loader.total) for width in widths}
    bank, labels = readable(bank, labels)
    queries, truth = readable(*_share_features(accelerator, model, query_loader, widths))
    size, count = _in_all(accelerator, labels), _in_all(accelerator, truth)
    _check_k(config, size)
    features = {config.network: (queries, bank)}
    for name, encoder in _baselines(config, model, size).items():
        of = encoder.widths if name == RAW_PIXELS else widths
        shares = (readable(*_share_features(accelerator, encoder, each, of)) for each in (query_loader, bank_loader))
        of_queries, of_bank = (by_width for by_width, _ in shares)
        features[name] = of_queries, of_bank
    with torch.inference_mode():  # as they were computed; in place, since they are large
        for x in (x for pair in features.values() for by_width in pair for x in by_width.values()):
            F.normalize(x, dim=1, out=x)
    labels, truth = labels.to(accelerator.device), truth.to(accelerator.device)
    classes = classes_of(accelerator, torch.cat([labels, truth]), config.data.name)
    ks = tuple(sorted(config.k)) if config.k else (min(default_k(size, classes), size),)
    accuracies: dict[str, dict[float, dict[tuple[int, float | None], list[float]]]] = {name: {} for name in features}
    searches = sum(len(bank) for _, bank in features.values())
    with progress_bar(count * searches, 'neighbours', accelerator.is_main_process) as bar:
        for name, (queries, bank) in features.items():
            for width in bank:
                hits = _hits(accelerator, config, ks, (queries[width], truth), (bank[width], labels), classes, bar)
                accuracies[name][width] = {key: [100 * hit / count for hit in of] for key, of in hits.items()}
    data, made = data_name(asdict(config.data)), environment()
    limit = config.bank if config.bank == size else None
    about: dict[str, Any] = {'settings': {**plain(asdict(config)), 'weights': weights}, 'environment': made}
    start = accuracies.pop(RANDOM_WEIGHTS, {})
    accuracy = [
        Result(
            name,
            Protocol('knn', data, limit, k, temperature),
            top1={width: of[k, temperature][0] for width, of in accuracies[name].items()},
            top5={width: of[k, temperature][1] for width, of in accuracies[name].items()} if classes > _TOP else {},
            images=count,
            start={width: of[k, temperature][0] for width, of in start.items()} if name == config.network else {},
            **(about if name == config.network else {'environment': made}),
        )
        for name in accuracies
        for temperature in config.temperature
        for k in ks
    ]
    rank = Result(config.network, Protocol('rank', data, limit), {}, rank=ranks, images=min(size, RANK_IMAGES), **about)
    own = [result for result in accuracy if result.network == config.network]
    return [*own, rank, *accuracy[len(own) :]]


def _baselines(config: KNNEvalConfig, model: SlimmableResNet, images: int) -> dict[str, Encoder]:
    """What to compare a network with: name -> encoder of the images, of which there are so many for training."""
    found: dict[str, Encoder] = {}
    if config.baselines and is_small(config.data):
        # Not this process's share: all have to draw the same network.
        every = eval_loader(config.data, config.data.train_split, config.bank, config.seed).readable()
        found[RANDOM_WEIGHTS] = random_weights(model, (batch for batch, _ in every), config.seed)
    if config.baselines and (pixels := raw_pixels(config.data, images)):
        found[RAW_PIXELS] = pixels
    return found


def _rank_in_all(accelerator: Accelerator, features: torch.Tensor, total: int) -> float:
    """Effective rank over all processes; `features` [N, D] are those of this one's share of `total` images."""
    world = accelerator.num_processes
    rows = rank_rows(total)
    mine = rows[rows % world == accelerator.process_index] // world
    gram = accelerator.reduce(gram_matrix(features[mine], accelerator.device), 'sum')
    return rank_of_gram(gram, len(rows))


def _hits(
    accelerator: Accelerator,
    config: KNNEvalConfig,
    ks: Sequence[int],
    queries: tuple[torch.Tensor, torch.Tensor],
    bank: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    bar: Any,
) -> dict[tuple[int, float | None], list[int]]:
    """Count queries of all processes whose class comes first, and among the first five, for each k and tau."""
    (features, truth), (others, labels) = queries, bank
    others = others.to(accelerator.device)
    combinations = product(ks, config.temperature)
    counts = {combination: torch.zeros(2, dtype=torch.long, device=truth.device) for combination in combinations}
    done = 0
    for neighbours in neighbours_in_all(accelerator, features, others, labels, max(ks), config.chunk):
        expected = truth[done : done + len(neighbours.labels)]
        done += len(expected)
        for temperature in config.temperature:
            for k, votes in vote(neighbours, ks, temperature, classes):
                rank = rank_of(votes, expected)
                counts[k, temperature] += torch.stack([(rank < top).sum() for top in (1, _TOP)])
        bar.update(len(expected) * accelerator.num_processes)
    summed = accelerator.reduce(torch.stack(list(counts.values())), 'sum')
    return dict(zip(counts, summed.tolist(), strict=True))


def rank_of(votes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Rank the true classes [Q] by votes [Q, C], from 0, as integers [Q].

    Of equal votes the lower class comes first, and a class without one last.
    """
    truth = truth[:, None]
    own = votes.gather(1, truth)
    earlier = torch.arange(votes.shape[1], device=votes.device) < truth
    rank = ((votes > own) | ((votes == own) & earlier)).sum(1)
    return torch.where(own[:, 0] > 0, rank, votes.shape[1])


def classes_of(accelerator: Accelerator, labels: torch.Tensor, name: str) -> int:
    """Number of classes among the labels of all processes, integers [N] of this one on the device; N may be 0.

    Raises:
        InputError: A label of the data set `name` is negative, which stands for an image without one.
    """
    lowest, highest = labels.aminmax() if len(labels) else (labels.new_zeros(()), labels.new_zeros(()))
    of_all = accelerator.gather(torch.stack([lowest, highest]))
    if of_all.min() < 0:
        raise InputError(f'k-NN needs a label for every image, and some of data.name {name} have none')
    return int(of_all.max()) + 1


@torch.inference_mode()
def _share_features(
    accelerator: Accelerator,
    backbone: Encoder,
    loader: EvalLoader,
    widths: Sequence[float],
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Compute features [N, D] of this process's share at all widths, in main memory, and labels [N].

    Those of an image that cannot be read are zero, which adds nothing to a Gram matrix.
    """
    features = {width: [torch.empty(0, _features_at(backbone, width))] for width in widths}
    labels = [torch.empty(0, dtype=torch.long)]
    for images, label in with_progress(accelerator, loader, loader.total, 'features'):
        with accelerator.autocast():
            outputs = backbone.forward_widths(images.to(accelerator.device, non_blocking=True), widths)
        for width, output in outputs.items():
            features[width].append(output.float().cpu() * (label != UNREADABLE)[:, None])
        labels.append(label)
    return {width: torch.cat(parts) for width, parts in features.items()}, torch.cat(labels)


def _in_all(accelerator: Accelerator, labels: torch.Tensor) -> int:
    """Number of labels of all processes."""
    found = int(accelerator.reduce(torch.tensor(len(labels), device=accelerator.device), 'sum'))
    if not found:
        raise DataError(NOTHING_READ)
    return found


def _check_k(config: KNNEvalConfig, size: int) -> None:
    if max(config.k or (1,)) > size:
        raise InputError(f'k {max(config.k or ())} is more than the {size} training images; give at most {size}')


def _features_at(backbone: Encoder, width: float) -> int:
    if isinstance(backbone, RawPixels):
        return backbone.num_features
    with backbone.set_width(width):
        return backbone.num_features


def neighbours_in_all(
    accelerator: Accelerator, queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, chunk: int
) -> Iterator[Neighbours]:
    """Find the nearest neighbours of this process's queries among the labelled images of all processes.

    Each process searches its own share, `bank` [N, D] and `labels` [N] on the device, for a chunk of everybody's
    queries; the candidates are exchanged and merged. All processes have to exhaust this iterator together. Features are
    of length 1; `k` is at most the number of all labelled images, and `chunk` counts queries of all processes.

    Yields:
        Neighbours of the next queries [q, k] on the device, in their order; in the last chunks q may be 0.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    own = -(-chunk // world)
    longest = int(accelerator.gather(torch.tensor([len(queries)], device=device)).max())
    for start in range(0, longest, own):
        mine = queries[start : start + own].to(device)
        # Gathered tensors have to have one shape on all processes; the padding is dropped again.
        everyone = accelerator.gather(F.pad(mine, (0, 0, 0, own - len(mine))))
        found = nearest(everyone, bank, labels, k)
        missing = k - found.similarity.shape[1]
        similarity = accelerator.gather(F.pad(found.similarity, (0, missing), value=-torch.inf))
        classes = accelerator.gather(F.pad(found.labels, (0, missing)))
        candidates = [
            Neighbours(*(tensor[other + rank * own :][: len(mine)] for tensor in (similarity, classes)))
            for other in range(0, world * len(everyone), len(everyone))
        ]
        yield merge(candidates, k)


def print_results(results: Sequence[Result], best: Result, rank: Result, pixels: Sequence[Result] = ()) -> None:
    """Print top-1 / top-5 of every width for every k and tau, mark the best in the mean over widths, and the rank.

    `pixels` are the results of raw pixels for the same k and tau in the same order, if any.
    """
    rows = [
        [
            str(result.protocol.k),
            _tau(result),
            *(
                f'{top1:.1f} / {each.top5[width]:.1f}' if each.top5 else f'{top1:.1f}'
                for each in (result, *pixels[i : i + 1])
                for width, top1 in each.top1.items()
            ),
            'best' if result is best and len(results) > 1 else '',
        ]
        for i, result in enumerate(results)
    ]
    if best.start:
        random = [f'{best.start[width]:.1f}' for width in best.top1]
        rows.append([str(best.protocol.k), _tau(best), *random, *([''] if pixels else []), RANDOM_WEIGHTS])
    title = f'{best.network}: k-NN, {"top-1 / top-5" if best.top5 else "top-1"} accuracy (%) by width'
    note = 'Best in the mean over widths, chosen on the very images that it is measured on.'
    headers = ['k', 'tau', *(f'{width:g}' for width in best.top1), *([RAW_PIXELS] if pixels else []), '']
    listed = ', '.join(f'{width:g}: {value:.1f}' for width, value in rank.rank.items())
    notes = [note] if len(results) > 1 else []
    notes.append(f'{rank.protocol.label}: {rank.protocol}; {rank.images} training images; by width {listed}')
    TextTable(title, headers, rows, notes, names=0).print()


def _tau(result: Result) -> str:
    return '-' if result.protocol.temperature is None else f'{result.protocol.temperature:g}'


def draw_results(results: Sequence[Result], path: Path, pixels: Sequence[Result] = ()) -> None:
    """Draw top-1 accuracy over k, a line for each width and a panel for each tau, into `path`.png and `path`.pdf.

    `pixels` are the results of raw pixels for the same k and tau, which have a line of their own, if any.
    """
    temperatures = list(dict.fromkeys(result.protocol.temperature for result in results))
    figure, axes = new_figure(len(temperatures))
    lowest, highest = (f(value for one in (*results, *pixels) for value in one.top1.values()) for f in (min, max))
    margin = max(0.05 * (highest - lowest), 0.5)
    for axis, temperature in zip(axes, temperatures, strict=True):
        shown = [result for result in results if result.protocol.temperature == temperature]
        ks = [result.protocol.k or 0 for result in shown]
        for i, width in enumerate(shown[0].top1):
            values = [result.top1[width] for result in shown]
            axis.plot(ks, values, label=f'width {width:g}', marker=marker(i), **line_style(i))
        if of_pixels := [result.top1[1.0] for result in pixels if result.protocol.temperature == temperature]:
            axis.plot(ks, of_pixels, label=RAW_PIXELS, marker='.', color=GREY, linestyle='-.')
        axis.set_xscale('log')
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_ylim(lowest - margin, highest + margin)
        axis.set_xlabel('k, neighbours')
        axis.set_ylabel('k-NN accuracy, top-1 (%)')
        axis.set_title('unweighted' if temperature is None else f'tau={temperature:g}')
        axis.legend()
    save_figure(figure, path)
