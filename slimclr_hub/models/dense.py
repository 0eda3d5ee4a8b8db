"""Dense networks: timm's ResNet with every channel count, the stem's included, scaled by a width.

`SlimmableResNet.extract` returns one, and `slimclr_resnet50_050` builds one. The stem of timm's class has 64 channels
always, so stem and stages are built here, of timm's blocks and under timm's names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import check_sizes
from slimclr_hub.models.loading import load_file
from slimclr_hub.models.widths import scale_channels


class DenseResNet(ResNet):
    """timm's ResNet at one width of a slimmable network, with timm's keys and interface.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each stage; four stages, or three for the networks for 32x32 images.
        channels: Channels of each stage at width 1.0, before the block's expansion; the stem has those of the first.
        width: Fraction of the channels to use.
        small_stem: For 32x32 images, a 3x3 convolution of stride 1 instead of 7x7, stride 2 and pooling.
        in_chans: Channels of the images.
        output_stride: 8, 16 or 32; below 32 later stages dilate instead of striding, as in timm.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0 at the first.
        zero_init_last: Start the last normalisation of each block at zero.
        kwargs: `num_classes`, `global_pool`, `drop_rate`, as in timm's ResNet.
    """

    pretrained_cfg: dict[str, Any]  # set by timm's factory

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        width: float = 1.0,
        small_stem: bool = False,
        in_chans: int = 3,
        output_stride: int = 32,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise InputError(f'output_stride {output_stride} is not 8, 16 or 32')
        check_sizes(layers, channels, (width,), in_chans, kwargs.get('num_classes', 1000))
        scaled = tuple(scale_channels(c, width) for c in channels)
        factory: dict[str, Any] = {'device': device, 'dtype': dtype}
        # Built without blocks for its pooling, head and flags; the real stem and stages follow under the same names.
        kwargs.update(factory, channels=scaled, in_chans=in_chans, output_stride=output_stride)
        super().__init__(block, (0,) * len(scaled), **kwargs)  # type: ignore[arg-type]
        self.width = width
        kernel, stride = (3, 1) if small_stem else (7, 2)
        stem = nn.Conv2d(in_chans, scaled[0], kernel, stride=stride, padding=kernel // 2, bias=False, **factory)
        self.add_module('conv1', stem)
        self.add_module('bn1', nn.BatchNorm2d(scaled[0], **factory))
        stages, info = make_blocks(
            (block,) * len(scaled),
            scaled,
            tuple(layers),
            inplanes=scaled[0],
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
            act_layer=nn.ReLU,
            norm_layer=nn.BatchNorm2d,
            **factory,
        )
        # timm's blocks have a whole multiple of their inner channels, int(4 C w) is not one at every width.
        outer = tuple(scale_channels(c * block.expansion, width) for c in channels)
        if outer != tuple(stage['num_chs'] for stage in info):
            _set_outer_channels([stage for _, stage in stages], outer, factory)
            info = [{**stage, 'num_chs': c} for stage, c in zip(info, outer, strict=True)]
            self._set_features(outer[-1], factory)
        for name, stage in stages:
            self.add_module(name, stage)
        if len(stages) == 3:
            self.layer4 = nn.Sequential()  # timm's forward runs four stages
        if small_stem:
            self.add_module('maxpool', nn.Identity())
            info = [{**stage, 'reduction': stage['reduction'] // 4} for stage in info]
        self.feature_info = [{'num_chs': scaled[0], 'reduction': stride, 'module': 'act1'}, *info]
        self.init_weights(zero_init_last=zero_init_last)

    def _set_features(self, features: int, factory: dict[str, Any]) -> None:
        pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(features, self.num_classes, pool_type=pool, **factory)
        self.num_features = features
        self.head_hidden_size = features * self.global_pool.feat_mult()

    def init_head(self) -> None:
        """Initialise the head as timm does."""
        if isinstance(self.fc, nn.Linear):
            self.fc.reset_parameters()

    def load_pretrained(self, path: str | Path) -> None:
        """Load from a safetensors file, of a slimmable network or of one like this; see `loading.load_file`."""
        load_file(self, Path(path))

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Extend timm's method to networks of three stages."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Extend timm's method to networks of three stages."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if last == len(self.feature_info) - 1:
            if prune_head:
                self.reset_classifier(0, '')
            return taken
        return super().prune_intermediate_layers(taken, prune_norm=prune_norm, prune_head=prune_head)


def _set_outer_channels(stages: Sequence[nn.Module], outer: Sequence[int], factory: dict[str, Any]) -> None:
    """Give the bottlenecks of each stage as many output channels as `outer` says."""
    inputs: int | None = None
    for stage, outputs in zip(stages, outer, strict=True):
        for block in stage.children():
            assert isinstance(block, Bottleneck)
            block.bn3 = nn.BatchNorm2d(outputs, **factory)
            block.conv3 = _conv_like(block.conv3, block.conv3.in_channels, outputs, factory)
            if block.downsample is not None:
                first = next(block.downsample.children())
                assert isinstance(first, nn.Conv2d)
                shortcut = _conv_like(first, inputs or first.in_channels, outputs, factory)
                block.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs, **factory))
            if inputs is not None:
                block.conv1 = _conv_like(block.conv1, inputs, block.conv1.out_channels, factory)
            inputs = outputs


def _conv_like(conv: nn.Conv2d, inputs: int, outputs: int, factory: dict[str, Any]) -> nn.Conv2d:
    size, stride, padding, dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False, **factory)  # type: ignore[arg-type]
