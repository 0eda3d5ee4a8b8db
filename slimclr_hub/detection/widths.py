"""Detectors over several widths: the loop that trains them, and a convolution that takes inputs of any width."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar('T')


class InputSlicedConv2d(nn.Conv2d):
    """Convolution that applies the leading part of its weight to an input with fewer channels.

    This equals padding the input with zeros, as the reference code of Zhao et al. does before its FPN, without the
    products with them: outputs and gradients are the same.

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


class WidthMixin:
    """Forward `widths`, `width` and `set_width` to a slimmable submodule, whose name is `switched`."""

    switched: str

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths that the network holds, in descending order."""
        return getattr(self, self.switched).widths

    @property
    def width(self) -> float:
        """Active width."""
        return getattr(self, self.switched).width

    def set_width(self, width: float) -> ExitStack:
        """Switch the active width; as a context manager it switches back. See `models.SlimmableResNet.set_width`."""
        return getattr(self, self.switched).set_width(width)


def unwrapped(model: nn.Module) -> Any:
    """Return the model inside DistributedDataParallel, or the model itself."""
    return getattr(model, 'module', model)


def run_widths(
    model: nn.Module, set_width: Callable[[float], ExitStack], widths: Sequence[float], run: Callable[[bool], T]
) -> dict[float, T]:
    """Run forward and backward at each width, from narrow to wide, so that activations of one width are in memory.

    Under DDP only the last run reduces gradients. Their means over the processes are then exact for every parameter:
    those that the last width does not use, the normalisations of the others, were marked as used by the runs before.
    DDP needs `find_unused_parameters=True`. `run` is called with True at the last width.
    """
    results = {}
    for width in sorted(widths):
        last = width == max(widths)
        sync = nullcontext() if last else getattr(model, 'no_sync', nullcontext)()
        with sync, set_width(width):
            results[width] = run(last)
    return results
