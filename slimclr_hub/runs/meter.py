"""Running means that stay on the device until they are read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Meter:
    """Means of named scalars since they were last read; a value that is not finite is left out.

    Adding queues work on the device and waits for nothing; reading waits for the device once, for all of them.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add scalars of a step; names may differ from step to step."""
        names = tuple(values)
        added = torch.stack([value.detach().float() for value in values.values()])
        finite = added.isfinite()
        sums_and_counts = torch.stack([torch.where(finite, added, 0.0), finite.float()])
        if names in self._totals:
            self._totals[names] += sums_and_counts
        else:
            self._totals[names] = sums_and_counts

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda totals: totals) -> dict[str, float]:
        """Mean of each name with a finite value; `reduce` adds up a tensor over processes, which need equal names."""
        totals: dict[str, list[float]] = {}
        for names, sums_and_counts in self._totals.items():
            for name, *added in zip(names, *reduce(sums_and_counts).tolist(), strict=True):
                totals[name] = [old + new for old, new in zip(totals.get(name, [0.0, 0.0]), added, strict=True)]
        return {name: total / count for name, (total, count) in totals.items() if count}

    def reset(self) -> None:
        """Start anew."""
        self._totals.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has been added since the last reading."""
        return {'names': [list(names) for names in self._totals], 'totals': list(self._totals.values())}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        pairs = zip(state['names'], state['totals'], strict=True)
        self._totals = {tuple(names): totals.to(device, copy=True) for names, totals in pairs}
