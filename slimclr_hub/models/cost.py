"""Parameters and multiply-adds of each width."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from slimclr_hub.models.slimmable_resnet import SlimmableResNet
from slimclr_hub.weights.published import WidthFacts as WidthFacts


def cost(model: SlimmableResNet, width: float, size: int) -> tuple[int, int]:
    """Parameters of one width, and its convolutions' and linear layers' multiply-adds on an image of `size` pixels."""
    dense = model.extract(width).to('meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.empty(1, model.in_chans, size, size, device='meta'))
    return sum(parameter.numel() for parameter in dense.parameters()), counter.get_total_flops() // 2


def width_facts(model: SlimmableResNet, size: int) -> list[WidthFacts]:
    """Parameters and multiply-adds of each width, for images of `size` pixels."""
    return [WidthFacts(width, *cost(model, width, size)) for width in model.widths]
