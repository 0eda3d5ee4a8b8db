"""Images that cannot be read: found before the work where that is possible, and named."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image, UnidentifiedImageError

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.inference.images import ImageList
from slimclr_hub.runs.progress import progress_bar

Problem = tuple[str, str]
"""Name of an image and why it cannot be read."""

_THREADS = 16  # they wait for the disk or the network
_CHUNK = 4096
_loading = Lock()  # one image may stand in a list twice


def find_unreadable(images: ImageList, progress: bool = True) -> dict[int, str]:
    """Index of each image that does not open, and why. Whether its pixels decode shows only when they are read.

    Images in memory are loaded here: forked workers would share the open file of one that is not, and move the
    position in it under each other. Those that are decoded when they are asked for are not looked at.

    Args:
        images: The images.
        progress: Whether to show a bar, where it takes longer than a moment.
    """
    if not isinstance(images.items, list):
        return {}
    problems: list[str | None] = []
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(len(images), 'checking', progress) as bar:
        for start in range(0, len(images), _CHUNK):
            for problem in pool.map(_problem, images.items[start : start + _CHUNK]):
                problems.append(problem)
                bar.update()
    return {index: problem for index, problem in enumerate(problems) if problem is not None}


def reason(error: Exception) -> str:
    """Why an image could not be read, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return 'not an image that Pillow can read'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def unreadable_error(problems: Sequence[Problem]) -> InputError:
    """The error that names the images, the first few where there are many."""
    listed = shorten([f'{name} ({why})' for name, why in problems])
    them = 'it' if len(problems) == 1 else 'them'
    return InputError(f'cannot read {listed}; remove {them}, or leave {them} out with skip_unreadable')


def _problem(item: Any) -> str | None:
    try:
        if isinstance(item, Path):
            with Image.open(item):
                pass
        else:
            with _loading:
                item.load()
    except Exception as error:  # decoders raise whatever occurs to them: SyntaxError, struct.error, IndexError, ...
        return reason(error)
    return None
