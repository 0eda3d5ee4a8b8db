"""Slimmable layers: one tensor of weights, of which width w uses the leading channels, or channels of its own.

Width is an argument of every forward and no layer keeps one, so a layer is a pure function of its inputs: several
widths can run in one step, under compile and under checkpointing (Yu et al. 2019, https://arxiv.org/abs/1812.08928).
Tensors are as large as the largest of the network's widths asks.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.errors import InputError
from slimclr_hub.models.slicing import SlicedWeight, part
from slimclr_hub.models.widths import given, scale_channels, width_key

_MOST_BLOCKS, _MOST_PARAMETERS = 1000, 500_000_000
_ONEDNN_BLOCK = 16
"""Channels of a block in AVX-512, the most that oneDNN has."""


def check_sizes(
    layers: Sequence[int], channels: Sequence[int], widths: Sequence[float], in_chans: int, num_classes: int
) -> None:
    """Check the sizes of a ResNet before it is built, as a `config.json` from anywhere may ask for any.

    Raises:
        InputError: One is no positive number, a width leaves no channel, or the network has more than 1,000 blocks or
            about 500 million parameters.
    """
    sizes = {'layers': layers, 'channels': channels, 'in_chans': [in_chans], 'num_classes': [num_classes + 1]}
    for name, values in sizes.items():
        if not all(isinstance(value, Integral) and value > 0 for value in values):
            raise InputError(f'{name} {values if len(values) > 1 else values[0]} is no positive number')
    if narrow := [width for width in widths if not scale_channels(min(channels), width)]:
        raise InputError(f'width {narrow[0]:g} leaves no channel of {min(channels)}; give a larger one')
    blocks = sum(layers)
    # At most: 3x3 and 1x1 convolutions of bottlenecks, and for each width a head of its own.
    parameters = 49 * in_chans * channels[0] + 4 * channels[-1] * num_classes * sum(widths)
    parameters += sum(17 * count * size * size for count, size in zip(layers, channels, strict=True))
    if blocks > _MOST_BLOCKS or parameters > _MOST_PARAMETERS:
        raise InputError(
            f'a network of {blocks} blocks and about {parameters:.1e} parameters (in_chans {in_chans}, num_classes '
            f'{num_classes}) is not built; the most are {_MOST_BLOCKS} and {_MOST_PARAMETERS:.1e}'
        )


class SlimmableConv2d(SlicedWeight, nn.Conv2d):
    """Convolution whose width w uses `int(w * channels)` of its output and input channels; see `SlicedWeight`."""

    def full_size(self) -> tuple[int, int]:
        """Output and input channels of the weight."""
        return self.out_channels, self.in_channels

    def forward(self, x: torch.Tensor, width: float | None = None) -> torch.Tensor:
        """[N, in * width, H, W] -> [N, out * width, H', W']."""
        bias = None if self.bias is None else part(self.bias, (self.out_channels,), self.spans(width)[:1])
        weight = self.weight_at(width)
        if self.training and self._overflows(width):
            return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], weight, bias)
        return self._conv_forward(x, weight, bias)

    def _overflows(self, width: float | None) -> bool:
        """Whether oneDNN's backward would write past its workspace: https://github.com/uxlfoundation/oneDNN/issues/6035.

        That of a strided 1x1 convolution does, for inputs of few channels that lie together, on a CPU. Leaving out the
        pixels that the stride skips makes it an ordinary one; on a GPU, too, as torch.fx traces no question after the
        device.
        """
        first, end = self.spans(width)[1]
        return (
            end - first < _ONEDNN_BLOCK
            and self.kernel_size == (1, 1)
            and self.stride != (1, 1)
            and self.padding == (0, 0)
        )


class SlimmableLinear(SlicedWeight, nn.Linear):
    """Linear layer whose width w uses `int(w * features)` features of slim sides; see `SlicedWeight`."""

    def full_size(self) -> tuple[int, int]:
        """Output and input features of the weight."""
        return self.out_features, self.in_features

    def forward(self, x: torch.Tensor, width: float | None = None) -> torch.Tensor:
        """[..., in * width] -> [..., out * width]."""
        bias = None if self.bias is None else part(self.bias, (self.out_features,), self.spans(width)[:1])
        return F.linear(x, self.weight_at(width), bias)


class Switchable(nn.ModuleDict):
    """One module for each width, under the keys `w100`, `w075`, ..."""

    def __init__(self, modules: Mapping[float, nn.Module]) -> None:
        super().__init__({width_key(width): module for width, module in modules.items()})
        self._names = {width: width_key(width) for width in modules}  # which takes as long as a small layer to spell

    def forward(self, x: torch.Tensor, width: float | None = None) -> torch.Tensor:
        """Apply the module of `width`."""
        width = given(width)
        return self[self._names.get(width) or width_key(width)](x)


class SwitchableBatchNorm2d(Switchable):
    """One ordinary batch normalisation for each width: [N, C * width, H, W] -> the same shape.

    Being plain modules, they are found by whatever looks for batch normalisation: SyncBatchNorm conversion, freezing,
    weight-decay filters.
    """

    def __init__(self, num_features: int, widths: Sequence[float], **kwargs: Any) -> None:
        super().__init__({w: nn.BatchNorm2d(scale_channels(num_features, w), **kwargs) for w in widths})
        self.full_features = num_features

    @torch.no_grad()
    def sibling(self, width: float, wider: float) -> nn.Module:
        """A normalisation for another width: the leading channels of that of `wider`; an InputError if it is frozen."""
        norm = copy.deepcopy(self[width_key(wider)])
        if not isinstance(norm, _BatchNorm):
            raise InputError(f'a normalisation is frozen ({type(norm).__name__}); unfreeze it to add a width')
        norm.num_features = scale_channels(self.full_features, width)
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            old = getattr(norm, name)
            new = old[: norm.num_features].clone()
            setattr(norm, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        return norm


class SwitchableBatchNorm1d(Switchable):
    """One ordinary batch normalisation of vectors for each width, as in the heads of MoCo v3.

    [B, C * width] -> the same shape; or [B, C] where `slim` is false, as after the last layer of a head.
    """

    def __init__(self, num_features: int, widths: Sequence[float], *, slim: bool = True, **kwargs: Any) -> None:
        super().__init__(
            {w: nn.BatchNorm1d(scale_channels(num_features, w) if slim else num_features, **kwargs) for w in widths}
        )


class SwitchableLinear(Switchable):
    """One linear layer for each width, sharing nothing: the switchable probe of the paper (section 3.2).

    [N, in * width * multiplier] -> [N, out]; inputs are `multiplier` times as long after the pooling `catavgmax`.
    """

    def __init__(
        self, in_features: int, out_features: int, widths: Sequence[float], multiplier: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(
            {w: nn.Linear(scale_channels(in_features, w) * multiplier, out_features, **kwargs) for w in widths}
        )
        self.full_features = in_features
        self.multiplier = multiplier

    @torch.no_grad()
    def sibling(self, width: float, wider: float) -> nn.Module:
        """A layer for another width: that of `wider` at the leading features."""
        linear = copy.deepcopy(self[width_key(wider)])
        assert isinstance(linear, nn.Linear)
        features = scale_channels(self.full_features, width)
        blocks = linear.weight.unflatten(1, (self.multiplier, -1))
        linear.weight = nn.Parameter(blocks[..., :features].flatten(1).clone(), linear.weight.requires_grad)
        linear.in_features = features * self.multiplier
        return linear


class PassesWidth(nn.Module):
    """Base class of modules that pass a width to their layers, and refuse one that computes without it.

    PEFT puts an adapter, with the layer inside, in the place of a layer. Beside a slice the adapter's own layers do not
    fit, and at width 1.0 alone some would go unnoticed.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(value, 'base_layer', None), SlicedWeight):
            raise InputError(
                f'{name} cannot be a {type(value).__module__}.{type(value).__name__}, which knows no widths; adapt '
                'the ordinary layers of model.extract(WIDTH)'
            )
        super().__setattr__(name, value)


class SlimmableSequential(PassesWidth, nn.Sequential):
    """`nn.Sequential` that passes the width to each of its modules."""

    def forward(self, x: torch.Tensor, width: float | None = None) -> torch.Tensor:
        """Run the modules one after the other, each at `width`."""
        for module in self:
            x = module(x, width)
        return x


def shapes_at(model: nn.Module, widths: Collection[float]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a slimmable network's layers, if it held `widths`, whatever it holds now."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SlicedWeight):
            (_, rows), (_, columns) = module.spans(max(widths))
            shapes[f'{name}.weight'] = (rows, columns, *module.weight.shape[2:])
            if getattr(module, 'bias', None) is not None:
                shapes[f'{name}.bias'] = (rows,)
        elif isinstance(module, SwitchableBatchNorm2d | SwitchableLinear):
            for leaf, tensor in tensors_of(next(iter(module.values()))):
                for width in widths:
                    shapes[f'{name}.{width_key(width)}.{leaf}'] = _shape_at(module, leaf, tensor, width)
    return shapes


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module, by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _shape_at(
    switch: SwitchableBatchNorm2d | SwitchableLinear, leaf: str, other: torch.Tensor, width: float
) -> tuple[int, ...]:
    """Shape at `width` of a tensor that is `other` at another width."""
    if not other.ndim or (isinstance(switch, SwitchableLinear) and leaf == 'bias'):
        return tuple(other.shape)
    multiplier = switch.multiplier if isinstance(switch, SwitchableLinear) else 1
    return (*other.shape[:-1], scale_channels(switch.full_features, width) * multiplier)


def slice_starts(model: nn.Module, width: float) -> dict[str, tuple[int, ...]]:
    """Name -> first index of `width` in each weight and bias of a model's slimmable layers."""
    starts: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SlicedWeight):
            outputs, inputs = module.spans(width)
            starts[f'{name}.weight'] = outputs[0], inputs[0]
            starts[f'{name}.bias'] = (outputs[0],)
    return starts
