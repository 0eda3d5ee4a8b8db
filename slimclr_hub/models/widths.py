"""Widths, the fraction of channels that a sub-network uses: their checks, and their names in parameter keys."""

import reprlib
from collections.abc import Iterable
from math import isfinite

from slimclr_hub.errors import InputError
from slimclr_hub.weights.slices import WIDTH_DIGITS
from slimclr_hub.weights.slices import channel_span as channel_span
from slimclr_hub.weights.slices import scale_channels as scale_channels
from slimclr_hub.weights.slices import width_key as width_key

DEFAULT_WIDTHS = (1.0, 0.75, 0.5, 0.25)

_MOST_WIDTHS = 100  # each has normalisations of its own
_TOLERANCE = 1e-6  # of numpy.linspace, which gives 0.6000000000000001


def check_widths(widths: Iterable[float]) -> tuple[float, ...]:
    """Sort widths in descending order and check them.

    Raises:
        InputError: No width at all, a width twice, or one that is no number, is outside (0, 1] or has more than four
            decimals.
    """
    try:
        widths = tuple(sorted((_rounded(float(width)) for width in widths), reverse=True))
    except (TypeError, ValueError):
        raise InputError(f'widths {reprlib.repr(widths)} are no numbers; give for example widths=(1.0, 0.5)') from None
    if len(widths) > _MOST_WIDTHS:
        raise InputError(f'widths names {len(widths)} widths; give at most {_MOST_WIDTHS}')
    if not widths:
        raise InputError('widths is empty; give at least one, for example widths=(1.0, 0.5)')
    for width in widths:
        if not (isfinite(width) and 0 < width <= 1):
            raise InputError(f'width {width:g} is outside (0, 1]')
        if round(width, WIDTH_DIGITS) != width:
            raise InputError(
                f'width {width!r} has more than {WIDTH_DIGITS} decimals; give {round(width, WIDTH_DIGITS)}'
            )
    if len(set(widths)) != len(widths):
        raise InputError(f'widths {widths} names a width twice')
    return widths


def disjoint_widths(widths: Iterable[float], overlap: bool) -> tuple[float, ...]:
    """The widths whose channels do not overlap, in descending order, for `channel_span`: all, or none.

    Raises:
        InputError: They do not fit beside each other, or as in `check_widths`.
    """
    if overlap:
        return ()
    widths = check_widths(widths)
    if (total := round(sum(widths[1:]), WIDTH_DIGITS)) > widths[0]:
        raise InputError(
            f'widths {widths} do not fit with overlap=False: all but the largest add up to {total:g}, more than '
            f'{widths[0]:g}; give fewer or narrower ones, for example widths=(1.0, 0.5, 0.25)'
        )
    return widths


def given(width: float | None) -> float:
    """The width that a slimmable layer was called with.

    Raises:
        InputError: It was called without, as whatever takes layers out of a network calls them.
    """
    if width is None:
        raise InputError(
            'a slimmable layer was called without a width; to use layers apart from their network, as nn.Sequential '
            'does, take the ordinary ones of model.extract(WIDTH)'
        )
    return width


def check_width(width: float, widths: tuple[float, ...]) -> float:
    """Return the element of `widths` that equals `width` to 1e-6, which is a constant for torch.compile.

    Raises:
        InputError: There is none; the message lists `widths`.
    """
    near = width if width in widths else _rounded(width)
    if near not in widths:
        raise InputError(f"width {width!r} is not one of this network's widths, {', '.join(map(str, widths))}")
    return widths[widths.index(near)]


def _rounded(width: float) -> float:
    near = round(width, WIDTH_DIGITS)
    return near if abs(near - width) < _TOLERANCE else width
