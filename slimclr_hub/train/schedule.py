"""What changes over training, as pure functions of the step."""

from dataclasses import dataclass
from math import cos, pi

_FIRST_LR = 1e-8


def warmup_cosine(step: float, total: float, warmup: float, peak: float) -> float:
    """Learning rate at `step`: linear from almost zero to `peak`, then a half cosine to zero (paper, section 4.1)."""
    if step < warmup:
        return _FIRST_LR + (peak - _FIRST_LR) * step / warmup
    return peak * (1 + cos(pi * (step - warmup) / max(total - warmup, 1))) / 2


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum of the key encoder and widths of each step.

    Args:
        epochs: Epochs to train.
        steps_per_epoch: Optimizer steps in each.
        warmup_epochs: Epochs of warm-up.
        lr: Highest learning rate.
        momentum: Momentum of the key encoder.
        widths: All widths, in descending order.
        slow_start_epochs: Epochs that train the first of them alone.
    """

    epochs: int
    steps_per_epoch: int
    warmup_epochs: float
    lr: float
    momentum: float
    widths: tuple[float, ...]
    slow_start_epochs: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        return warmup_cosine(step, self.total_steps, self.warmup_epochs * self.steps_per_epoch, self.lr)

    def momentum_at(self, step: int) -> float:
        """Momentum of the key encoder at a step; constant for MoCo v2."""
        return self.momentum

    def widths_at(self, step: int) -> tuple[float, ...]:
        """Widths that a step trains: the full one alone during slow start, then all."""
        if step < self.slow_start_epochs * self.steps_per_epoch:
            return self.widths[:1]
        return self.widths
