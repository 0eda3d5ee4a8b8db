"""Parameters, multiply-adds and memory of each width."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.layers import get_device_dtype
from torch.utils.flop_counter import FlopCounterMode

from slimclr_hub.weights.published import WidthFacts as WidthFacts

if TYPE_CHECKING:
    from slimclr_hub.models.dense import DenseResNet
    from slimclr_hub.models.slimmable_resnet import SlimmableResNet


@dataclass(frozen=True)
class WidthNeeds(WidthFacts):
    """What one width needs: parameters and multiply-adds as in `WidthFacts`, and memory.

    Args:
        features: Length of the features before the head.
        mib: Of its tensors, in the network's dtype.
    """

    features: int
    mib: float

    @property
    def cells(self) -> dict[str, str]:
        """Title -> text, for a row of a table."""
        return {**super().cells, 'features': str(self.features), 'MiB': f'{self.mib:.2f}'}


def cost(model: 'SlimmableResNet', width: float, size: int) -> tuple[int, int]:
    """Parameters of one width, and its convolutions' and linear layers' multiply-adds on an image of `size` pixels."""
    return _cost(model.skeleton(width), model.in_chans, size)


def _cost(dense: 'DenseResNet', in_chans: int, size: int) -> tuple[int, int]:
    dense.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.empty(1, in_chans, size, size, device='meta'))
    return sum(parameter.numel() for parameter in dense.parameters()), counter.get_total_flops() // 2


def width_facts(model: 'SlimmableResNet', size: int) -> list[WidthFacts]:
    """Parameters and multiply-adds of each width, for images of `size` pixels."""
    return [WidthFacts(width, *cost(model, width, size)) for width in model.widths]


def describe(model: 'SlimmableResNet', size: int) -> list[WidthNeeds]:
    """What each width needs, for images of `size` pixels."""
    dtype = get_device_dtype(model)['dtype']
    found = []
    for width in model.widths:
        dense = model.skeleton(width)
        tensors = [t.to(dtype) if t.is_floating_point() else t for t in dense.state_dict().values()]
        mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
        found.append(WidthNeeds(width, *_cost(dense, model.in_chans, size), features=dense.head_hidden_size, mib=mib))
    return found
