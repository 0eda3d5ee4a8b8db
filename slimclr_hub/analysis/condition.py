"""`analyze condition`: the condition under which one slimmable linear layer serves two widths (paper, Appendix A).

X [N, d] are features of the full width, X1 [N, d1] those of a narrower one, T [N, C] one-hot labels. X11 and X12 are
the first d1 columns of X and the others. A linear layer of its own for each width solves theta = argmin |X theta - T|
(8) and R = (X1^T X1)^-1 X1^T T (10). If the narrower width uses the first d1 rows of theta instead, both have to be
equal, which is Eq. (23):

    L = B11 (X11^T - X11^T X12 (X12^T X12)^-1 X12^T) T = R,    B11 = (X11^T X11 - X11^T X12 (X12^T X12)^-1 X12^T X11)^-1

L is exactly those rows of theta, so two least-squares problems give both sides, by a QR decomposition of the features
rather than by inverses of their Gram matrices, which square the condition number.

Remark on the numbers of the paper. It names X of 2048 x 1024 and X1 of 2048 x 512, and for ImageNet's 1000 classes a
mean of 1.07 and a total of 1,096,665.50, which makes 1.02 million entries of |L - R|; 0.88 and 903,094.19 make as many.
512 x 1000 entries would be half of them, 1024 x 1000 fit both: X1 is of 2048 x 1024, which is what width 0.5 of a
ResNet-50 has, and X of 2048 x 2048. With as many images as features the full width reproduces T exactly, and theta is
as large as X is badly conditioned; how far L is from R then depends much on the number of images.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimclr_hub.analysis.base import Analysis, OutputOption, read_data, write_data
from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.network import (
    check_channels,
    check_images,
    data_defaults,
    default_output,
    open_for_test,
)
from slimclr_hub.runs.figures import line_style, new_figure, save_figure
from slimclr_hub.runs.launcher import launched
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import at_least, one_of, relevant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPLITS = ('train', 'validation')
_HATCHES = ('', '//', '..', 'xx')


@dataclass(frozen=True)
class ConditionConfig(OutputOption):
    """Options of `analyze condition`.

    Args:
        widths: Narrower widths to compare with the full one; all by default.
        images: Images of each split, chosen at random by `seed`; at least as many as the full width has features. The
            paper takes 2048.
        splits: train, for data.train_split, and validation, for data.val_split.
        ridge: Added to the Gram matrices of the features, as a share of their mean diagonal. With 0 the features have
            to be independent, as the paper assumes.
        seed: Seed of the choice of images.
        data: The images; those of the network's run by default, or ImageNet.
    """

    widths: tuple[float, ...] | None = None
    images: int = 2048
    splits: tuple[str, ...] = _SPLITS
    ridge: float = 0.0
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        at_least('images', self.images, 1)
        at_least('ridge', self.ridge, 0)
        if not self.splits:
            raise InputError('splits is empty; give train, validation or both')
        for split in self.splits:
            one_of('splits', split, _SPLITS)
        if 'validation' in self.splits and self.data.val_split is None:
            raise InputError('data.val_split is null, and splits asks for validation; give --splits "[train]"')


@dataclass(frozen=True)
class Condition:
    """Both sides of Eq. (23) for one narrower width, and the accuracy that each gives.

    Args:
        features: d and d1.
        images: N.
        left: Mean of |L|.
        right: Mean of |R|.
        mean: Mean of |L - R|; the paper has 1.07 and 0.88.
        total: Sum of |L - R|; the paper has 1,096,665.50 and 903,094.19.
        relative: |L - R| / |R| in the Frobenius norm; 0 if the condition holds.
        condition_number: Largest singular value of X over the smallest.
        own: Accuracy (%) of X1 R on these images: a linear layer of the width's own.
        shared: Accuracy (%) of X1 L: the first rows of the full width's layer.
        full: Accuracy (%) of X theta, the full width.
    """

    features: tuple[int, int]
    images: int
    left: float
    right: float
    mean: float
    total: float
    relative: float
    condition_number: float
    own: float
    shared: float
    full: float


def sides(X: torch.Tensor, X1: torch.Tensor, T: torch.Tensor, ridge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R of Eq. (23), float64 [d1, C] each.

    Args:
        X: Features of the full width [N, d].
        X1: Features of the narrower width [N, d1], as that width computes them: not columns of X.
        T: Targets [N, C].
        ridge: Added to the diagonals of X^T X and X1^T X1, as a share of a column's mean squared length. With 0 the
            columns of both have to be independent, as the paper assumes.

    Raises:
        InputError: Columns are not independent, or the shapes do not fit.
    """
    if not (len(X) == len(X1) == len(T)) or X1.shape[1] > X.shape[1]:
        raise InputError(
            f'features of shapes {tuple(X.shape)} and {tuple(X1.shape)} and targets {tuple(T.shape)} do not belong '
            'together; give those of the same images, and the narrower width second'
        )
    return least_squares(X, T, ridge)[: X1.shape[1]], least_squares(X1, T, ridge)


def least_squares(X: torch.Tensor, T: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """argmin over theta of |X theta - T|^2 + ridge |X|^2 / d |theta|^2, Eq. (8) if `ridge` is 0: float64 [d, C].

    Raises:
        InputError: Without a ridge the columns of X [N, d] are not independent.
    """
    if ridge == 0:
        _check_rank(X)
    X, T = X.double(), T.double()
    if ridge > 0:
        d = X.shape[1]
        lambda_ = ridge * X.square().sum() / d
        X = torch.cat([X, lambda_.sqrt() * torch.eye(d, dtype=X.dtype, device=X.device)])
        T = torch.cat([T, T.new_zeros(d, T.shape[1])])
    return torch.linalg.lstsq(X, T, driver='gels').solution


def _check_rank(X: torch.Tensor) -> None:
    """Refuse columns that are not independent, or only by rounding in the precision of X [N, d]."""
    values = torch.linalg.svdvals(X.double())
    # Rounding of each entry adds a matrix whose norm is about this share of the largest singular value.
    rank = int((values > values.max() * torch.finfo(X.dtype).eps * max(X.shape) ** 0.5).sum())
    if rank == X.shape[1] and len(X) >= X.shape[1]:
        return
    dead = int((X == 0).all(0).sum())
    raise InputError(
        f'{X.shape[1]} features of {len(X)} images have rank {rank}'
        + (f' ({dead} are zero for every image)' if dead else '')
        + ', and Eq. (23) needs independent ones; take more images, or a ridge such as --ridge 1e-6'
    )


def linear_condition(X: torch.Tensor, X1: torch.Tensor, labels: torch.Tensor, ridge: float = 0.0) -> Condition:
    """Measure how far Eq. (23) is from holding; arguments as in `sides`, with classes [N] from 0.

    Raises:
        InputError: As in `sides`, or a label is negative.
    """
    if labels.min() < 0:
        raise InputError('the condition needs a label for every image; give data.label_key, or other images')
    X, X1, labels = X.cpu(), X1.cpu(), labels.cpu()
    T = torch.nn.functional.one_hot(labels).double()
    L, R = sides(X, X1, T, ridge)
    theta = least_squares(X, T, ridge)
    difference = (L - R).abs()
    values = torch.linalg.svdvals(X.double())
    return Condition(
        features=(X.shape[1], X1.shape[1]),
        images=len(X),
        left=L.abs().mean().item(),
        right=R.abs().mean().item(),
        mean=difference.mean().item(),
        total=difference.sum().item(),
        relative=((L - R).norm() / R.norm()).item(),
        condition_number=(values[0] / values[-1]).item(),
        own=_accuracy(X1, R, labels),
        shared=_accuracy(X1, L, labels),
        full=_accuracy(X, theta, labels),
    )


def _accuracy(X: torch.Tensor, theta: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * ((X.double() @ theta).argmax(1) == labels).double().mean().item()


def narrower(widths: Sequence[float], asked: Sequence[float] | None) -> list[float]:
    """Return the widths to compare with the full one: those asked for, or all narrower ones.

    Raises:
        InputError: A width is not a narrower one of the network, or the network has none.
    """
    below = [width for width in widths if width < widths[0]]
    if not below:
        raise InputError(f'the network has width {widths[0]:g} alone; the condition compares it with a narrower one')
    if unknown := [width for width in asked or () if width not in below]:
        raise InputError(
            f'width {unknown[0]:g} is not one of {", ".join(f"{w:g}" for w in below)}, the narrower widths'
        )
    return sorted(asked, reverse=True) if asked else below


Results = dict[str, dict[float, Condition]]
"""Split -> width -> condition."""


def condition_defaults(argv: Sequence[str]) -> Mapping[str, Any]:
    """Return the defaults of `data`: the images of the network, which is the first argument.

    Raises:
        InputError: An option comes before it.
    """
    if argv[0] in ('-h', '--help'):
        return {}
    if argv[0].startswith('-'):
        raise InputError(f'{argv[0]} comes before the network; name it first: condition NETWORK {argv[0]}')
    return data_defaults([f'--network={argv[0]}'])


def analyse_condition(networks: Sequence[str], config: ConditionConfig) -> None:
    """Write how far the condition is from holding, by width and split, with a figure, and print a table."""
    if len(networks) > 1:
        raise InputError(f'{" ".join(networks)} are {len(networks)} networks; give one')
    if 'validation' in config.splits:
        check_images(config.data)
    network = networks[0]
    stem = (Path(config.output) if config.output else default_output(network, 'analysis')) / 'condition'
    settings = {'network': network, **relevant(config), 'data.root': config.data.root}
    read_data(stem, settings)
    results = measure_condition(network, config)
    found = {split: {f'{w:g}': asdict(each) for w, each in widths.items()} for split, widths in results.items()}
    write_data(stem, settings, environment=environment(), condition=found)
    save_figure(condition_figure(results, network), stem)
    _table(results, network).print()
    print(f'Figure: {stem}.png\nData: {stem}.json')


def measure_condition(network: str, config: ConditionConfig) -> Results:
    """Measure the condition on the features of a network."""
    accelerator = launched(None, trains=False)
    backbone = open_for_test(network).to(accelerator.device)
    check_channels(network, backbone, config.data)
    widths = narrower(backbone.widths, config.widths)
    backbone.reset_classifier(0)
    full = backbone.widths[0]
    if config.ridge == 0 and config.images < backbone.num_features:
        few = f'{config.images} images, and width {full:g} has {backbone.num_features} features'
        raise InputError(f'{few}, which are then not independent; give --images {backbone.num_features} or more')
    results: Results = {}
    for split in config.splits:
        named = config.data.train_split if split == 'train' else config.data.val_split
        assert named is not None
        loader = eval_loader(config.data, named, config.images, config.seed).prepared(accelerator)
        batches = _batches(loader, config.images, split)
        features, labels = extract_features(accelerator, backbone, batches, [full, *widths])
        results[split] = {w: linear_condition(features[full], features[w], labels, config.ridge) for w in widths}
    return results


def _batches(loader: Iterable, images: int, split: str) -> Iterator[Any]:
    left = images
    with progress_bar(images, split, show=True) as bar:
        for batch, labels in loader:
            yield batch[:left], labels[:left]
            bar.update(len(batch[:left]))
            left -= len(batch)
            if left <= 0:  # a stream has more than were asked for
                return


def condition_figure(results: Results, network: str) -> 'Figure':
    """Draw mean entries of both sides and of their difference, and accuracies, by width; one row per split."""
    figure, axes = new_figure(2, len(results), width=5.2, height=3.8)
    for row, (split, by_width) in enumerate(results.items()):
        found = list(by_width.values())
        images = f'{found[0].images:,} {"training" if split == "train" else split} images'
        left, right = axes[2 * row], axes[2 * row + 1]
        sides = {'left': '|L|, of the shared layer', 'right': '|R|, of its own', 'mean': '|L − R|'}  # noqa: RUF001
        _draw_bars(left, by_width, sides)
        left.set_ylabel(f'mean of entries\n({images})')
        left.set_ylim(0, 1.35 * max(max(each.left, each.right, each.mean) for each in found))
        layers = {'shared': "the full width's layer, sliced", 'own': 'a layer of its own', 'full': 'the full width'}
        _draw_bars(right, by_width, layers)
        right.set_ylabel(f'accuracy (%) on the same\n{images}')
        right.set_ylim(0, 135)
        right.set_yticks(range(0, 101, 20))
    figure.suptitle(f'Eq. (23), {Path(network).name}', fontsize='medium')
    return figure


def _draw_bars(axis: Any, by_width: Mapping[float, Condition], labels: Mapping[str, str]) -> None:
    thickness = 0.8 / len(labels)
    for i, (name, label) in enumerate(labels.items()):
        centres = [n + (i - (len(labels) - 1) / 2) * thickness for n in range(len(by_width))]
        style = {'color': line_style(i)['color'], 'hatch': _HATCHES[i], 'edgecolor': 'white'}
        axis.bar(centres, [getattr(each, name) for each in by_width.values()], thickness, label=label, **style)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(by_width)), [f'{width:g}' for width in by_width])
    axis.set_xlabel('narrower width')
    axis.legend(fontsize='small')


def _table(results: Results, network: str) -> TextTable:
    headers = (
        *('split', 'images', 'width', 'mean difference of weights', 'summed difference', 'mean weight, own layer'),
        *('relative difference', 'accuracy, own layer (%)', 'accuracy, sliced layer (%)'),
    )
    rows = [
        [
            *(split, f'{each.images:,}', f'{width:g}', f'{each.mean:.3g}', f'{each.total:.4g}', f'{each.right:.3g}'),
            *(f'{each.relative:.3g}', f'{each.own:.1f}', f'{each.shared:.1f}'),
        ]
        for split, by_width in results.items()
        for width, each in by_width.items()
    ]
    title = f"Eq. (23): the full width's linear layer, sliced, against one of the width's own ({network})"
    paper = 'Paper, ResNet-50, width 0.5: mean 1.07, total 1096665.50 (train); 0.88, 903094.19 (validation).'
    return TextTable(title, headers, rows, [paper])


ANALYSIS = Analysis(
    ConditionConfig,
    analyse_condition,
    'NETWORK',
    'Linear-probe condition: could one slimmable linear layer serve all widths of a network?',
    condition_defaults,
)
