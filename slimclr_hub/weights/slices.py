"""Sub-networks as slices of a slimmable network's tensors, by name and shape."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch

from slimclr_hub.errors import InputError

WIDTH_DIGITS = 4
"""Decimals of a width in its key."""

DISJOINT = 'disjoint_widths'
"""Tensor that marks a network whose sub-networks do not overlap, so that no other network loads its weights.

It holds the widths in units of the last decimal of a key; no computation uses it.
"""

BATCH_COUNT = 'num_batches_tracked'
"""Last part of the name of a normalisation's count of the batches that it has seen."""

_SWITCHED = re.compile(r'\.(w\d{3,5})\.')


def scale_channels(channels: int, width: float) -> int:
    """Channels that width `width` uses out of `channels`: the first `int(channels * width)`.

    The small addend keeps products such as 0.29 * 100 = 28.999... from losing a channel to rounding.
    """
    return int(channels * width + 1e-6)


def channel_span(channels: int, width: float, disjoint: Sequence[float] = ()) -> tuple[int, int]:
    """First channel that width `width` uses out of `channels`, those at width 1.0, and the one after its last.

    Of `disjoint` widths each begins where the next narrower one ends, and the widest has all channels; if there are
    none, every width begins at 0.

    Raises:
        InputError: The width is not one of those that do not overlap.
    """
    size = scale_channels(channels, width)
    if not disjoint or width == max(disjoint):
        return 0, size
    if width not in disjoint:
        raise InputError(f'width {width:g} is not one of {", ".join(map(str, disjoint))}, which do not overlap')
    start = sum(scale_channels(channels, narrower) for narrower in disjoint if narrower < width)
    return start, start + size


def width_key(width: float) -> str:
    """Name of a width in module and parameter names: 1.0 -> `w100`, 0.25 -> `w025`, 0.125 -> `w0125`."""
    digits = f'{width:.{WIDTH_DIGITS}f}'.replace('.', '').rstrip('0')
    return f'w{digits:0<3}'


def key_width(key: str) -> float:
    """The width that `width_key` named: `w025` -> 0.25."""
    return float(f'{key[1]}.{key[2:]}')


def switch_name(name: str, key: str) -> str:
    """Name of a dense network's tensor in the slimmable one, for tensors that each width has for itself.

    `layer1.0.bn1.weight`, `w050` -> `layer1.0.bn1.w050.weight`.
    """
    module, _, leaf = name.rpartition('.')
    return f'{module}.{key}.{leaf}'


def unswitch_name(name: str) -> str:
    """Name of a slimmable network's tensor without the width it belongs to, if it belongs to one."""
    return _SWITCHED.sub('.', name)


def switched_key(name: str) -> str | None:
    """Key of the width that a tensor belongs to, `w050` for `layer1.0.bn1.w050.weight`; none where all share it."""
    match = _SWITCHED.search(name)
    return match[1] if match else None


def batch_counts(names: Iterable[str]) -> set[str]:
    """Names of the counts of batches that normalisations have, by the names of their tensors.

    timm and torchvision drop a count where they freeze a normalisation.
    """
    return {f'{name.rpartition(".")[0]}.{BATCH_COUNT}' for name in names if name.endswith('.running_var')}


def with_batch_counts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a count of one batch for each normalisation that has none."""
    return {**tensors, **{name: torch.tensor(1) for name in sorted(batch_counts(tensors) - tensors.keys())}}


def dense_tensors(
    source: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Sequence[int]],
    key: str,
    starts: Mapping[str, Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Cut the tensors of one width's dense network, with their `shapes`, out of those of a slimmable network.

    `key` is that of the width (`w050`); `starts` has the first index of the width in tensors where it may not be 0.
    """
    return {
        name: leading(source[name if name in source else switch_name(name, key)], shape, starts.get(name, ()))
        for name, shape in shapes.items()
    }


def leading(tensor: torch.Tensor, shape: Sequence[int], start: Sequence[int] = ()) -> torch.Tensor:
    """The block of `tensor` with `shape`, from 0 unless `start` says otherwise, as a contiguous tensor of its own."""
    spans = zip_longest(start, shape, fillvalue=0)
    return tensor[tuple(slice(begin, begin + n) for begin, n in spans)].clone(memory_format=torch.contiguous_format)
