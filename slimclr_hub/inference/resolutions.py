"""Statistics for other sizes of images, estimated from images without labels, and the accuracy of each pair."""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from timm.layers import get_device_dtype

from slimclr_hub.errors import InputError
from slimclr_hub.hub.export.checks import check_size
from slimclr_hub.inference.cascade import labels_of
from slimclr_hub.inference.images import ImageList, Sources, list_images
from slimclr_hub.inference.runner import InferenceConfig, run_images
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import calibrate_batchnorm
from slimclr_hub.models.cost import cost
from slimclr_hub.models.resolutions import (
    MOST_SIZES,
    Pair,
    Resolutions,
    Statistics,
    copy_statistics,
    moved,
    statistics_of,
)
from slimclr_hub.settings import at_most
from slimclr_hub.text import human
from slimclr_hub.weights.hashes import state_hash

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_IMAGES = 40
_MOST_IMAGES = 1024  # for the statistics


def fit_resolutions(
    model: SlimmableResNet, images: Sources, sizes: Iterable[int], config: InferenceConfig
) -> tuple[Resolutions, dict[int, Statistics]]:
    """Estimate statistics of every width at other sizes of images, and measure the accuracy of each pair.

    Half of the images, 1,024 at most, are for the statistics, and the other half for accuracy. The class of an image is
    that of its folder, as in `slimclr_hub.inference.cascade.answer`; without classes there is no accuracy.

    Args:
        model: The network at its own size, which is left as it is.
        images: Files or folders, as for `embed`.
        sizes: Heights and widths of images in pixels, besides the network's own.
        config: Options of the passes over images; statistics are means over batches of `batch_size`.

    Returns:
        The pairs, and size -> statistics; `Resolutions.save` writes both.

    Raises:
        InputError: There are fewer than 40 images, a size is none, or as in `run_images`.
    """
    own_size = model.pretrained_cfg['input_size'][-1]
    for size in (sizes := sorted({*sizes, own_size})):
        check_size(size)
    at_most('sizes', len(sizes), MOST_SIZES)
    listed = list_images(images)
    if len(listed) < _LEAST_IMAGES:
        raise InputError(f'{len(listed)} images are too few for statistics; give {_LEAST_IMAGES} at least')
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0)).tolist()
    half = len(listed) // 2
    plain, held_out = listed.without(order[min(half, _MOST_IMAGES) :]), listed.without(order[:half])
    statistics = estimate(model, plain, sizes, config)
    network = copy.deepcopy(model)
    tested, pairs = 0, []
    for size in sizes:
        set_size(network, size)
        copy_statistics(statistics[size], network)
        tested, shares = accuracies(network, held_out, config)
        pairs += [Pair(width, size, shares.get(width)) for width in network.widths]
    return Resolutions(state_hash(model), own_size, len(plain), tested, tuple(pairs)), statistics


def estimate(
    model: SlimmableResNet, images: ImageList, sizes: Sequence[int], config: InferenceConfig
) -> dict[int, Statistics]:
    """Estimate the statistics of a network at several sizes, of which its own keeps those that it has.

    They are moved by what the images change between the sizes; see `slimclr_hub.models.resolutions`.
    """
    own_size = model.pretrained_cfg['input_size'][-1]
    recalibrated = {size: recalibrate(model, images, size, config) for size in {own_size, *sizes}}
    own = {name: tensor.clone() for name, tensor in statistics_of(model).items()}
    return {size: moved(own, recalibrated[own_size], found) for size, found in recalibrated.items()}


def recalibrate(model: SlimmableResNet, images: ImageList, size: int, config: InferenceConfig) -> Statistics:
    """The statistics that images have at one size, as the mean over batches."""
    network = copy.deepcopy(model)
    set_size(network, size)

    def keep(batch: torch.Tensor) -> tuple[torch.Tensor]:
        return (batch.cpu(),)

    read = run_images(network, images, keep, config, f'reading at {size}x{size}').tensors[0]
    batch_size = min(config.batch_size, len(read))
    whole = read[: len(read) // batch_size * batch_size]  # a mean over batches needs all of one length
    for width in network.widths:
        batches = (batch.to(**get_device_dtype(network)) for batch in whole.split(batch_size))
        calibrate_batchnorm(network, width, batches)
    return statistics_of(network)


def accuracies(model: SlimmableResNet, images: ImageList, config: InferenceConfig) -> tuple[int, dict[float, float]]:
    """Number of images, and width -> share of right answers in [0, 1]; 0 and nothing where classes are not known."""
    if labels_of(model, images.names) is None:
        return 0, {}

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(model.forward_at(batch, width).argmax(1) for width in model.widths)

    found = run_images(model, images, forward, config, 'running all widths')
    labels = labels_of(model, found.names)
    assert labels is not None  # of a part of the same names
    shares = [(answers == labels).double().mean().item() for answers in found.tensors]
    return len(found.names), dict(zip(model.widths, shares, strict=True))


def set_size(model: SlimmableResNet, size: int) -> None:
    """Let images be preprocessed to `size` pixels; statistics stay."""
    model.pretrained_cfg['input_size'] = (model.in_chans, size, size)


def costs_of(model: SlimmableResNet, pairs: Iterable[Pair]) -> dict[Pair, int]:
    """Multiply-adds of an image with each pair."""
    return {pair: cost(model, pair.width, pair.size)[1] for pair in pairs}


def best_pairs(costs: dict[Pair, int]) -> set[Pair]:
    """The pairs of known accuracy that no pair of at most their cost reaches: the Pareto front."""
    best: set[Pair] = set()
    highest = -1.0
    for pair in sorted(costs, key=lambda pair: (costs[pair], -(pair.accuracy or 0))):
        if pair.accuracy is not None and pair.accuracy > highest:
            best.add(pair)
            highest = pair.accuracy
    return best


def resolutions_table(found: Resolutions, costs: dict[Pair, int]) -> 'Table':
    """Return a table for rich with a row for each pair, in ascending order of cost."""
    from rich.table import Table

    best = best_pairs(costs)
    table = Table(title=f'On {found.tested} images that were not for the statistics' if found.tested else None)
    for header in ('width', 'size', 'multiply-adds', *(['accuracy (%)', 'best at its cost'] if found.tested else [])):
        table.add_column(header, justify='right')
    for pair in sorted(costs, key=costs.__getitem__):
        known = [] if pair.accuracy is None else [f'{100 * pair.accuracy:.1f}', 'yes' if pair in best else '']
        table.add_row(f'{pair.width:g}', str(pair.size), human(costs[pair]), *known)
    return table


def verdict(found: Resolutions, costs: dict[Pair, int]) -> str:
    """Say in a sentence or two whether other sizes than the network's own are worth it."""
    if not found.tested:
        return 'Accuracies are not known: the images have no folders that are named by classes of the network.'
    best = best_pairs(costs)
    others = sum(pair.size != found.size for pair in best)
    shares = [pair.accuracy for pair in found.pairs if pair.accuracy is not None]
    error = max((share * (1 - share) / found.tested) ** 0.5 for share in shares)
    return (
        f'Of the {len(best)} pairs that no cheaper one reaches, {others} are at other sizes than {found.size}. '
        f'Standard error of a share of {found.tested} images: {100 * error:.1f} points at most.'
    )
