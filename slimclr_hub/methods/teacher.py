"""The frozen network that students learn from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.methods.losses import full_precision
from slimclr_hub.weights.hashes import state_hash


class Teacher(nn.Module):
    """A frozen network in eval mode; its features, or their projection, of unit length are what students learn.

    Its tensors follow moves to a device, a type or a memory layout, and nothing else: they are in no state dict, no
    optimizer and no reduction of gradients, and `train()` does not reach them. A run keeps its `hash` instead.

    Args:
        network: Images [B, C, H, W] -> pooled features [B, F].
        dim: Dimension D of the embedding: F without a head.
        scale: For each channel C of its images, the factor that a view is multiplied with before the network sees it.
        shift: What is added then. With several channels a gray view becomes as many equal ones.
        head: Features [B, F] -> [B, D]; the features are the embedding where None.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        dim: int,
        scale: Sequence[float] = (1.0,),
        shift: Sequence[float] = (0.0,),
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, where PyTorch does not look for modules.
        self._hidden = tuple(module.eval().requires_grad_(False) for module in (network, head or nn.Identity()))
        self.dim = dim
        self.register_buffer('scale', torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer('shift', torch.tensor(shift)[:, None, None], persistent=False)

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self._hidden[0]

    @torch.no_grad()
    def features(self, view: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, F] in float32, under autocast too, without a gradient."""
        with torch.autocast(view.device.type, enabled=False):
            return self.network(full_precision(view) * self.scale + self.shift)

    @torch.no_grad()
    def forward(self, view: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] -> [B, D] in float32, without a gradient; of these `features` [B, F] if they are given."""
        features = self.features(view) if features is None else features
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self._hidden[1](features), dim=1)

    def hash(self) -> str:
        """Hash of the tensors."""
        return '+'.join(state_hash(module) for module in self._hidden if module.state_dict())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for module in self._hidden:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)
