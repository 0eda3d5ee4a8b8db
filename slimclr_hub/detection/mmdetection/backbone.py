"""The slimmable ResNet as a backbone of MMDetection, and the feature pyramid over its maps."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.detection.pretrained import create_backbone, load_backbone
from slimclr_hub.detection.widths import InputSlicedConv2d, WidthMixin
from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS

# At the root, since mmcv builds layers, and looks there.
ROOT_MODELS.register_module(module=InputSlicedConv2d)


@MODELS.register_module()
class SlimmableResNet(WidthMixin, BaseModule):
    """Backbone that returns the feature maps of the active width, as MMDetection's `ResNet` does of its one width.

    The network is `self.network`, so that a tensor is called `backbone.network.layer1.0.bn1.w050.weight`.

    Args:
        name: Name in timm's registry, such as `slimclr_resnet50`.
        widths: Widths to hold; a single one is the individual network.
        weights: Initial weights: a tag of the zoo, `hf-hub:USER/NAME`, a folder of the Hub or of a pre-training run, a
            safetensors file, or one of the authors' checkpoints. Random unless given.
        out_indices: Stages to return, counted from 0.
        overlap: False for sub-networks that share no channels; see `models.SlimmableResNet`.
        frozen_stages: Number of stages that keep their weights and statistics, besides the stem; -1 for none, as in the
            paper.
        norm_eval: Keep the statistics of normalisation in training; not so in the paper.
        with_cp: Recompute each block in the backward instead of keeping its activations.
        init_cfg: Must be None; `weights` is strict.

    Raises:
        InputError: There is no such network, stage or width.
    """

    switched = 'network'

    def __init__(
        self,
        name: str = 'slimclr_resnet50',
        widths: Sequence[float] = DEFAULT_WIDTHS,
        weights: str | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        overlap: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: None = None,
    ) -> None:
        if init_cfg is not None:
            raise InputError(f'init_cfg {init_cfg} loads what fits and leaves the rest; name a source as `weights`')
        super().__init__()
        self.network = create_backbone(name, widths, overlap=overlap)
        self.network.set_grad_checkpointing(with_cp)
        stages = len(self.network.feature_info) - 1
        for index in out_indices:
            if not 0 <= index < stages:
                raise InputError(f'out_indices {index} is not from 0 to {stages - 1}; {name} has {stages} stages')
        if not -1 <= frozen_stages <= stages:
            raise InputError(f'frozen_stages {frozen_stages} is not from -1 to {stages}, the stages of {name}')
        self.weights = weights
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        for module in self._frozen():
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Load `weights` strictly and log what was loaded.

        Raises:
            InputError: They cannot be found or do not fit; the message names the tensor.
        """
        if self.weights is None:
            self.network.init_weights()
            report = f'random weights at widths {", ".join(map(str, self.widths))}'
        else:
            report = load_backbone(self.network, self.weights)
        print_log(f'backbone: {report}', 'current')
        self._is_init = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, C, H, W] -> one map [N, channels * width, H / stride, W / stride] for each of `out_indices`."""
        levels = [index + 1 for index in self.out_indices]  # level 0 is the stem
        maps = self.network.forward_intermediates(x, indices=levels, stop_early=True, intermediates_only=True)
        assert isinstance(maps, list)
        return tuple(maps)

    def train(self, mode: bool = True) -> 'SlimmableResNet':
        """Set training mode, except for frozen modules and, with `norm_eval`, normalisations."""
        super().train(mode)
        norms = [module for module in self.modules() if self.norm_eval and isinstance(module, _BatchNorm)]
        for module in self._frozen() + norms:
            module.eval()
        return self

    def _frozen(self) -> list[torch.nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages: list[Any] = [getattr(self.network, f'layer{i}') for i in range(1, self.frozen_stages + 1)]
        return [self.network.conv1, self.network.bn1, *stages]


@MODELS.register_module()
class SlimmableFPN(FPN):
    """MMDetection's `FPN` whose lateral convolutions use their leading input channels at a narrow width.

    Nothing else depends on the width, and tensors have the names of `FPN`. `in_channels` are those of the backbone's
    maps at the largest width that it holds, or at 1.0.

    Raises:
        InputError: `norm_cfg` asks for a normalisation, which would mix the statistics of all widths, or `conv_cfg` for
            a convolution, which would not slice.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int, **kwargs: Any) -> None:
        if kwargs.get('norm_cfg') is not None:
            raise InputError(f'norm_cfg {kwargs["norm_cfg"]}: widths share the pyramid, so it has no normalisation')
        if (conv_cfg := kwargs.pop('conv_cfg', None)) is not None:
            raise InputError(f'conv_cfg {conv_cfg}: the convolutions of SlimmableFPN are its own')
        super().__init__(list(in_channels), out_channels, num_outs, conv_cfg={'type': 'InputSlicedConv2d'}, **kwargs)
