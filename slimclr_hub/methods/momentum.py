"""The momentum encoder: a dense network that follows one width of a slimmable one."""

from collections.abc import Iterable, Mapping
from itertools import zip_longest

import torch
from torch import nn

from slimclr_hub.models.layers import slice_starts
from slimclr_hub.weights.slices import switch_name, width_key


class EMA:
    """Exponential moving average, in dense modules, of the parameters of slimmable modules at one width.

    `pairs` are (dense, slimmable). Parameters are paired by name once; they may be moved to a device and loaded
    afterwards, but not replaced. Buffers are left alone.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]], width: float) -> None:
        self.averages: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._blocks: list[tuple[slice, ...]] = []
        for dense, slimmable in pairs:
            sources: Mapping[str, nn.Parameter] = dict(slimmable.named_parameters())
            starts = slice_starts(slimmable, width)
            for name, parameter in dense.named_parameters():
                source = sources[name if name in sources else switch_name(name, width_key(width))]
                spans = zip_longest(starts.get(name, ()), parameter.shape, fillvalue=0)
                self.averages.append(parameter)
                self._sources.append(source)
                self._blocks.append(tuple(slice(start, start + n) for start, n in spans))

    @property
    def sources(self) -> list[torch.Tensor]:
        """The width's part of each parameter, cut anew, since a move to a device leaves earlier parts behind."""
        return [source[block] for source, block in zip(self._sources, self._blocks, strict=True)]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Set each average to momentum * average + (1 - momentum) * source, in place (He et al. 2020, Eq. 2)."""
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - momentum)
