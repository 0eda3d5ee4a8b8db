"""The feature pyramid over maps of any width."""

from collections.abc import Sequence
from typing import Any

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS

from slimclr_hub.detection.layers import InputSlicedConv2d
from slimclr_hub.errors import InputError

# At the root, since mmcv builds layers, and looks there.
ROOT_MODELS.register_module(module=InputSlicedConv2d)


@MODELS.register_module()
class SlimmableFPN(FPN):
    """MMDetection's `FPN` of which a narrow width uses the leading input channels of the lateral convolutions.

    Nothing else depends on the width, names of tensors are those of `FPN`. This equals filling up the maps of a narrow
    width with zeros, as the reference code of Zhao et al. does.

    Args:
        in_channels: Channels of the backbone's maps, at the largest width that it holds or at 1.0.
        out_channels: Channels of the pyramid.
        num_outs: Levels of the pyramid.
        kwargs: As in `FPN`, but for `norm_cfg` and `conv_cfg`.

    Raises:
        InputError: A normalisation is asked for, whose statistics would be those of all widths mixed, or another kind
            of convolution, which does not slice.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int, **kwargs: Any) -> None:
        if kwargs.get('norm_cfg') is not None:
            raise InputError(f'norm_cfg {kwargs["norm_cfg"]}: widths share the pyramid, so it has no normalisation')
        if kwargs.get('conv_cfg') is not None:
            raise InputError(f'conv_cfg {kwargs["conv_cfg"]}: the convolutions of SlimmableFPN are its own')
        kwargs['conv_cfg'] = {'type': 'InputSlicedConv2d'}
        super().__init__(list(in_channels), out_channels, num_outs, **kwargs)
