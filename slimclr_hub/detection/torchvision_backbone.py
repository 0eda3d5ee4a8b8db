"""A slimmable ResNet as the backbone of torchvision's detectors: built, trained at all widths, and taken apart.

Slimmable Networks for Contrastive Self-supervised Learning, section 4.3: Mask R-CNN (He et al. 2017) with feature
pyramids (Lin et al. 2017) whose backbone is slimmable; pyramid and heads are shared by all widths.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from slimclr_hub.detection.layers import InputSlicedConv2d
from slimclr_hub.detection.pretrained import load_backbone
from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.slimmable_resnet import WidthSwitch
from slimclr_hub.weights.layouts import ARCHITECTURES
from slimclr_hub.weights.slices import leading

_logger = logging.getLogger(__name__)

# torchvision's anchors begin with 32 pixels where a feature map has a pixel for every 4, and double with each level.
_ANCHOR_OVER_STRIDE = 8
_RATIOS = (0.5, 1.0, 2.0)


class SlimmableBackboneWithFPN(nn.Module):
    """What torchvision's detectors take as a backbone: feature maps of the active width, and a pyramid of any width.

    Keys are those of torchvision's `BackboneWithFPN`: `body.layer1.0.conv1.weight`, `fpn.inner_blocks.0.0.weight`.

    Args:
        network: The network, without a head (`num_classes=0`). Each of its stages gives a level.
        out_channels: Channels of every level of the pyramid.
    """

    def __init__(self, network: SlimmableResNet, out_channels: int = 256) -> None:
        super().__init__()
        self.body = network
        with network.set_width(network.widths[0]):
            info = network.feature_info[1:]  # the first is that of the stem
        self.strides = tuple(level['reduction'] for level in info)
        self.fpn = FeaturePyramidNetwork([level['num_chs'] for level in info], out_channels, LastLevelMaxPool())
        for block in self.fpn.inner_blocks:
            block[0] = _sliced(block[0])
        self.out_channels = out_channels

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that the network holds, in descending order."""
        return self.body.widths

    @property
    def width(self) -> float:
        """The active width."""
        return self.body.width

    def set_width(self, width: float) -> WidthSwitch:
        """Switch the active width; see `SlimmableResNet.set_width`."""
        return self.body.set_width(width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, C, H, W] -> level -> [N, out_channels, H / stride, W / stride], under '0', '1', ... and 'pool'."""
        levels = [*range(1, len(self.strides) + 1)]
        maps = self.body.forward_intermediates(x, levels, intermediates_only=True)
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps)))


def slimmable_mask_rcnn(
    weights: str | None,
    widths: Sequence[float] = DEFAULT_WIDTHS,
    num_classes: int = 91,
    name: str = 'slimclr_resnet50',
    **kwargs: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on a slimmable backbone; `model.backbone.set_width(0.5)` switches the width.

    Args:
        weights: Where the backbone starts from, as `load_backbone` takes it; none for random weights.
        widths: The widths to hold.
        num_classes: Classes, the background among them.
        name: Name of the slimmable network in timm's registry.
        kwargs: Arguments of torchvision's `MaskRCNN`. Mean and standard deviation of images, anchors and pooled levels
            are those of the network unless given.

    Raises:
        InputError: There is no such network, or its weights do not load.
    """
    if name not in ARCHITECTURES.values():
        raise InputError(f'{name!r} is none of the slimmable networks here, {", ".join(ARCHITECTURES.values())}')
    network = timm.create_model(name, widths=widths, num_classes=0)
    assert isinstance(network, SlimmableResNet)
    if weights is not None:
        _logger.info('%s', load_backbone(network, weights))
    backbone = SlimmableBackboneWithFPN(network)
    strides = (*backbone.strides, 2 * backbone.strides[-1])
    levels = [str(i) for i in range(len(backbone.strides))]
    own = {
        'image_mean': network.pretrained_cfg['mean'],
        'image_std': network.pretrained_cfg['std'],
        'rpn_anchor_generator': AnchorGenerator(
            tuple((_ANCHOR_OVER_STRIDE * stride,) for stride in strides), (_RATIOS,) * len(strides)
        ),
        'box_roi_pool': MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        'mask_roi_pool': MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
    }
    return MaskRCNN(backbone, num_classes, **{**own, **kwargs})


def backward_widths(
    model: nn.Module,
    images: Sequence[torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    widths: Sequence[float] | None = None,
    scale: float = 1.0,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> dict[float, dict[str, torch.Tensor]]:
    """Forward and backward at every width on one batch; gradients add up, and one step of the optimizer follows.

    Each width samples regions of its own. One width at a time is in memory. In DistributedDataParallel the gradients
    of all widths are exchanged once, with the last; it has to be told `find_unused_parameters=True`, since that one
    does not use the normalisations of the others.

    Args:
        model: In training mode, itself or in DistributedDataParallel; its `backbone` is slimmable.
        images: Images [C, H, W].
        targets: Of each image, as torchvision's detectors take them: `boxes`, `labels`, `masks`.
        widths: The widths to train; all unless given.
        scale: Factor of every loss, `1 / len(widths)` for the mean over widths instead of the sum.
        backward: What is called with the loss of a width, such as `accelerator.backward`.

    Returns:
        Width -> torchvision's losses by name, detached and without `scale`; the narrowest first.

    Raises:
        InputError: The model is in evaluation mode or does not hold a width.
    """
    if not model.training:
        raise InputError('the model is in evaluation mode, in which it gives no losses; call model.train() first')
    backbone = slimmable_backbone(model)
    ordered = sorted(backbone.widths if widths is None else widths)
    losses = {}
    for width in ordered:
        alone = nullcontext if width == ordered[-1] else getattr(model, 'no_sync', nullcontext)
        with alone(), backbone.set_width(width):
            found = model(images, targets)
            backward(scale * torch.stack([*found.values()]).sum())
        losses[width] = {name: loss.detach() for name, loss in found.items()}
    return losses


def extract_width(model: nn.Module, width: float) -> MaskRCNN:
    """The detector of one width: ordinary layers, torchvision's keys, tensors of its own and equal outputs.

    At width 1.0 a ResNet-50's state dict is that of `torchvision.models.detection.maskrcnn_resnet50_fpn` with
    `norm_layer=nn.BatchNorm2d`.

    Args:
        model: What `slimmable_mask_rcnn` gave, itself or in DistributedDataParallel.
        width: One of its widths.

    Raises:
        InputError: It does not hold `width`.
    """
    backbone = slimmable_backbone(model)
    dense = backbone.body.extract(width)
    info = dense.feature_info[1:]
    plain = BackboneWithFPN(
        dense,
        {level['module']: str(i) for i, level in enumerate(info)},
        [level['num_chs'] for level in info],
        backbone.out_channels,
    )
    tensors = backbone.fpn.state_dict()
    shapes = {name: tensor.shape for name, tensor in plain.fpn.state_dict().items()}
    plain.fpn.load_state_dict({name: leading(tensors[name], shape) for name, shape in shapes.items()}, assign=True)
    # The copy finds its backbone made already.
    return copy.deepcopy(unwrapped(model), {id(backbone): plain.train(backbone.training)})


def slimmable_backbone(model: nn.Module) -> SlimmableBackboneWithFPN:
    """The backbone of a detector, itself or in DistributedDataParallel.

    Raises:
        InputError: It is not slimmable.
    """
    backbone = getattr(unwrapped(model), 'backbone', None)
    if not isinstance(backbone, SlimmableBackboneWithFPN):
        raise InputError(f'the backbone of the model is a {type(backbone).__name__}, not a SlimmableBackboneWithFPN')
    return backbone


def unwrapped(model: nn.Module) -> Any:
    """A model out of DistributedDataParallel."""
    return getattr(model, 'module', model)


def _sliced(conv: nn.Conv2d) -> InputSlicedConv2d:
    # On meta, as torchvision has drawn the values.
    sliced = InputSlicedConv2d(conv.in_channels, conv.out_channels, 1, device='meta')
    sliced.weight, sliced.bias = conv.weight, conv.bias
    return sliced
