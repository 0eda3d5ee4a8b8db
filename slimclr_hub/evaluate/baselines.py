"""Raw pixels, and random weights: what a network has to be better than."""

import copy
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from slimclr_hub.data import DataConfig
from slimclr_hub.models.calibrate import calibrate_batchnorm
from slimclr_hub.models.layers import SwitchableLinear
from slimclr_hub.models.slimmable_resnet import HEAD_STD, SlimmableResNet

CALIBRATION_BATCHES = 8
_LARGEST_SIZE = 64
_MOST_NUMBERS = 2**28  # 1 GiB of features


class RawPixels(nn.Module):
    """A network whose `num_features` = C * H * W features are the image itself, at one width."""

    widths = (1.0,)
    fc: nn.Module

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def reset_classifier(self, num_classes: int, head: str = 'switchable') -> None:
        """Make `fc` a new head, as that of a network is; 0 classes for none. With one width both kinds are the same."""
        self.fc = SwitchableLinear(self.num_features, num_classes, self.widths) if num_classes else nn.Identity()
        for name, parameter in self.fc.named_parameters():
            nn.init.zeros_(parameter) if name.endswith('bias') else nn.init.normal_(parameter, std=HEAD_STD)

    def forward_widths(self, images: torch.Tensor, widths: Sequence[float] = widths) -> dict[float, torch.Tensor]:
        """Images [B, C, H, W] -> features [B, C * H * W]."""
        return {width: images.flatten(1) for width in widths}


Encoder = SlimmableResNet | RawPixels


def raw_pixels(data: DataConfig, images: int) -> RawPixels | None:
    """Raw pixels of so many training images; None where they say nothing or cost much.

    That is for images of more than 64 pixels a side, and for more than 2^28 numbers in all.
    """
    features = data.channels * data.size**2
    return RawPixels(features) if is_small(data) and images * features <= _MOST_NUMBERS else None


def is_small(data: DataConfig) -> bool:
    """True for images of at most 64 pixels a side, where baselines are worth their time."""
    return data.size <= _LARGEST_SIZE


def draw_weights(network: SlimmableResNet, zero_init_last: bool = True) -> None:
    """Draw the weights of a network anew by torch's generator, and forget the statistics of its normalisations."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    network.init_weights(zero_init_last=zero_init_last)


def random_weights(network: SlimmableResNet, images: Iterable[torch.Tensor], seed: int) -> SlimmableResNet:
    """Copy a network in eval mode and draw its weights anew, as before training.

    No block begins as the identity, and batch normalisation has the statistics of the first few batches [N, C, H, W] of
    `images`: a random network at its best. The generators of others do not advance.
    """
    network = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw_weights(network, zero_init_last=False)
    device = next(network.parameters()).device
    batches = [batch.to(device) for batch in islice(images, CALIBRATION_BATCHES)]
    for width in network.widths:
        calibrate_batchnorm(network, width, batches)
    return network
