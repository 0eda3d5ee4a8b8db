"""Weights of the losses of the widths, the paper's loss reweighting (section 3.2, and (1) to (4) of section 4.4)."""

from collections.abc import Callable, Sequence

from slimclr_hub.errors import InputError


def full_plus_sum(widths: Sequence[float]) -> list[float]:
    """(1), Eq. (6): one each, and for the full network the sum of the other widths besides."""
    return [1.0 + sum(widths[1:]), *[1.0] * (len(widths) - 1)]


def full_plus_max(widths: Sequence[float]) -> list[float]:
    """(2): one each, and for the full network the largest of the other widths besides."""
    return [1.0 + max(widths[1:], default=0.0), *[1.0] * (len(widths) - 1)]


def proportional(widths: Sequence[float]) -> list[float]:
    """(3): in proportion to the width, n in total."""
    return [len(widths) * width / sum(widths) for width in widths]


def cumulative(widths: Sequence[float]) -> list[float]:
    """(4): in proportion to one plus the sum of all smaller widths, n in total.

    The paper's formula lets the sum begin at the width itself; its printed values, and the reference code, do not.
    """
    raw = [1.0 + sum(widths[i + 1 :]) for i in range(len(widths))]
    return [len(widths) * value / sum(raw) for value in raw]


def none(widths: Sequence[float]) -> list[float]:
    """One each."""
    return [1.0] * len(widths)


SCHEMES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    scheme.__name__: scheme for scheme in (full_plus_sum, full_plus_max, proportional, cumulative, none)
}


def loss_weights(scheme: str | Sequence[float], widths: Sequence[float]) -> list[float]:
    """Weight of each width's loss.

    Args:
        scheme: Name of a scheme, or the weights themselves, one for each of `widths`.
        widths: In descending order.

    Raises:
        InputError: The scheme does not exist, or the number of weights is not that of the widths.
    """
    if not isinstance(scheme, str):
        if len(scheme) != len(widths):
            raise InputError(f'{len(scheme)} loss weights {list(scheme)} for {len(widths)} widths {list(widths)}')
        return [float(weight) for weight in scheme]
    if scheme not in SCHEMES:
        raise InputError(f'loss weights {scheme!r} are not one of {", ".join(SCHEMES)}, or a list')
    return SCHEMES[scheme](widths)
