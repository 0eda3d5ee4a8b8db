"""Slimmable heads that pre-training puts on the backbone and throws away afterwards."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.layers import SlimmableLinear, SwitchableBatchNorm1d, slice_starts
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import disjoint_widths, scale_channels, width_key
from slimclr_hub.weights.slices import dense_tensors


def embed(
    backbone: SlimmableResNet, head: nn.Module, view: torch.Tensor, widths: Sequence[float]
) -> dict[float, torch.Tensor]:
    """Embed a view at each width: [B, C, H, W] -> [B, D], of unit length."""
    with sliced_once([backbone, head], widths):
        features = backbone.forward_widths(view, widths)
        return {w: F.normalize(head(features[w], w), dim=1) for w in widths}


class SlimmableMLP(nn.Module):
    """MoCo v2's head: linear, ReLU, linear, without normalisation; input and hidden layer have the width.

    Args:
        in_features: Features of the backbone at width 1.0.
        hidden_features: Hidden features at width 1.0.
        out_features: Dimension of the embedding, the same at every width.
        max_width: Largest width that will be asked for, if `widths` are not given.
        widths: The widths to hold; needed where they do not overlap.
        overlap: False for sub-networks that share features with the largest alone, as in the backbone.

    Raises:
        InputError: The widths do not fit beside each other, or are needed.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        max_width: float = 1.0,
        *,
        widths: Sequence[float] = (),
        overlap: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        slim: dict[str, Any] = {
            'max_width': max(widths, default=max_width),
            'disjoint': disjoint_widths(widths, overlap),
            **factory,
        }
        self.fc1 = SlimmableLinear(in_features, hidden_features, **slim)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = SlimmableLinear(hidden_features, out_features, slim_out=False, **slim)

    def forward(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """[B, in * width] -> [B, out]."""
        return self.fc2(self.act(self.fc1(x, width)), width)

    def extract(self, width: float) -> nn.Sequential:
        """The dense head of one width, with tensors of its own and the names `fc1` and `fc2`."""
        in_features = scale_channels(self.fc1.full_in, width)
        hidden_features = scale_channels(self.fc1.full_out, width)
        dense = nn.Sequential()
        dense.add_module('fc1', nn.Linear(in_features, hidden_features, device='meta'))
        dense.add_module('act', nn.ReLU(inplace=True))
        dense.add_module('fc2', nn.Linear(hidden_features, self.fc2.out_features, device='meta'))
        return _filled(dense, self, width)


class SlimmableLinearHead(nn.Module):
    """MoCo v1's head, one linear layer (He et al. 2020, https://arxiv.org/abs/1911.05722), whose input has the width.

    Args:
        in_features: Features of the backbone at width 1.0.
        out_features: Dimension of the embedding, the same at every width.
        widths: The widths to hold.
        overlap: False for sub-networks that share features with the largest alone, as in the backbone.

    Raises:
        InputError: The widths do not fit beside each other.
    """

    def __init__(
        self, in_features: int, out_features: int, widths: Sequence[float], *, overlap: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        disjoint = disjoint_widths(widths, overlap)
        self.fc = SlimmableLinear(
            in_features, out_features, slim_out=False, max_width=max(widths), disjoint=disjoint, **factory
        )

    def forward(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """[B, in * width] -> [B, out]."""
        return self.fc(x, width)

    def extract(self, width: float) -> nn.Sequential:
        """The dense head of one width, with tensors of its own and the name `fc`."""
        dense = nn.Sequential()
        dense.add_module('fc', nn.Linear(scale_channels(self.fc.full_in, width), self.fc.out_features, device='meta'))
        return _filled(dense, self, width)


class SlimmableProjector(nn.Module):
    """Linear, BN, ReLU, linear and perhaps a last BN: MoCo v3's projector and predictor, and SimCLR's projector.

    The second linear layer has no bias. The hidden layer has the width; the input has it where it is the backbone's.

    Args:
        in_features: Input features at width 1.0.
        hidden_features: Hidden features at width 1.0.
        out_features: Dimension of the embedding, the same at every width.
        widths: The widths to hold.
        slim_in: True if the input has the width.
        bias: True if the first linear layer has one.
        last_norm: True if a normalisation follows.
        last_affine: True if that has weights and biases.
        overlap: False for sub-networks that share features with the largest alone, as in the backbone.

    Raises:
        InputError: The widths do not fit beside each other.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        widths: Sequence[float],
        *,
        slim_in: bool = True,
        bias: bool = False,
        last_norm: bool = True,
        last_affine: bool = False,
        overlap: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        slim: dict[str, Any] = {
            'max_width': max(widths),
            'disjoint': disjoint_widths(widths, overlap),
            **factory,
        }
        self.fc1 = SlimmableLinear(in_features, hidden_features, slim_in=slim_in, bias=bias, **slim)
        self.bn1 = SwitchableBatchNorm1d(hidden_features, widths, **factory)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = SlimmableLinear(hidden_features, out_features, slim_out=False, bias=False, **slim)
        self.last_affine = last_affine
        self.bn2 = None
        if last_norm:
            self.bn2 = SwitchableBatchNorm1d(out_features, widths, slim=False, affine=last_affine, **factory)

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
                scale_channels(self.fc1.full_in, width) if self.fc1.slim_in else self.fc1.in_features,
                scale_channels(self.fc1.full_out, width),
                bias=self.fc1.bias is not None,
                device='meta',
            ),
        )
        dense.add_module('bn1', nn.BatchNorm1d(scale_channels(self.fc1.full_out, width), device='meta'))
        dense.add_module('act', nn.ReLU(inplace=True))
        dense.add_module(
            'fc2',
            nn.Linear(scale_channels(self.fc2.full_in, width), self.fc2.out_features, bias=False, device='meta'),
        )
        if self.bn2 is not None:
            dense.add_module('bn2', nn.BatchNorm1d(self.fc2.out_features, affine=self.last_affine, device='meta'))
        return _filled(dense, self, width)


def _filled(dense: nn.Sequential, head: nn.Module, width: float) -> nn.Sequential:
    shapes: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    tensors = dense_tensors(head.state_dict(), shapes, width_key(width), slice_starts(head, width))
    dense.load_state_dict(tensors, assign=True)
    return dense
