"""Slimmable heads that pre-training puts on the backbone and throws away afterwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slimclr_hub.models.layers import SlimmableLinear
from slimclr_hub.models.widths import scale_channels
from slimclr_hub.weights.slices import dense_tensors


class SlimmableMLP(nn.Module):
    """MoCo v2's head: linear, ReLU, linear, without normalisation; input and hidden layer have the width.

    Args:
        in_features: Features of the backbone at width 1.0.
        hidden_features: Hidden features at width 1.0.
        out_features: Dimension of the embedding, the same at every width.
        max_width: Largest width that will be asked for.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int, max_width: float = 1.0, **factory: Any
    ) -> None:
        super().__init__()
        self.fc1 = SlimmableLinear(in_features, hidden_features, max_width=max_width, **factory)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = SlimmableLinear(hidden_features, out_features, max_width=max_width, slim_out=False, **factory)

    def forward(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """[B, in * width] -> [B, out]."""
        return self.fc2(self.act(self.fc1(x, width)), width)

    def extract(self, width: float) -> nn.Sequential:
        """The dense head of one width, with tensors of its own and the names `fc1` and `fc2`."""
        in_features = scale_channels(self.fc1.full_in_features, width)
        hidden_features = scale_channels(self.fc1.full_out_features, width)
        dense = nn.Sequential()
        dense.add_module('fc1', nn.Linear(in_features, hidden_features, device='meta'))
        dense.add_module('act', nn.ReLU(inplace=True))
        dense.add_module('fc2', nn.Linear(hidden_features, self.fc2.out_features, device='meta'))
        shapes: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in dense.state_dict().items()}
        dense.load_state_dict(dense_tensors(self.state_dict(), shapes, key=''), assign=True)
        return dense
