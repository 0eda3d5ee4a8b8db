"""Sub-networks as slices of a slimmable network's tensors, by name and shape alone."""

import re
from collections.abc import Mapping, Sequence

import torch

_SWITCHED = re.compile(r'\.w\d{3,5}\.')


def switch_name(name: str, key: str) -> str:
    """Name of a dense network's tensor in the slimmable one, for tensors that are kept for each width.

    `layer1.0.bn1.weight`, `w050` -> `layer1.0.bn1.w050.weight`.
    """
    module, _, leaf = name.rpartition('.')
    return f'{module}.{key}.{leaf}'


def unswitch_name(name: str) -> str:
    """Name of a slimmable network's tensor without the width it belongs to, if it belongs to one."""
    return _SWITCHED.sub('.', name)


def is_switched(name: str) -> bool:
    """Whether a slimmable network's tensor belongs to one width alone, as `layer1.0.bn1.w050.weight` does."""
    return _SWITCHED.search(name) is not None


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
