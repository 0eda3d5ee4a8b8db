"""Times of several cases, taken in turns, so that a drift of the machine's speed favours none."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

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


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
