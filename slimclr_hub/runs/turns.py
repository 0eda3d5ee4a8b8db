"""Times of several cases, taken in turns, so that a drift of the machine's speed favours none."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TypeVar

import torch

K = TypeVar('K')
T = TypeVar('T')


def in_turns(cases: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """Call each case once in each of `repeats` repetitions, and return what they returned.

    Every second repetition is in reverse order.
    """
    returned: dict[K, list[T]] = {name: [] for name in cases}
    names = list(cases)
    for repetition in range(repeats):
        for name in names if repetition % 2 == 0 else reversed(names):
            returned[name].append(cases[name]())
    return returned


def seconds_of(call: Callable[[], object], count: int = 1, device: torch.device | str = 'cpu') -> float:
    """Mean seconds of `count` calls, from an idle device until it is idle again."""
    synchronize(device)
    begun = perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (perf_counter() - begun) / count


def synchronize(device: torch.device | str) -> None:
    """Wait until an accelerator is idle."""
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize(device)
