"""Running means that stay on the device until they are read."""

import torch


class Meter:
    """Means of named scalars since they were last read.

    Adding queues work on the device and waits for nothing; reading waits for the device once, for all of them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add scalars of a step; names may differ from step to step."""
        for name, value in values.items():
            value = value.detach().float()
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> torch.Tensor:
        """Means in the order of `names`, one tensor on the device."""
        return torch.stack([self._sums[name] / self._counts[name] for name in self._sums])

    @property
    def names(self) -> list[str]:
        """Names that have a value."""
        return list(self._sums)

    def reset(self) -> None:
        """Start anew."""
        self._sums.clear()
        self._counts.clear()
