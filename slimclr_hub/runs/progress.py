"""The bar that shows how far a pass over images has come."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, show: bool) -> Any:
    """A bar with images per second and the time left; it appears once the pass takes longer than a moment.

    Args:
        total: Images.
        description: What is being done.
        show: False for no bar.
    """
    return tqdm(
        total=total,
        unit='img',
        unit_scale=True,
        desc=description,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        delay=1,
        disable=not show,
    )
