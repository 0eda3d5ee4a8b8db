"""The slimmable ResNet as a backbone of MMDetection."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.detection.pretrained import load_backbone
from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.models.slimmable_resnet import SlimmableResNet as Network
from slimclr_hub.models.slimmable_resnet import WidthSwitch
from slimclr_hub.weights.layouts import ARCHITECTURES


@MODELS.register_module()
class SlimmableResNet(BaseModule):
    """Feature maps of the active width of a slimmable ResNet, as MMDetection's `ResNet` gives them of its one width.

    The network is `self.network`, so that a tensor is called `backbone.network.layer1.0.bn1.w050.weight`.

    Args:
        name: Name in timm's registry, such as `slimclr_resnet50`.
        widths: The widths to hold; a single one is the individual network.
        weights: What to start from: a tag of the zoo, `hf-hub:USER/NAME`, a folder of the Hub or of a pre-training run,
            a safetensors file, or one of the authors' checkpoints. Random unless given.
        out_indices: Stages to give, counted from 0.
        overlap: Whether sub-networks share channels with each other; see `models.SlimmableResNet`.
        frozen_stages: The stem and as many stages keep their weights and statistics; -1 for none, as in the paper.
        norm_eval: Whether normalisation keeps its statistics in training; not so in the paper.
        with_cp: Whether to recompute each block in the backward instead of keeping its activations.
        init_cfg: Has to be none; `weights` is strict.

    Raises:
        InputError: There is no such network, stage or width.
    """

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
        if name not in ARCHITECTURES.values():
            raise InputError(f'name {name!r} is none of {", ".join(ARCHITECTURES.values())}; a tag goes into `weights`')
        network = timm.create_model(name, num_classes=0, widths=tuple(widths), overlap=overlap)
        assert isinstance(network, Network)
        self.network = network
        self.network.set_grad_checkpointing(with_cp)
        stages = len(network.feature_info) - 1
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

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that the network holds, in descending order."""
        return self.network.widths

    @property
    def width(self) -> float:
        """The active width."""
        return self.network.width

    def set_width(self, width: float) -> WidthSwitch:
        """Switch the active width; as a context manager it switches back. See `models.SlimmableResNet.set_width`."""
        return self.network.set_width(width)

    def init_weights(self) -> None:
        """Load `weights`, strictly, and log what was loaded.

        Raises:
            InputError: They cannot be had or do not fit; the message names what.
        """
        if self.weights is None:
            self.network.init_weights()
            print_log(f'backbone: random weights at widths {", ".join(map(str, self.widths))}', 'current')
        else:
            print_log(f'backbone: {load_backbone(self.network, self.weights)}', 'current')
        self._is_init = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, C, H, W] -> for each of `out_indices` a map [N, channels * width, H / stride, W / stride]."""
        levels = [index + 1 for index in self.out_indices]  # level 0 is the stem
        maps = self.network.forward_intermediates(x, indices=levels, stop_early=True, intermediates_only=True)
        assert isinstance(maps, list)
        return tuple(maps)

    def train(self, mode: bool = True) -> 'SlimmableResNet':
        """Training mode, but for what is frozen or keeps its statistics."""
        super().train(mode)
        if mode:
            for module in self._frozen():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _frozen(self) -> list[torch.nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages: list[Any] = [getattr(self.network, f'layer{i}') for i in range(1, self.frozen_stages + 1)]
        return [self.network.conv1, self.network.bn1, *stages]
