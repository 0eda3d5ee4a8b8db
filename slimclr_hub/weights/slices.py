"""Sub-networks as slices of a slimmable network's tensors, by name and shape alone."""

import re
from collections.abc import Mapping, Sequence

import torch

WIDTH_DIGITS = 4
"""Decimals of a width that its key can tell."""

_SWITCHED = re.compile(r'\.(w\d{3,5})\.')


def scale_channels(channels: int, width: float) -> int:
    """Channels that width `width` uses out of `channels`: the first `int(channels * width)`.

    The small addend keeps products such as 0.29 * 100 = 28.999... from losing a channel to rounding.
    """
    return int(channels * width + 1e-6)


def width_key(width: float) -> str:
    """Name of a width in module and parameter names: 1.0 -> `w100`, 0.25 -> `w025`, 0.125 -> `w0125`."""
    digits = f'{width:.{WIDTH_DIGITS}f}'.replace('.', '').rstrip('0')
    return f'w{digits:0<3}'


def key_width(key: str) -> float:
    """The width that `width_key` named: `w025` -> 0.25."""
    return float(f'{key[1]}.{key[2:]}')


def switch_name(name: str, key: str) -> str:
    """Name of a dense network's tensor in the slimmable one, for tensors that are kept for each width.

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


def leading(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The leading block of `tensor` that has `shape`, as a contiguous tensor of its own."""
    return tensor[tuple(slice(0, n) for n in shape)].clone(memory_format=torch.contiguous_format)


def dense_tensors(
    source: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], key: str
) -> dict[str, torch.Tensor]:
    """Tensors of the dense network of one width, cut out of a slimmable network's tensors.

    Args:
        source: State dict of the slimmable network.
        shapes: Name and shape of every tensor of the dense network.
        key: Key of the width (`w050`).
    """
    return {
        name: leading(source[name if name in source else switch_name(name, key)], shape)
        for name, shape in shapes.items()
    }
