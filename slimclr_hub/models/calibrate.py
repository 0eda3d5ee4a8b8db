"""Batch normalisation statistics of a width that was not trained, estimated from images."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import SwitchableBatchNorm2d
from slimclr_hub.models.mode import evaluating
from slimclr_hub.models.slimmable_resnet import SlimmableResNet
from slimclr_hub.models.widths import check_widths, width_key
from slimclr_hub.weights.slices import BATCH_COUNT


def batchnorms_of(model: nn.Module, width: float) -> Iterator[nn.Module]:
    """Yield the batch normalisations that a network uses at `width`, be they over all processes or frozen."""
    for module in model.modules():
        if isinstance(module, SwitchableBatchNorm2d):
            yield module[width_key(width)]


def is_calibrated(model: SlimmableResNet, width: float) -> bool:
    """True if the batch normalisation of `width` has seen any batch, or is frozen."""
    return all(getattr(norm, BATCH_COUNT, 1) != 0 for norm in batchnorms_of(model, model._ready(width)))


def calibrate_width(
    model: SlimmableResNet, width: float, loader: Iterable[torch.Tensor | Sequence[torch.Tensor]]
) -> None:
    """Add a width to a trained network, by estimating its batch-normalisation statistics from images.

    Convolutions are shared and need no training; scale, shift and head begin as the leading part of the next wider
    width's. These are the post-statistics of universally slimmable networks (Yu & Huang 2019,
    https://arxiv.org/abs/1903.05134, section 3.2), here for a network that was trained at a few widths only: the
    further a new width is from those, the worse. A width that exists is estimated anew.

    Args:
        model: The network; its mode and active width are restored.
        width: The width to add.
        loader: Batches of images [N, C, H, W], normalised as in training, alone or first in a sequence as with
            labels. A few thousand images suffice.

    Raises:
        InputError: No images, a batch that has none, or a width above the largest. After any error, be it the loader's,
            the network is as it was.
    """
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InputError('the loader gave no images to calibrate with')
    device = next(model.parameters()).device
    images = (_images(batch).to(device, non_blocking=True) for batch in chain([first], batches))
    (width,) = check_widths([width])
    added = width not in model.widths
    if added:
        model.add_width(width)
    try:
        calibrate_batchnorm(model, width, images)
    except BaseException:
        if added:
            model._drop_width(width)
        raise


def _images(batch: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(images, torch.Tensor):
        raise InputError(
            f'a batch of the loader is a {type(batch).__name__} without images; give tensors [N, C, H, W], alone or '
            'first in a sequence'
        )
    return images


@torch.no_grad()
def calibrate_batchnorm(model: SlimmableResNet, width: float, images: Iterable[torch.Tensor]) -> None:
    """Estimate the running statistics of one width anew, as the mean over batches; nothing else of the network moves.

    See `calibrate_width`; here `images` are batches [N, C, H, W] on the network's device. After an error the statistics
    are those of before.

    Raises:
        InputError: A normalisation is frozen.
    """
    norms = []
    for norm in batchnorms_of(model, model._ready(width)):
        if not isinstance(norm, _BatchNorm):
            raise InputError(f'a normalisation is frozen ({type(norm).__name__}); unfreeze it to calibrate a width')
        norms.append(norm)
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for batch in images:
                model.forward_at(batch, width)
        except BaseException:
            for norm, buffers in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
