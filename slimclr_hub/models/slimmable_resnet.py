"""Slimmable ResNets: one network that runs at several widths, in timm's registry and with timm's interface.

Paper: Zhao et al. 2023, Slimmable Networks for Contrastive Self-supervised Learning, section 3.1, on the networks of
Yu et al. 2019 (https://arxiv.org/abs/1812.08928) and He et al. 2016 (https://arxiv.org/abs/1512.03385).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint
from timm.models import resnet as timm_resnet
from timm.models._features import FeatureGetterNet, FeatureInfo, feature_take_indices
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models.cascade import FittedCascades, Routed, load_cascades, route
from slimclr_hub.models.cost import WidthNeeds, describe
from slimclr_hub.models.dense import DenseResNet
from slimclr_hub.models.layers import (
    PassesWidth,
    SlimmableConv2d,
    SlimmableLinear,
    SlimmableSequential,
    SwitchableBatchNorm2d,
    SwitchableLinear,
    check_sizes,
    slice_starts,
)
from slimclr_hub.models.loading import load_file
from slimclr_hub.models.resolutions import (
    Resolutions,
    check_unchanged,
    copy_statistics,
    load_resolutions,
    load_statistics,
    statistics_of,
)
from slimclr_hub.models.slicing import Transient, cut, sliced_once
from slimclr_hub.models.widths import (
    DEFAULT_WIDTHS,
    check_width,
    check_widths,
    disjoint_widths,
    scale_channels,
    width_key,
)
from slimclr_hub.weights.hashes import state_hash
from slimclr_hub.weights.slices import DISJOINT, WIDTH_DIGITS, dense_tensors, with_batch_counts

_SOURCE = ('architecture', 'tag', 'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source')

HEAD_STD = 0.01
"""Standard deviation of a new head's weights."""

_GRAPHS = 8  # torch._dynamo.config.recompile_limit, unless somebody has changed it


class BasicBlock(PassesWidth):
    """Residual block of two 3x3 convolutions; timm's, with a width in its forward.

    Args:
        inplanes: Input channels at width 1.0.
        planes: Output channels at width 1.0; a `Bottleneck` has four times as many.
        widths: Widths that the network holds.
        stride: Stride of the first 3x3 convolution.
        dilation: Dilation of the second 3x3 convolution, if there is one.
        first_dilation: Dilation of the first 3x3 convolution.
        downsample: Projection of the shortcut, or none.
        drop_path: Stochastic depth, or none.
        disjoint: Widths that do not overlap, if any.
    """

    expansion = 1
    dense: type[timm_resnet.BasicBlock] | type[timm_resnet.Bottleneck] = timm_resnet.BasicBlock

    def __init__(
        self,
        inplanes: int,
        planes: int,
        widths: Sequence[float],
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        downsample: SlimmableSequential | None = None,
        drop_path: nn.Module | None = None,
        disjoint: Sequence[float] = (),
        **factory: Any,
    ) -> None:
        super().__init__()
        conv = partial(SlimmableConv2d, max_width=max(widths), disjoint=disjoint, bias=False, **factory)
        norm = partial(SwitchableBatchNorm2d, widths=widths, **factory)
        first = {'stride': stride, 'padding': first_dilation, 'dilation': first_dilation}
        self._add_branch(inplanes, planes, conv, norm, first, {'padding': dilation, 'dilation': dilation})
        self.downsample = downsample
        self.drop_path = drop_path

    def _add_branch(self, inplanes: int, planes: int, conv: Any, norm: Any, first: Any, second: Any) -> None:
        # `first` and `second` are stride, padding and dilation of the 3x3 convolutions.
        self.conv1: SlimmableConv2d = conv(inplanes, planes, 3, **first)
        self.bn1: SwitchableBatchNorm2d = norm(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2: SlimmableConv2d = conv(planes, planes, 3, **second)
        self.bn2: SwitchableBatchNorm2d = norm(planes)
        self.act2 = nn.ReLU(inplace=True)

    def _branch(self, x: torch.Tensor, width: float) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x, width), width))
        return self.bn2(self.conv2(x, width), width)

    def last(self) -> tuple[SwitchableBatchNorm2d, nn.ReLU]:
        """The normalisation that ends the residual branch, and the activation after the sum."""
        return self.bn2, self.act2

    def forward(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """[N, in * width, H, W] -> [N, expansion * planes * width, H', W']."""
        shortcut = x if self.downsample is None else self.downsample(x, width)
        x = self._branch(x, width)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.last()[1](x)


class Bottleneck(BasicBlock):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, the stride in the 3x3; arguments as in `BasicBlock`."""

    expansion = 4
    dense = timm_resnet.Bottleneck

    def _add_branch(self, inplanes: int, planes: int, conv: Any, norm: Any, first: Any, second: Any) -> None:
        self.conv1 = conv(inplanes, planes, 1)
        self.bn1 = norm(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes, 3, **first)
        self.bn2 = norm(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3: SlimmableConv2d = conv(planes, planes * self.expansion, 1)
        self.bn3: SwitchableBatchNorm2d = norm(planes * self.expansion)
        self.act3 = nn.ReLU(inplace=True)

    def _branch(self, x: torch.Tensor, width: float) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x, width), width))
        x = self.act2(self.bn2(self.conv2(x, width), width))
        return self.bn3(self.conv3(x, width), width)

    def last(self) -> tuple[SwitchableBatchNorm2d, nn.ReLU]:
        """The normalisation that ends the residual branch, and the activation after the sum."""
        return self.bn3, self.act3


def _allow_graphs(widths: int) -> None:
    """Let torch.compile make for each width as many graphs of a function as it makes of one of other networks.

    In training and in inference, of whole batches and of the last one, a width has up to four.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS * widths)


class SlimmableResNet(PassesWidth):
    """A ResNet that runs at any of several widths, with shared convolutions and a normalisation of each width's own.

    A sub-network of width w uses the first `int(w * C)` of each layer's C channels, the stem included. Tensors are as
    large as the largest of `widths` needs, so that `widths=(0.5,)` is an individual network of width 0.5.

    With `overlap=False` sub-networks share weights with the largest alone: the narrowest uses the first channels, the
    next wider one those that follow, and so on. This is the reference code's `overlap_weight=False`.

    Slimmable Networks for Contrastive Self-supervised Learning, section 3.1 and figure 2.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Blocks in each stage.
        channels: Channels of each stage at width 1.0, before the block's expansion; the stem has those of the first.
        widths: The widths to hold, in any order.
        width: The width that is active at first; the largest unless given.
        held: Widths to have tensors for; all unless given. `LazySlimmableResNet` begins with one.
        overlap: True if sub-networks share channels with each other; false if only with the largest, in which case the
            widths below it must add up to no more than it.
        head: `switchable`, a linear layer for each width, or `slimmable`, one whose inputs are sliced.
        num_classes: Classes; 0 for no head.
        in_chans: Channels of the images.
        global_pool: timm's pooling type, `''` for none.
        output_stride: 8, 16 or 32; below 32 later stages dilate instead of striding, as in timm.
        small_stem: For 32x32 images, a 3x3 convolution of stride 1 instead of 7x7, stride 2 and pooling.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0 at the first.
        zero_init_last: Start the last normalisation of each block at zero.

    Raises:
        InputError: A width, head or output stride does not exist, or the widths do not fit beside each other.
    """

    pretrained_cfg: dict[str, Any]  # set by timm's factory

    def __init__(
        self,
        block: type[BasicBlock],
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        *,
        widths: Sequence[float] = DEFAULT_WIDTHS,
        width: float | None = None,
        held: Sequence[float] | None = None,
        overlap: bool = True,
        head: str = 'switchable',
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        output_stride: int = 32,
        small_stem: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise InputError(f'output_stride {output_stride} is not 8, 16 or 32')
        if num_classes > 0 and not global_pool:
            raise InputError(f"global_pool '' leaves {num_classes} classes nothing to classify; give num_classes=0")
        self._widths = check_widths(widths)
        check_sizes(layers, channels, self._widths, in_chans, num_classes)
        factory: dict[str, Any] = {'device': device, 'dtype': dtype}
        self._held = self._widths if held is None else check_widths(held)
        self.overlap = overlap
        self._disjoint = disjoint_widths(self._widths, overlap)
        if self._disjoint:
            if self._held != self._widths:
                raise InputError('with overlap=False all widths are held from the start; leave held and lazy out')
            units = [round(w * 10**WIDTH_DIGITS) for w in self._disjoint]
            self.register_buffer(DISJOINT, torch.tensor(units, dtype=torch.int32, device=device))
        # An index rather than the float: torch.compile would make a float that changes a dynamic input of the graph.
        self._active = 0 if width is None else self._widths.index(check_width(width, self._widths))
        self._block, self._layers, self._channels = block, tuple(layers), tuple(channels)
        self._small_stem = small_stem
        self.in_chans = in_chans
        self.output_stride = output_stride
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False
        self._compiled = Transient()
        self._cascades: FittedCascades | None = None
        self._statistics: dict[int, dict[str, torch.Tensor]] = {}
        _allow_graphs(len(self._widths))

        kernel, stride = (3, 1) if small_stem else (7, 2)
        conv: dict[str, Any] = {'max_width': self._held[0], 'disjoint': self._disjoint, 'bias': False, **factory}
        self.conv1 = SlimmableConv2d(
            in_chans, channels[0], kernel, stride=stride, padding=kernel // 2, slim_in=False, **conv
        )
        self.bn1 = SwitchableBatchNorm2d(channels[0], self._held, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self._feature_info: list[dict[str, Any]] = [{'num_chs': channels[0], 'reduction': stride, 'module': 'act1'}]
        self._add_stages(conv, factory)
        self.full_features: int = self._feature_info[-1]['num_chs']

        self._make_head(head, num_classes, global_pool, factory)
        self.init_weights(zero_init_last=zero_init_last)

    def _add_stages(self, conv: dict[str, Any], factory: dict[str, Any]) -> None:
        # The rules for stride, dilation and stochastic depth are timm's (`timm.models.resnet.make_blocks`).
        inplanes = self._channels[0]
        net_stride, dilation, previous_dilation, index = 4, 1, 1, 0
        for stage, (planes, count) in enumerate(zip(self._channels, self._layers, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            if net_stride >= self.output_stride:
                dilation *= stride
                stride = 1
            else:
                net_stride *= stride
            blocks = []
            outplanes = planes * self._block.expansion
            for i in range(count):
                downsample = None
                if i == 0 and (stride != 1 or inplanes != outplanes):
                    downsample = SlimmableSequential(
                        SlimmableConv2d(inplanes, outplanes, 1, stride=stride, **conv),
                        SwitchableBatchNorm2d(outplanes, self._held, **factory),
                    )
                drop_path = self.drop_path_rate * index / (sum(self._layers) - 1)
                blocks.append(
                    self._block(
                        inplanes,
                        planes,
                        self._held,
                        stride=stride if i == 0 else 1,
                        dilation=dilation,
                        first_dilation=previous_dilation,
                        downsample=downsample,
                        drop_path=DropPath(drop_path) if drop_path > 0 else None,
                        disjoint=self._disjoint,
                        **factory,
                    )
                )
                previous_dilation, inplanes, index = dilation, outplanes, index + 1
            name = f'layer{stage}'
            self.add_module(name, SlimmableSequential(*blocks))
            reduction = net_stride // 4 if self._small_stem else net_stride
            self._feature_info.append({'num_chs': inplanes, 'reduction': reduction, 'module': name})

    def _make_head(self, head: str, num_classes: int, global_pool: str, factory: dict[str, Any]) -> None:
        # Everything is made before anything is set, so that an error leaves the network as it was.
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        multiplier = pool.feat_mult()
        fc: nn.Module
        if head not in ('switchable', 'slimmable'):
            raise InputError(f"head {head!r} is not one of 'switchable', 'slimmable'")
        if num_classes <= 0:
            fc = nn.Identity()
        elif head == 'switchable':
            fc = SwitchableLinear(self.full_features, num_classes, self._held, multiplier, **factory)
        elif multiplier != 1:
            raise InputError(f"global_pool {global_pool!r} needs head='switchable': its halves do not slice")
        else:
            slim: dict[str, Any] = {'max_width': self._held[0], 'disjoint': self._disjoint, 'slim_out': False}
            fc = SlimmableLinear(self.full_features, num_classes, **slim, **factory)
        self.head, self.num_classes, self.global_pool, self.fc = head, num_classes, pool, fc
        self.init_head()

    def __setattr__(self, name: str, value: Any) -> None:
        # What knows no widths would fail in the first forward, far from here.
        if name == 'fc' and type(value) in (nn.Linear, nn.Sequential):
            raise InputError(
                f'fc cannot be a {type(value).__name__}, which knows no widths; use reset_classifier(CLASSES)'
            )
        if name == 'conv1' and type(value) is nn.Conv2d:
            raise InputError('conv1 cannot be a Conv2d, which knows no widths; give in_chans=CHANNELS to create_model')
        super().__setattr__(name, value)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Kaiming fan-out for convolutions, zero for the last normalisation of each block, N(0, 0.01) for the head."""
        for module in self.modules():
            if isinstance(module, SlimmableConv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif zero_init_last and isinstance(module, BasicBlock):
                for norm in module.last()[0].values():
                    nn.init.zeros_(norm.get_parameter('weight'))
        self.init_head()

    def init_head(self) -> None:
        """N(0, 0.01) for the weights of the head, zero for its biases."""
        for module in self.fc.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=HEAD_STD)
                nn.init.zeros_(module.bias)

    def load_pretrained(self, path: str | Path) -> None:
        """Load from a safetensors file, of which this network may hold fewer widths; see `loading.load_file`."""
        load_file(self, Path(path))

    # Widths

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that this network holds, in descending order."""
        return self._widths

    @property
    def width(self) -> float:
        """The active width, at which `forward` runs."""
        return self._widths[self._active]

    def set_width(self, width: float) -> ExitStack:
        """Switch the active width; `with model.set_width(0.5): ...` switches back on leaving.

        Raises:
            InputError: The network does not hold `width`; the message lists those that it does.
        """
        back = ExitStack()
        back.callback(self.set_width, self.width)
        self._active = self._widths.index(self._ready(width))
        return back

    def add_width(self, width: float) -> None:
        """Add a width between those of the network: new normalisations and a new head, everything else is shared.

        They begin as the leading part of the next wider one's. Before use, the statistics have to be estimated at the
        new width, as `slimclr_hub.models.calibrate.calibrate_width` does.

        Raises:
            InputError: The network has that width already, is narrower, or its widths do not overlap.
        """
        if not self.overlap:
            raise InputError(
                f'width {width:g} cannot be added to a network with overlap=False, as its channels would be those of '
                f'others; train a network that has it among its widths'
            )
        (width,) = check_widths([width])
        widths = check_widths((*self._widths, width))
        if widths[0] != self._widths[0]:
            raise InputError(f"width {width:g} exceeds this network's tensors, which are those of {self._widths[0]:g}")
        active, wider = self.width, widths[widths.index(width) - 1]
        self._ready(wider)
        switchables = [m for m in self.modules() if isinstance(m, SwitchableBatchNorm2d | SwitchableLinear)]
        siblings = [module.sibling(width, wider) for module in switchables]  # all of them, or an error and none
        for module, sibling in zip(switchables, siblings, strict=True):
            module[width_key(width)] = sibling
        self._widths = widths
        self._held = tuple(sorted({*self._held, width}, reverse=True))
        self._active = widths.index(active)

    def _drop_width(self, width: float) -> None:
        # Undoes `add_width`; `width` is not the active one.
        active = self.width
        for module in self.modules():
            if isinstance(module, SwitchableBatchNorm2d | SwitchableLinear):
                module.pop(width_key(width))
        self._widths, self._held = (tuple(w for w in of if w != width) for of in (self._widths, self._held))
        self._active = self._widths.index(active)

    def _ready(self, width: float) -> float:
        # The one of the widths that equals `width`, with its tensors in place.
        return check_width(width, self._widths)

    @property
    def num_features(self) -> int:
        """Channels of the last feature map at the active width."""
        return scale_channels(self.full_features, self.width)

    @property
    def head_hidden_size(self) -> int:
        """Length of the pooled features at the active width."""
        return self.num_features * self.global_pool.feat_mult()

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, reduction and module of each feature level, at the active width."""
        return [{**info, 'num_chs': scale_channels(info['num_chs'], self.width)} for info in self._feature_info]

    # Forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the active width: [N, C, H, W] -> [N, num_classes], or pooled features where there is no head."""
        return self._forward_at(x, self.width)

    def forward_at(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """Run `width` without switching to it.

        Raises:
            InputError: The network does not hold `width`.
        """
        return self._forward_at(x, self._ready(width))

    def forward_widths(self, x: torch.Tensor, widths: Sequence[float] | None = None) -> dict[float, torch.Tensor]:
        """Run several widths on the same images [N, C, H, W]; all of them unless named.

        In training, slices of weights are made once (`slicing.sliced_once`), and the widest one's first convolution
        serves all, since their outputs are channels of its own. This equals `forward_at` but for rounding.

        Returns:
            Width -> output as `forward_at` gives it, in the order asked for.
        """
        chosen = tuple(self._ready(width) for width in (self._widths if widths is None else widths))
        if not (self.training and len(chosen) > 1) or torch.compiler.is_compiling():
            return {width: self._forward_at(x, width) for width in chosen}
        with sliced_once([self], chosen):
            stems = self._first_convolutions(x, chosen)
            return {width: self._forward_head(self._forward_trunk(stems[width], width), width) for width in chosen}

    def load_cascades(self, path: str | Path) -> FittedCascades:
        """Read the thresholds for `cascade`, which `slimclr-hub cascade` has fitted to this network.

        Raises:
            InputError: They are of another network, or of this one with other weights, dtype or size of images.
        """
        found = load_cascades(Path(path))
        if found.weights != self._hash() or found.size != self.pretrained_cfg['input_size'][-1]:
            raise InputError(
                f'{path} is of other weights or another size; fit it again: slimclr-hub cascade NETWORK IMAGES'
            )
        for width in {width for cascade in found.cascades for width in cascade.widths}:
            check_width(width, self._widths)
        self._cascades = found
        return found

    def _hash(self) -> str:
        return state_hash(self)

    def load_resolutions(self, path: str | Path) -> Resolutions:
        """Read the statistics for `set_resolution`, which `slimclr-hub resolutions` has estimated for this network.

        Raises:
            InputError: They are of another network, or of this one with other weights, dtype or size of images.
        """
        found = load_resolutions(Path(path))
        if found.weights != self._hash() or found.size != self.pretrained_cfg['input_size'][-1]:
            raise InputError(
                f'{path} is of other weights or another size; make it again: slimclr-hub resolutions NETWORK IMAGES'
            )
        for pair in found.pairs:
            check_width(pair.width, self._widths)
        own = {name: tensor.clone() for name, tensor in statistics_of(self).items()}
        others = [size for size in found.sizes if size != found.size]
        self._statistics = {found.size: own, **load_statistics(Path(path), others, own)}
        return found

    def set_resolution(self, size: int) -> ExitStack:
        """Switch the statistics of all widths, and the preprocessing, to images of `size` pixels, for inference.

        `with model.set_resolution(20): ...` switches back on leaving, to the last bit. Thresholds of a cascade, which
        are of one size, are dropped.

        Raises:
            InputError: There are no statistics of this size, or the network has changed since they were loaded.
        """
        if not self._statistics:
            raise InputError('no statistics of other sizes: model.load_resolutions(FILE), of `slimclr-hub resolutions`')
        before = self.pretrained_cfg['input_size'][-1]
        if not {size, before} <= self._statistics.keys():
            sizes, widths = (', '.join(f'{n:g}' for n in known) for known in (sorted(self._statistics), self._widths))
            raise InputError(
                f'size {size} in place of {before}: there are statistics of sizes {sizes}, each at widths {widths}'
            )
        check_unchanged(self._statistics[before], self)
        copy_statistics(self._statistics[size], self)
        self.pretrained_cfg['input_size'] = (self.in_chans, size, size)
        self._cascades = None
        back = ExitStack()
        back.callback(self.set_resolution, before)
        return back

    def cascade(self, images: torch.Tensor, budget: float = inf) -> Routed:
        """Run images [N, C, H, W] at the narrowest width, and at wider ones where the answer is unsure.

        Args:
            images: As for `forward`.
            budget: Multiply-adds that an image may cost in the mean, if images are as those of the fit; without it,
                the cascade that agrees best with the widest width.

        Raises:
            InputError: No thresholds were loaded, the network is in training mode, or the budget is too small.
        """
        if self._cascades is None:
            raise InputError('no thresholds for a cascade: model.load_cascades(FILE), of `slimclr-hub cascade`')
        if self.training:
            raise InputError('a cascade is for inference, where no image depends on the others: call model.eval()')
        return route(self.forward_at, images, self._cascades.within(budget))

    def _first_convolutions(self, x: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        widest_first = sorted(widths, reverse=True)
        channels = [self.conv1.spans(width)[0] for width in widest_first]
        blocks = [(slice(None), slice(*span)) for span in channels]
        return dict(zip(widest_first, cut(self.conv1(x, widest_first[0]), blocks), strict=True))

    def compile_widths(self, **options: Any) -> None:
        """Compile the layers after the first convolution for training, one graph for each width.

        Inference is not affected. The widest has a second graph for steps that train it alone. `options` are those of
        `torch.compile`, such as `mode`.
        """
        for width in self._widths:
            self._compiled[width] = torch.compile(partial(self._trunk, width=width), dynamic=False, **options)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the last feature map [N, num_features, H / reduction, W / reduction]."""
        return self._forward_features(x, self.width)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool a feature map and classify it; with `pre_logits` only pool."""
        return self._forward_head(x, self.width, pre_logits)

    def _forward_at(self, x: torch.Tensor, width: float) -> torch.Tensor:
        return self._forward_head(self._forward_features(x, width), width)

    def _forward_features(self, x: torch.Tensor, width: float) -> torch.Tensor:
        if self._runs_compiled(width):
            return self._forward_trunk(self.conv1(x, width), width)
        return self._trunk(x, width, self.conv1)

    def _forward_trunk(self, x: torch.Tensor, width: float) -> torch.Tensor:
        return self._compiled[width](x) if self._runs_compiled(width) else self._trunk(x, width)

    def _runs_compiled(self, width: float) -> bool:
        return self.training and width in self._compiled and torch.is_grad_enabled()

    def _trunk(self, x: torch.Tensor, width: float, first: nn.Module | None = None) -> torch.Tensor:
        # The first convolution is called from here where it can be: a caller would hold its output, the largest of all,
        # until the end.
        if first is not None:
            x = first(x, width)
        x = self.maxpool(self._end_stem(x, width))
        for stage in self._stages():
            x = self._forward_stage(stage, x, width)
        return x

    def _end_stem(self, x: torch.Tensor, width: float) -> torch.Tensor:
        return self.act1(self.bn1(x, width))

    def _forward_stage(self, stage: SlimmableSequential, x: torch.Tensor, width: float) -> torch.Tensor:
        if not self.grad_checkpointing:
            return stage(x, width)
        for block in stage:
            x = checkpoint(block, x, width)
        return x

    def _forward_head(self, x: torch.Tensor, width: float, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        if pre_logits or self.num_classes <= 0:
            return x
        return self.fc(x) if isinstance(self.fc, nn.Identity) else self.fc(x, width)

    def _stages(self) -> list[SlimmableSequential]:
        return [getattr(self, f'layer{i}') for i in range(1, len(self._layers) + 1)]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps of the stem and of each stage at the active width.

        Args:
            x: Images [N, C, H, W].
            indices: The last n levels if an int, all if None, or the levels to take.
            norm: Without effect, there is no final normalisation.
            stop_early: Stop after the last level that is taken.
            output_fmt: `NCHW` only.
            intermediates_only: Return the list alone.

        Returns:
            The last feature map computed and the list of those taken, or that list alone.
        """
        if output_fmt != 'NCHW':
            raise InputError(f"output_fmt {output_fmt!r} is not 'NCHW'")
        taken, last = feature_take_indices(len(self._feature_info), indices)
        x = self._end_stem(self.conv1(x, self.width), self.width)
        intermediates = [x] if 0 in taken else []
        x = self.maxpool(x)
        for level, stage in enumerate(self._stages(), start=1):
            if stop_early and level > last:
                break
            x = self._forward_stage(stage, x, self.width)
            if level in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop modules that the feature levels `indices` do not need; return these as non-negative indices."""
        taken, last = feature_take_indices(len(self._feature_info), indices)
        pruned = self._feature_info[last + 1 :]
        for info in pruned:
            setattr(self, info['module'], SlimmableSequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if pruned:
            self.full_features = self._feature_info[last]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return taken

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters by stem and by stage or block."""
        return {'stem': r'^conv1|bn1|maxpool', 'blocks': r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, head: str | None = None) -> None:
        """Replace the head by a new one on the same device and in the same dtype and mode.

        `num_classes` is 0 for no head; timm's pooling type and the kind of head stay as they are unless given.

        Raises:
            InputError: There is no such head, or it does not go with the pooling; the network is as it was.
        """
        head = self.head if head is None else head
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(head, num_classes, pool, get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    # Extraction

    def describe(self, size: int | None = None) -> list[WidthNeeds]:
        """Parameters, multiply-adds, features and memory of each width.

        Args:
            size: Height and width of the images in pixels; the network's own unless given.
        """
        return describe(self, self.pretrained_cfg['input_size'][-1] if size is None else size)

    def skeleton(self, width: float) -> DenseResNet:
        """The network that `extract` gives, on the meta device and without tensors."""
        return DenseResNet(
            self._block.dense,
            self._layers,
            self._channels,
            width=check_width(width, self._widths),
            small_stem=self._small_stem,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            global_pool=self.global_pool.pool_type,
            output_stride=self.output_stride,
            drop_rate=self.drop_rate,
            drop_path_rate=self.drop_path_rate,
            device='meta',
        )

    def extract(self, width: float) -> DenseResNet:
        """A dense network of `width`, with ordinary layers, timm's keys and equal outputs in eval mode.

        The new network has tensors of its own, on this network's device and in its dtype and mode.

        Raises:
            InputError: The network does not hold `width`.
        """
        width = self._ready(width)
        dense = self.skeleton(width)
        shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
        tensors = dense_tensors(
            with_batch_counts(self.state_dict()), shapes, width_key(width), slice_starts(self, width)
        )
        dense.load_state_dict(tensors, assign=True)
        if cfg := getattr(self, 'pretrained_cfg', None):
            # Preprocessing stays, the source of the weights does not.
            kept = {key: value for key, value in cfg.items() if key not in _SOURCE}
            dense.pretrained_cfg = {**kept, 'classifier': 'fc'}
        return dense.train(self.training)


class SlimmableFeatureGetter(FeatureGetterNet):
    """timm's wrapper for `features_only=True`, switchable like the network inside.

    Args:
        model: The network.
        pad_channels: Pad the maps of narrower widths with zeros to the channels of the widest, for decoders that are
            built for one number of channels. A convolution of such a map equals one by the leading slice of its weight.
        kwargs: Further ones of timm's wrapper.
    """

    model: SlimmableResNet
    feature_info: FeatureInfo

    def __init__(self, model: SlimmableResNet, *, pad_channels: bool = False, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.pad_channels = pad_channels
        self._set_channels()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[N, C, H, W] -> a map of each level, [N, channels, H / reduction, W / reduction]."""
        maps = super().forward(x)
        if not self.pad_channels:
            return maps
        channels = self.feature_info.channels()
        return [F.pad(x, (0, 0, 0, 0, 0, count - x.shape[1])) for x, count in zip(maps, channels, strict=True)]

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that the network holds, in descending order."""
        return self.model.widths

    @property
    def width(self) -> float:
        """The active width."""
        return self.model.width

    def set_width(self, width: float) -> ExitStack:
        """Switch the active width; `feature_info` follows, unless padded. See `SlimmableResNet.set_width`."""
        back = ExitStack()
        back.callback(self.set_width, self.width)
        self.model.set_width(width)
        self._set_channels()
        return back

    def _set_channels(self) -> None:
        width = self.widths[0] if self.pad_channels else self.width
        for info, full in zip(self.feature_info.info, self.model._feature_info, strict=True):
            info['num_chs'] = scale_channels(full['num_chs'], width)
