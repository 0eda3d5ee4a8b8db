"""Parameters and multiply-adds of each width."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from slimclr_hub.models.slimmable_resnet import SlimmableResNet

_ACCURACIES = {'start': 'k-NN at start', 'end': 'k-NN', 'linear': 'linear', 'top1': 'top-1'}


def cost(model: SlimmableResNet, width: float, size: int) -> tuple[int, int]:
    """Parameters and multiply-adds of one width.

    Args:
        model: The network.
        width: One of its widths.
        size: Height and width of the image in pixels.

    Returns:
        Parameters of the dense network of that width, and its multiply-adds (convolutions and linear layers) per image.
    """
    dense = model.extract(width).to('meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.empty(1, model.in_chans, size, size, device='meta'))
    return sum(parameter.numel() for parameter in dense.parameters()), counter.get_total_flops() // 2


@dataclass(frozen=True)
class WidthFacts:
    """What a card tells of one width.

    Args:
        width: The width.
        parameters: Parameters of the backbone at that width.
        multiply_adds: Multiply-adds for one image.
        start: k-NN accuracy in percent before training, if measured.
        end: k-NN accuracy in percent after training, if measured.
        linear: Accuracy in percent of a linear classifier on its frozen features after training, if measured.
        top1: Accuracy in percent of its own classifier after training, if it has one and it was measured.
    """

    width: float
    parameters: int
    multiply_adds: int
    start: float | None = None
    end: float | None = None
    linear: float | None = None
    top1: float | None = None

    @property
    def cells(self) -> dict[str, str]:
        """Width, parameters, multiply-adds and the accuracies that were measured, as text under their titles."""
        measured = {title: getattr(self, name) for name, title in _ACCURACIES.items()}
        return {
            'width': f'{self.width:g}',
            'parameters': human(self.parameters),
            'multiply-adds': human(self.multiply_adds),
            **{title: f'{value:.1f}' for title, value in measured.items() if value is not None},
        }


def width_facts(model: SlimmableResNet, size: int) -> list[WidthFacts]:
    """What each width of a network costs, for images of `size` pixels."""
    return [WidthFacts(width, *cost(model, width, size)) for width in model.widths]


def human(number: int) -> str:
    """A count with three digits and its unit: 25557032 -> `25.6 M`."""
    for unit, factor in ('G', 1e9), ('M', 1e6), ('k', 1e3):
        if number >= 0.9995 * factor:
            return f'{number / factor:#.3g} {unit}'.replace('. ', ' ')
    return str(number)
