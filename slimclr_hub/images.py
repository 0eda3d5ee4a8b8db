"""Images from files, bytes and memory: where they lie, what is in them, and why one cannot be read."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

Problem = tuple[str, str]
"""Name of an image and why it cannot be read."""

MAX_IMAGE_SIZE = 4096
"""Most pixels a side that a network is given: one RGB image of it is 200 MB of numbers."""

_LONGEST = 8  # sides of an image in units of the other, from which on it is cropped before it is resized
_OF_16_BITS = ('PNG', 'PPM')  # formats of which Pillow's 32-bit integers hold 16


def find_images(root: Path, endings: Collection[str], others: Counter[str]) -> Iterator[Path]:
    """Yield files below `root` that end as images do, and count the others by their endings.

    Hidden names are left out, and a folder is read once, whatever links lead to it.
    """
    seen = {root.resolve()}
    for folder, below, files in os.walk(root, followlinks=True):
        places = {name: Path(folder, name).resolve() for name in below if not name.startswith('.')}
        below[:] = [name for name, place in places.items() if place not in seen]
        seen.update(places.values())
        for name in files:
            if name.startswith('.'):
                continue
            ending = Path(name).suffix.lower()
            if ending in endings:
                yield Path(folder, name)
            else:
                others[ending or 'without'] += 1


def left_out(root: Path, others: Counter[str]) -> str:
    """Sentence about the files of other endings, the most frequent of them."""
    most = sorted(others.items(), key=lambda each: (-each[1], each[0]))[:5]
    listed = ', '.join(f'{count} {ending}' for ending, count in most)
    return f'{root}: files that are no images by their endings are left out: {listed}'


def read_image(source: Any, mode: str) -> Image.Image:
    """Decode an image to Pillow's `mode`, RGB or L: without transparency, not rotated by EXIF, 16 bits scaled to 8.

    Args:
        source: A path, encoded bytes, a PIL image, or a mapping with one of the first two at `path` or `bytes`.
        mode: Pillow's mode of the result.

    Raises:
        Exception: Of any kind; decoders raise whatever occurs to them.
    """
    if isinstance(source, Mapping):
        source = source.get('bytes') or source.get('path')
    if isinstance(source, Image.Image):
        return _converted(source, mode)
    if isinstance(source, bytes | bytearray):
        source = BytesIO(source)
    elif not isinstance(source, str | os.PathLike):
        raise TypeError(f'a {type(source).__name__}, not an image' if source is not None else 'no image')
    with open_image(source) as image:
        return _converted(image, mode)


def open_image(source: str | os.PathLike[str] | BytesIO) -> Image.Image:
    """Open an image without decoding it; exceptions are of any kind."""
    if not isinstance(source, BytesIO) and not stat.S_ISREG(os.stat(source).st_mode):
        raise OSError('not a file')  # to open a pipe would be to wait for its writer
    image = Image.open(source)
    if image.format == 'EPS':
        image.close()
        raise OSError('PostScript, which is a program and is not run; convert it to PNG')
    return image


def _converted(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    # Pillow would clip what does not fit into 8 bits, so that nearly all of the image becomes white.
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in _OF_16_BITS):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise ValueError('pixels of 32 bits have no range that is known; convert them to 8 or 16 bits')
    return image if image.mode == mode else image.convert(mode)


def reason(error: Exception) -> str:
    """Explain on one line why an image could not be read, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return 'not an image that Pillow can read'
    return ' '.join(str(getattr(error, 'strerror', None) or error).split()) or type(error).__name__


class CentreFirst:
    """A transform that resizes the shorter side and crops the centre, for images of any aspect.

    An image that is more than eight times as long as wide is cropped first: resizing one of 20,000 x 1 pixels as a
    whole takes gigabytes.
    """

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        """PIL image -> what the transform gives."""
        longest = _LONGEST * min(image.size)
        if max(image.size) > longest:
            width, height = (min(side, longest) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return self.transform(image)
