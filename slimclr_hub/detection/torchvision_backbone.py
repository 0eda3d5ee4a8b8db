"""A slimmable ResNet as the backbone of torchvision's detectors: build, train at all widths, extract one width.

Slimmable Networks for Contrastive Self-supervised Learning, section 4.3: Mask R-CNN (He et al. 2017) with feature
pyramids (Lin et al. 2017) whose backbone is slimmable; pyramid and heads are shared by all widths.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from slimclr_hub.detection.pretrained import create_backbone, load_backbone
from slimclr_hub.detection.widths import InputSlicedConv2d, WidthMixin, run_widths, unwrapped
from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.weights.slices import leading

_logger = logging.getLogger(__name__)


class SlimmableBackboneWithFPN(WidthMixin, nn.Module):
    """Backbone of torchvision's detectors: feature maps of the active width under a pyramid that all widths share.

    Keys are those of torchvision's `BackboneWithFPN`: `body.layer1.0.conv1.weight`, `fpn.inner_blocks.0.0.weight`.

    Args:
        network: Network without a head (`num_classes=0`); each of its stages is a level.
        out_channels: Channels of every level of the pyramid.
    """

    switched = 'body'

    def __init__(self, network: SlimmableResNet, out_channels: int = 256) -> None:
        super().__init__()
        self.body = network
        with network.set_width(network.widths[0]):
            info = network.feature_info[1:]  # the first is the stem's
        self.strides = tuple(level['reduction'] for level in info)
        self.fpn = FeaturePyramidNetwork([level['num_chs'] for level in info], out_channels, LastLevelMaxPool())
        for block in self.fpn.inner_blocks:
            plain = block[0]
            # On meta, since torchvision has drawn the values already.
            block[0] = InputSlicedConv2d(plain.in_channels, out_channels, 1, device='meta')
            block[0].weight, block[0].bias = plain.weight, plain.bias
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, C, H, W] -> '0', '1', ... and 'pool', each with a map [N, out_channels, H / stride, W / stride]."""
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
    """Create torchvision's Mask R-CNN on a slimmable backbone; `model.backbone.set_width(0.5)` switches the width.

    Args:
        weights: Initial weights of the backbone, as in `load_backbone`; None for random ones.
        widths: Widths to hold.
        num_classes: Number of classes, the background included.
        name: Name of the slimmable network in timm's registry.
        kwargs: Arguments of torchvision's `MaskRCNN`. Mean and standard deviation of images, anchors and pooled levels
            are those of the network unless given.

    Raises:
        InputError: There is no such network, or its weights do not load.
    """
    network = create_backbone(name, widths)
    if weights is not None:
        _logger.info('%s', load_backbone(network, weights))
    backbone = SlimmableBackboneWithFPN(network)
    levels = [str(i) for i in range(len(backbone.strides))]
    # torchvision's anchors have 32 pixels at the level of stride 4, and double with each level.
    sizes = tuple((8 * stride,) for stride in (*backbone.strides, 2 * backbone.strides[-1]))
    own = {
        'image_mean': network.pretrained_cfg['mean'],
        'image_std': network.pretrained_cfg['std'],
        'rpn_anchor_generator': AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
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
    """Run forward and backward at every width on one batch; gradients add up for one step of the optimizer.

    Each width samples its own regions. See `run_widths` for memory and DistributedDataParallel, which needs
    `find_unused_parameters=True`.

    Args:
        model: Detector in training mode, itself or in DistributedDataParallel.
        images: Images [C, H, W].
        targets: Targets of torchvision's detectors for each image: `boxes`, `labels`, `masks`.
        widths: Widths to train; all unless given.
        scale: Factor of every loss, `1 / len(widths)` for the mean over widths instead of the sum.
        backward: Called with the loss of each width, such as `accelerator.backward`.

    Returns:
        Width -> torchvision's losses by name, detached and without `scale`; the narrowest first.

    Raises:
        InputError: The model is in evaluation mode or does not hold a width.
    """
    if not model.training:
        raise InputError('the model is in evaluation mode and returns no losses; call model.train() first')
    backbone = slimmable_backbone(model)

    def run(_: bool) -> dict[str, torch.Tensor]:
        losses = model(images, targets)
        backward(scale * torch.stack([*losses.values()]).sum())
        return {name: loss.detach() for name, loss in losses.items()}

    return run_widths(model, backbone.set_width, backbone.widths if widths is None else widths, run)


def extract_width(model: nn.Module, width: float) -> MaskRCNN:
    """Extract the detector of one width: ordinary layers, torchvision's keys, its own tensors and equal outputs.

    At width 1.0 a ResNet-50's state dict is that of `torchvision.models.detection.maskrcnn_resnet50_fpn` with
    `norm_layer=nn.BatchNorm2d`.

    Raises:
        InputError: The model is no detector of `slimmable_mask_rcnn`, itself or in DistributedDataParallel, or does not
            hold `width`.
    """
    backbone = slimmable_backbone(model)
    dense = backbone.body.extract(width)
    channels = {level['module']: level['num_chs'] for level in dense.feature_info[1:]}
    names = {module: str(i) for i, module in enumerate(channels)}
    plain = BackboneWithFPN(dense, names, [*channels.values()], backbone.out_channels)
    shapes = {name: tensor.shape for name, tensor in plain.fpn.state_dict().items()}
    tensors = {name: leading(tensor, shapes[name]) for name, tensor in backbone.fpn.state_dict().items()}
    plain.fpn.load_state_dict(tensors, assign=True)
    # The copy takes this backbone for its own.
    return copy.deepcopy(unwrapped(model), {id(backbone): plain.train(backbone.training)})


def slimmable_backbone(model: nn.Module) -> SlimmableBackboneWithFPN:
    """Return the backbone of a detector, itself or in DistributedDataParallel; an InputError if it is not slimmable."""
    backbone = getattr(unwrapped(model), 'backbone', None)
    if not isinstance(backbone, SlimmableBackboneWithFPN):
        raise InputError(f'the backbone of the model is a {type(backbone).__name__}, not a SlimmableBackboneWithFPN')
    return backbone
