"""The momentum encoder: a dense network that follows the full width of a slimmable one."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from slimclr_hub.weights.slices import switch_name, width_key


class EMA:
    """Exponential moving average, in dense modules, of the parameters of slimmable modules at one width.

    `pairs` are (dense, slimmable). Parameters are paired by name once; they may be moved to a device and loaded
    afterwards, but not replaced. Buffers are left alone.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]], width: float) -> None:
        self.averages: list[torch.Tensor] = []
        self.sources: list[torch.Tensor] = []
        for dense, slimmable in pairs:
            sources: Mapping[str, nn.Parameter] = dict(slimmable.named_parameters())
            for name, parameter in dense.named_parameters():
                self.averages.append(parameter)
                self.sources.append(sources[name if name in sources else switch_name(name, width_key(width))])

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Set each average to momentum * average + (1 - momentum) * source, in place (He et al. 2020, Eq. 2)."""
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - momentum)
