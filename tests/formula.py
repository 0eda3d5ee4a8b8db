"""Deterministic tensors: the value at flat index i of the tensor named `name` is a pure function of (name, i, salt).

The numbers in tests/data were recorded from the authors' implementation with weights and images made by these.
"""

import zlib
from collections.abc import Sequence

import numpy as np


def uniform(name: str, n: int, salt: int = 0) -> np.ndarray:
    """splitmix64 hash of (crc32(name), index, salt) -> float64 in [0, 1)."""
    with np.errstate(over='ignore'):
        start = np.uint64(zlib.crc32(name.encode())) * np.uint64(1 << 32) + np.uint64(salt)
        z = (np.arange(n, dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def tensor(name: str, shape: Sequence[int], salt: int = 0) -> np.ndarray:
    """float32 values scaled so that a ResNet filled with them keeps its activations near unit scale."""
    n = int(np.prod(shape)) if len(shape) else 1
    u = uniform(name, n, salt).reshape(shape)
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'num_batches_tracked':
        return np.asarray(1000, dtype=np.int64)
    if leaf == 'running_var':
        return (0.5 + u).astype(np.float32)
    if leaf == 'running_mean':
        return (0.2 * (u - 0.5)).astype(np.float32)
    if len(shape) == 1:
        return ((0.5 + u) if leaf == 'weight' else 0.2 * (u - 0.5)).astype(np.float32)
    fan_in = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[-1]
    bound = (6.0 / fan_in) ** 0.5
    return ((2 * u - 1) * bound).astype(np.float32)
