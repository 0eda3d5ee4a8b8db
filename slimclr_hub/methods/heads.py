"""Slimmable heads that pre-training puts on the backbone and throws away afterwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slimclr_hub.models.layers import SlimmableLinear, SwitchableBatchNorm1d
from slimclr_hub.models.widths import scale_channels, width_key
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
        return _filled(dense, self, width)


class SlimmableProjector(nn.Module):
    """MoCo v3's projector and predictor: linear, BN, ReLU, linear, and for the projector a last BN without affine.

    Linear layers have no bias. The hidden layer has the width; the input has it where it is the backbone's.

    Args:
        in_features: Input features at width 1.0.
        hidden_features: Hidden features at width 1.0.
        out_features: Dimension of the embedding, the same at every width.
        widths: The widths to hold.
        slim_in: Whether the input has the width.
        last_norm: Whether a normalisation without affine follows.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        widths: Sequence[float],
        *,
        slim_in: bool = True,
        last_norm: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        full = max(widths)
        self.fc1 = SlimmableLinear(in_features, hidden_features, max_width=full, slim_in=slim_in, bias=False, **factory)
        self.bn1 = SwitchableBatchNorm1d(hidden_features, widths, **factory)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = SlimmableLinear(hidden_features, out_features, max_width=full, slim_out=False, bias=False, **factory)
        self.bn2 = (
            SwitchableBatchNorm1d(out_features, widths, slim=False, affine=False, **factory) if last_norm else None
        )

    def forward(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """[B, in] -> [B, out]."""
        x = self.fc2(self.act(self.bn1(self.fc1(x, width), width)), width)
        return x if self.bn2 is None else self.bn2(x, width)

    def extract(self, width: float) -> nn.Sequential:
        """The dense head of one width, with tensors of its own and the same names."""
        dense = nn.Sequential()
        dense.add_module(
            'fc1',
            nn.Linear(
                scale_channels(self.fc1.full_in_features, width) if self.fc1.slim_in else self.fc1.in_features,
                scale_channels(self.fc1.full_out_features, width),
                bias=False,
                device='meta',
            ),
        )
        dense.add_module('bn1', nn.BatchNorm1d(scale_channels(self.fc1.full_out_features, width), device='meta'))
        dense.add_module('act', nn.ReLU(inplace=True))
        dense.add_module(
            'fc2',
            nn.Linear(
                scale_channels(self.fc2.full_in_features, width), self.fc2.out_features, bias=False, device='meta'
            ),
        )
        if self.bn2 is not None:
            dense.add_module('bn2', nn.BatchNorm1d(self.fc2.out_features, affine=False, device='meta'))
        return _filled(dense, self, width)


def _filled(dense: nn.Sequential, head: nn.Module, width: float) -> nn.Sequential:
    shapes: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    dense.load_state_dict(dense_tensors(head.state_dict(), shapes, width_key(width)), assign=True)
    return dense
