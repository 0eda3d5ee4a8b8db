"""Batch normalisation statistics of a width that was not trained, estimated from images."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import SwitchableBatchNorm2d
from slimclr_hub.models.slimmable_resnet import SlimmableResNet
from slimclr_hub.models.widths import width_key


def batchnorms_of(model: nn.Module, width: float) -> Iterator[_BatchNorm]:
    """Yield the batch normalisations that a network uses at `width`."""
    for module in model.modules():
        if isinstance(module, SwitchableBatchNorm2d):
            norm = module[width_key(width)]
            assert isinstance(norm, _BatchNorm)  # also one over all processes
            yield norm


def is_calibrated(model: SlimmableResNet, width: float) -> bool:
    """True if the batch normalisation of `width` has seen any batch."""
    return all(norm.num_batches_tracked != 0 for norm in batchnorms_of(model, model._ready(width)))


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
        InputError: No images, or a width above the largest.
    """
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InputError('the loader gave no images to calibrate with')
    if width not in model.widths:
        model.add_width(width)
    device = next(model.parameters()).device
    images = (batch if isinstance(batch, torch.Tensor) else batch[0] for batch in chain([first], batches))
    calibrate_batchnorm(model, width, (batch.to(device, non_blocking=True) for batch in images))


@torch.no_grad()
def calibrate_batchnorm(model: SlimmableResNet, width: float, images: Iterable[torch.Tensor]) -> None:
    """Estimate the running statistics of one width anew, as the mean over batches; nothing else of the network moves.

    See `calibrate_width`; here `images` are batches [N, C, H, W] on the network's device.
    """
    norms = list(batchnorms_of(model, model._ready(width)))
    momenta, modes = [norm.momentum for norm in norms], {module: module.training for module in model.modules()}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    try:
        for batch in images:
            model.forward_at(batch, width)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training  # one by one: some may be frozen
