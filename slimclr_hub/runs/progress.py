"""Progress bar over images."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, show: bool, *, initial: int = 0, delay: float = 1) -> Any:
    """A bar with images per second and the time left, which appears after `delay` seconds; it begins at `initial`."""
    return tqdm(
        total=total,
        initial=initial,
        unit='img',
        unit_scale=True,
        desc=description,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        delay=delay,
        disable=not show,
    )
