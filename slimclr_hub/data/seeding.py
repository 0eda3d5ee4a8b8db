"""Random numbers that follow from named integers, such as (seed, epoch, index), and from nothing else."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """Hash integers to a 32-bit seed; neighbouring integers give unrelated seeds, unlike their sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def drawing(*numbers: int) -> Iterator[None]:
    """Seed torch's global CPU generator from the integers, and restore its state afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        # The CPU generator takes 32 bits of a seed, so the numbers have to be mixed into as many.
        generator.manual_seed(mixed_seed(*numbers))
        yield
    finally:
        generator.set_state(before)


@contextmanager
def drawing_all(*numbers: int) -> Iterator[None]:
    """As `drawing`, for the generators of Python and NumPy, too, which timm's augmentation draws from."""
    before, numpy_before, seed = random.getstate(), np.random.get_state(), mixed_seed(*numbers)
    try:
        random.seed(seed)
        np.random.seed(seed)
        with drawing(*numbers):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def permutation(length: int, *numbers: int) -> np.ndarray:
    """Permute the integers below `length`, in an order that follows from the numbers."""
    return np.random.default_rng(numbers).permutation(length)
