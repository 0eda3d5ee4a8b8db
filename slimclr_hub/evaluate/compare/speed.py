"""Images per second of several networks at every width, here and now."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import quantiles
from time import perf_counter

import torch

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import Entry
from slimclr_hub.models import SlimmableResNet

_REPETITIONS = 7
_AT_LEAST = 3
_MOMENT = 0.01  # seconds; shorter forwards are timed several at once


@torch.inference_mode()
def measure_speed(entries: Sequence[Entry], batch_size: int, seconds: float = 20) -> list[Entry]:
    """The networks with their speed: inference in float32 on random images of the size that each is made for.

    Every width of every network takes its turn in each repetition, so that what else the machine does meets all of them
    alike. The median over repetitions counts: seven, or fewer but at least three once `seconds` have passed.

    Args:
        entries: The networks.
        batch_size: Images at a time.
        seconds: About how long it may take.

    Raises:
        InputError: The batch does not fit in memory.
    """
    if batch_size < 1:
        raise InputError(f'batch size is {batch_size}; give 1 or more')
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device('cpu')
    begun = perf_counter()
    try:
        turns = [
            (i, width, torch.randn(batch_size, entry.model.in_chans, entry.size, entry.size, device=device))
            for i, entry in enumerate(entries)
            for width in entry.model.to(device).widths
        ]
        # The first pass is slower, and tells how often a forward fits in a moment.
        _ = [_time(entries[i].model, images, width, 1) for i, width, images in turns]
        times = [_time(entries[i].model, images, width, 1) for i, width, images in turns]
        counts = [int(_MOMENT / time) + 1 for time in times]
        measured: list[list[float]] = [[] for _ in turns]
        for repetition in range(_REPETITIONS):
            if repetition >= _AT_LEAST and perf_counter() - begun > seconds:
                break
            for turn, ((i, width, images), count) in enumerate(zip(turns, counts, strict=True)):
                measured[turn].append(_time(entries[i].model, images, width, count))
    except torch.OutOfMemoryError as error:
        raise InputError(f'a batch of {batch_size} does not fit in memory; give a smaller --batch-size') from error
    speeds: list[dict[float, float]] = [{} for _ in entries]
    spreads = [0.0 for _ in entries]
    for (i, width, _), found in zip(turns, measured, strict=True):
        first, middle, third = quantiles(found, n=4, method='inclusive')
        speeds[i][width] = batch_size / middle
        spreads[i] = max(spreads[i], (third - first) / middle)
    return [
        replace(entry, speed=speed, spread=spread)
        for entry, speed, spread in zip(entries, speeds, spreads, strict=True)
    ]


def _time(model: SlimmableResNet, images: torch.Tensor, width: float, count: int) -> float:
    """Seconds for one forward, in the mean of `count`."""
    _wait(images.device)
    begun = perf_counter()
    for _ in range(count):
        model.forward_at(images, width)
    _wait(images.device)
    return (perf_counter() - begun) / count


def _wait(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
