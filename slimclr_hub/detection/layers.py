"""The one layer that a detector needs to take feature maps of any width."""

import torch
from torch import nn


class InputSlicedConv2d(nn.Conv2d):
    """Convolution of which an input with fewer channels uses the leading part: equal to filling it up with zeros.

    The reference code of Zhao et al. fills up the feature maps of narrow widths with zeros before its FPN; this leaves
    out the products with them, outputs and gradients are the same.

    Raises:
        ValueError: The input has more channels than the layer.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] with C up to `in_channels` -> [N, out_channels, H', W']."""
        channels = x.shape[1]
        if channels > self.in_channels:
            raise ValueError(f'the input has {channels} channels, the layer at most {self.in_channels}')
        # A slice that takes everything would still cost a zero-filled gradient in the backward.
        weight = self.weight if channels == self.in_channels else self.weight[:, :channels]
        return self._conv_forward(x, weight, self.bias)
