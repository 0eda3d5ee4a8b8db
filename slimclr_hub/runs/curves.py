"""Learning rate and momentum as functions of the step."""

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
