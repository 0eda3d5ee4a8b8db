"""Learning rate, momentum of the key encoder and widths, as pure functions of the step."""

from dataclasses import dataclass
from math import cos, pi

_FIRST_LR = 1e-8


def warmup_cosine(step: float, total: float, warmup: float, peak: float) -> float:
    """Learning rate at `step`: linear from almost zero to `peak`, then a half cosine to zero (paper, section 4.1)."""
    if step < warmup:
        return _FIRST_LR + (peak - _FIRST_LR) * step / warmup
    return peak * (1 + cos(pi * (step - warmup) / max(total - warmup, 1))) / 2


def cosine_momentum(step: float, total: float, start: float) -> float:
    """Momentum of the key encoder at `step`, from `start` by a half cosine to one (MoCo v3; Grill et al. 2020)."""
    return 1 - (1 - start) * (1 + cos(pi * step / total)) / 2


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum of the key encoder and widths of each step.

    Args:
        epochs: Epochs to train.
        steps_per_epoch: Optimizer steps in each.
        warmup_epochs: Epochs of warm-up.
        lr: Highest learning rate.
        widths: All widths, in descending order.
        slow_start_epochs: S, the epochs that train the first of them alone.
        lr_after_slow_start: Replaces `lr` from epoch S on, on the same curve (paper, section 4.1, MoCo v3).
        momentum: Momentum of the key encoder; 0 where there is none.
        momentum_schedule: `constant`, or `cosine` to one.
    """

    epochs: int
    steps_per_epoch: int
    warmup_epochs: float
    lr: float
    widths: tuple[float, ...]
    slow_start_epochs: float
    lr_after_slow_start: float | None = None
    momentum: float = 0.0
    momentum_schedule: str = 'constant'

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        later = self.lr_after_slow_start
        peak = self.lr if later is None or self._starts_slowly(step) else later
        return warmup_cosine(step, self.total_steps, self.warmup_epochs * self.steps_per_epoch, peak)

    def momentum_at(self, step: int) -> float:
        """Momentum of the key encoder at a step."""
        if self.momentum_schedule == 'cosine':
            return cosine_momentum(step, self.total_steps, self.momentum)
        return self.momentum

    def widths_at(self, step: int) -> tuple[float, ...]:
        """Widths that a step trains: the full one alone during slow start, then all."""
        return self.widths[:1] if self._starts_slowly(step) else self.widths

    def _starts_slowly(self, step: int) -> bool:
        return step < self.slow_start_epochs * self.steps_per_epoch
