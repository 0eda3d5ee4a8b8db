"""Networks as tests want them."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from slimclr_hub.methods import METHODS, Teacher
from slimclr_hub.methods.registry import training_of
from slimclr_hub.models import SlimmableResNet


def randomise_batchnorm(model: nn.Module) -> None:
    """Give every batch normalisation values of its own, so that a mix-up of widths or layers shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            module.num_batches_tracked.fill_(9)


def forward_apart(
    model: SlimmableResNet, x: torch.Tensor, widths: Sequence[float] | None = None
) -> dict[float, torch.Tensor]:
    """`forward_widths` without sharing: one forward after the other."""
    return {width: model.forward_at(x, width) for width in (model.widths if widths is None else widths)}


def small_teacher(in_chans: int = 3) -> Teacher:
    """A teacher with random weights and statistics, of 16 features; it draws from torch's generator."""
    network = timm.create_model('slimclr_resnet20', num_classes=0, widths=(0.25,), in_chans=in_chans)
    assert isinstance(network, SlimmableResNet)
    randomise_batchnorm(network)
    return Teacher(network.extract(0.25), 16)


def method_of(name: str, backbone: SlimmableResNet, **options: Any) -> Any:
    """A registered method around a network, with a small teacher if it takes one."""
    teacher = [small_teacher(backbone.in_chans)] if training_of(name).teacher else []
    return METHODS[name](backbone, *teacher, **options)
