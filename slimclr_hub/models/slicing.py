"""Slices of weights, made once where the forward of each layer would make them again.

A width's slice of a weight is no contiguous block, so a convolution copies it, and once more in its backward; and the
gradient of a slice is a tensor as large as the whole weight, zero but for the slice, for each width. `sliced_once`
spares both in training: a layer's slices for all widths of a step come from one function, whose backward adds their
gradients into that of the widest. Nothing is kept from one step to the next, since no version of a tensor tells of all
writes to it; who runs one width for long takes it out by `extract`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from slimclr_hub.models.widths import channel_span, given, scale_channels

Span = tuple[int, int]
"""First channel, and the one after the last."""

Block = tuple[slice, ...]
"""Index of a block of a tensor, by its leading dimensions."""


class Transient(dict[Any, Any]):
    """Cache that is empty in a copy of its owner and is not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Transient':
        return Transient()

    def __reduce__(self) -> tuple[type['Transient'], tuple[()]]:
        return Transient, ()


class SlicedWeight(nn.Module):
    """Base class of slimmable layers with one weight, of which each width uses a slice.

    The slice is cut anew for each forward, except inside `sliced_once`, for a step that trains several widths.

    Args:
        full_in: Input channels at width 1.0.
        full_out: Output channels at width 1.0.
        args: Of the ordinary layer, such as the size of the kernel.
        max_width: Largest width that will be used.
        disjoint: Widths whose channels do not overlap, if any; see `channel_span`.
        slim_in: True if the input has width w; false for the stem, whose input is images.
        slim_out: True if the output has width w; false for the last layer of a head.
        kwargs: Of the ordinary layer.
    """

    weight: torch.Tensor

    def __init__(
        self,
        full_in: int,
        full_out: int,
        *args: Any,
        max_width: float = 1.0,
        disjoint: Sequence[float] = (),
        slim_in: bool = True,
        slim_out: bool = True,
        **kwargs: Any,
    ) -> None:
        inputs = scale_channels(full_in, max_width) if slim_in else full_in
        super().__init__(inputs, scale_channels(full_out, max_width) if slim_out else full_out, *args, **kwargs)
        self.full_in, self.full_out = full_in, full_out
        self.slim_in, self.slim_out = slim_in, slim_out
        self.disjoint = tuple(disjoint)
        self._step = Transient()

    def spans(self, width: float | None) -> tuple[Span, Span]:
        """The output and the input channels that `width` uses; an InputError where it is None."""
        width = given(width)
        outputs = channel_span(self.full_out, width, self.disjoint) if self.slim_out else (0, self.full_out)
        return outputs, channel_span(self.full_in, width, self.disjoint) if self.slim_in else (0, self.full_in)

    def full_size(self) -> tuple[int, int]:
        """Output and input channels of the weight, as numbers, so that torch.fx can trace through."""
        raise NotImplementedError

    def weight_at(self, width: float | None) -> torch.Tensor:
        """The slice of `width`, [out * width, in * width, ...]."""
        if width in self._step:
            return self._step[width]
        # The weight is read before its size, which a network that grows counts on.
        return part(self.weight, self.full_size(), self.spans(width))


@contextmanager
def sliced_once(modules: Iterable[nn.Module], widths: Sequence[float]) -> Iterator[None]:
    """Inside, layers of `modules` take their slices of `widths` from here, all made at first, in autocast's type.

    Outputs and gradients are those without it, but for the order in which the gradients of several widths, and of
    several uses, are added up. Within another one of the same layers it does nothing, nor with fewer than two widths.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, SlicedWeight)]
    layers = [layer for layer in layers if not layer._step] if len(widths) > 1 else []
    widest_first = sorted(widths, reverse=True)
    try:
        for layer in layers:
            blocks = [tuple(slice(*span) for span in layer.spans(width)) for width in widest_first]
            slices = cut(layer.weight, blocks, _compute_dtype(layer.weight))
            layer._step.update(zip(widest_first, slices, strict=True))
        yield
    finally:
        for layer in layers:
            layer._step.clear()


def cut(tensor: torch.Tensor, blocks: Sequence[Block], dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Blocks of a tensor, each contiguous, with one backward that adds up the gradients of all.

    Outputs and gradients equal those of `[tensor[block] for block in blocks]`, but for the order of additions. The
    tensor is contiguous or in channels last; so are the blocks. If the first block is everything, it is no copy, and
    its gradient takes in those of the others: nothing else may hold on to it. Gradients add up in the tensor's type.
    """
    return _Cut.apply(tensor, tensor.dtype if dtype is None else dtype, *blocks)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dtype: torch.dtype, *blocks: Block) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.shape, ctx.dtype, ctx.layout = blocks, tensor.shape, tensor.dtype, memory_format(tensor)
        return tuple(_copy(tensor, block, dtype, ctx.layout) for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        total: torch.Tensor | None = None
        for block, gradient in zip(ctx.blocks, gradients, strict=True):
            if gradient is None:
                continue
            if total is not None:
                total[block] += gradient
            elif gradient.shape == ctx.shape:
                # The layer's backward has just made it for this one use, so that it may become the sum.
                total = gradient.to(ctx.dtype)
            else:
                total = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device, memory_format=ctx.layout)
                total.zero_()[block] = gradient.to(ctx.dtype)
        return (total, None, *(None for _ in ctx.blocks))


def part(tensor: torch.Tensor, sizes: tuple[int, ...], spans: tuple[Span, ...]) -> torch.Tensor:
    """The block of a tensor of `sizes` at `spans`, as a view."""
    # A slice that takes everything would still cost a node in the graph and a zero-filled gradient in the backward.
    if spans == tuple((0, size) for size in sizes):
        return tensor
    return tensor[tuple(slice(*span) for span in spans)]


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """Channels last where four dimensions have its strides (a 1x1 kernel is contiguous in either), else contiguous."""
    last = tensor.ndim == 4 and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
    return torch.channels_last if last else torch.contiguous_format


def _copy(tensor: torch.Tensor, block: Block, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    piece = tensor[block]
    if piece.shape == tensor.shape:
        return tensor.view_as(tensor) if dtype == tensor.dtype else tensor.to(dtype)
    return torch.empty(piece.shape, dtype=dtype, device=tensor.device, memory_format=layout).copy_(piece)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    lowered = torch.is_autocast_enabled(device) and weight.dtype == torch.float32
    return torch.get_autocast_dtype(device) if lowered else weight.dtype
