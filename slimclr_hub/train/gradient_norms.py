"""Gradient norms within the smallest sub-network's slices of the weights and outside them (paper, Fig. 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import SlimmableConv2d, SlimmableLinear, SwitchableLinear
from slimclr_hub.models.slicing import Span
from slimclr_hub.models.widths import width_key


@dataclass(frozen=True)
class LayerSlice:
    """A slimmable layer and the slices of its parameters that one width uses.

    Args:
        name: Name of the layer.
        parameters: Its trained weight, and bias if it has one.
        spans: For each parameter the span that the width uses of every leading dimension, outputs first.
    """

    name: str
    parameters: tuple[torch.Tensor, ...]
    spans: tuple[tuple[Span, ...], ...]


def layer_slices(method: nn.Module, width: float) -> list[LayerSlice]:
    """Return a width's slices of all trained layers whose weights are shared by widths, of the network and its heads.

    Batch normalisation and switchable classifiers are left out, since each width has its own.

    Raises:
        InputError: There is no such layer, or the width uses no channel of one.
    """
    found = []
    for name, layer in method.named_modules():
        if isinstance(layer, SlimmableConv2d | SlimmableLinear) and layer.weight.requires_grad:
            spans = layer.spans(width)
            biases = () if layer.bias is None else (layer.bias,)
            found.append(LayerSlice(name, (layer.weight, *biases), (spans, spans[:1])[: 1 + len(biases)]))
    if not found:
        raise InputError('the network has no layer whose weights several widths share')
    for each in found:
        if any(first == end for first, end in each.spans[0]):
            raise InputError(f'width {width:g} uses no channel of {each.name}; give diagnostics.smallest a larger one')
    return found


def slice_norms(layers: Sequence[LayerSlice]) -> torch.Tensor:
    """L2 norms of the gradients of layers: within their slices, of the whole gradient, and outside the slices.

    A layer's weight and bias count as one tensor. Slice and rest are measured, and the whole follows from both: a rest
    by subtraction would lose digits. The device is not synchronised.

    Args:
        layers: From `layer_slices`; every parameter has a gradient.

    Returns:
        [layers, 3], on the device; the norm of an empty rest is 0.
    """
    pieces: list[torch.Tensor] = []
    owners: list[int] = []
    for i, layer in enumerate(layers):
        for parameter, spans in zip(layer.parameters, layer.spans, strict=True):
            assert parameter.grad is not None
            inside, *outside = _pieces(parameter.grad, spans)
            pieces += [inside, *outside]
            owners += [2 * i, *[2 * i + 1] * len(outside)]
    squares = torch.stack([norm.float().square() for norm in torch._foreach_norm(pieces)])
    sums = squares.new_zeros(2 * len(layers)).index_add_(0, _indices(owners, squares.device), squares)
    smallest, rest = sums.view(-1, 2).unbind(1)
    return torch.stack([smallest, smallest + rest, rest], 1).sqrt()


def mean_norms(layers: Sequence[LayerSlice]) -> torch.Tensor:
    """Mean over layers of `slice_norms` (paper, Fig. 3), [3]."""
    return slice_norms(layers).mean(0)


def last_linear(method: nn.Module) -> torch.Tensor:
    """Weight of the last linear layer, which the gradient reaches first (paper, Fig. 4).

    It is the head's last layer for MoCo v2 and SimCLR, the predictor's last for MoCo v3, and the classifier for
    supervised training, of a switchable classifier that of the full width.

    Raises:
        InputError: The method has no such layer.
    """
    for name in 'predictor', 'head':
        if isinstance(head := getattr(method, name, None), nn.Module):
            return head.get_submodule('fc2').get_parameter('weight')
    backbone = method.get_submodule('backbone')
    classifier = backbone.get_submodule('fc')
    if isinstance(classifier, SwitchableLinear):
        widths = method.widths
        assert isinstance(widths, tuple)
        classifier = classifier[width_key(max(widths))]
    if not isinstance(classifier, nn.Linear):
        raise InputError(f'{type(method).__name__} has no head and no classifier, so it has no last linear layer')
    return classifier.weight


def _pieces(tensor: torch.Tensor, spans: tuple[Span, ...]) -> Iterator[torch.Tensor]:
    """Yield a view of the slice, then views of disjoint pieces around it."""
    pieces = []
    for dim, (first, end) in enumerate(spans):
        pieces += [tensor.narrow(dim, 0, first), tensor.narrow(dim, end, tensor.shape[dim] - end)]
        tensor = tensor.narrow(dim, first, end - first)
    yield tensor
    yield from (piece for piece in pieces if piece.numel())


def _indices(values: list[int], device: torch.device) -> torch.Tensor:
    indices = torch.tensor(values)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else indices
