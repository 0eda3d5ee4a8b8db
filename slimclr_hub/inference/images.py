"""Lists of images from files, folders and memory, and the unreadable ones among them."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard, Union

from PIL import Image
from timm.data import get_img_extensions
from torchvision.datasets.folder import IMG_EXTENSIONS

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.images import Problem, find_images, left_out, open_image, read_image, reason
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.text import natural_key

Source = str | os.PathLike[str] | Image.Image
Sources = Union[Source, Iterable[Source], 'ImageList']

_SOURCES = (str, os.PathLike, Image.Image)
_THREADS = 16  # they wait for the disk or the network
_CHUNK = 4096
_loading = Lock()  # one image may stand in a list twice


@dataclass(frozen=True)
class ImageList:
    """Images by index: names, which are paths or indices, and paths or PIL images, which may be decoded on access."""

    names: list[str]
    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, mode: str) -> Image.Image:
        """Decode one image, as `read_image` does."""
        return read_image(self.items[index], mode)

    def without(self, indices: Iterable[int]) -> 'ImageList':
        """Return the other images, with their names."""
        left_out = set(indices)
        kept = [index for index in range(len(self)) if index not in left_out]
        return ImageList([self.names[index] for index in kept], [self.items[index] for index in kept])


def list_images(images: Sources) -> ImageList:
    """List images in the order given, those of a folder in natural order of their names: 2 before 10.

    A folder is searched recursively for the file endings that timm and torchvision know, to which timm's
    `add_img_extensions` adds; hidden files are left out. A file that is given by itself may have any ending.

    Images of a single folder are named by their path inside it; otherwise names begin with the path as given. Line
    breaks in a path and undecodable bytes become escapes, so that any file can hold names.

    Args:
        images: The path of a file or folder, a PIL image, or several of these. A column of images of `datasets` is
            decoded one by one; an `ImageList` is returned as it is.

    Raises:
        InputError: A path does not exist, a folder holds no image, there is nothing, or something else than images.
    """
    if isinstance(images, ImageList):
        return images
    if isinstance(images, _SOURCES):
        images = [images]
    if _is_lazy(images):
        return ImageList([str(index) for index in range(len(images))], images)
    sources = _checked(images)
    names: list[str] = []
    items: list[Path | Image.Image] = []
    for source in sources:
        if isinstance(source, Image.Image):
            names.append(str(len(names)))
            items.append(source)
            continue
        path = Path(source)
        files = _files(path)
        inside = len(sources) == 1 and files != [path]
        names += [_printable(file.relative_to(path) if inside else file) for file in files]
        items += files
    return ImageList(names, items)


def find_unreadable(images: ImageList, progress: bool = True) -> dict[int, str]:
    """Return index and reason of each image that does not open; broken pixels show only when they are decoded.

    Images in memory are loaded here: forked workers would share the open file of an unloaded one, and move its position
    under each other. Images that are decoded on access are not checked.
    """
    if not isinstance(images.items, list):
        return {}
    problems = {}
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(len(images), 'checking', progress) as bar:
        for start in range(0, len(images), _CHUNK):
            found = pool.map(_problem, images.items[start : start + _CHUNK])
            for index, problem in enumerate(found, start):
                if problem is not None:
                    problems[index] = problem
                bar.update()
    return problems


def unreadable_error(problems: Sequence[Problem]) -> InputError:
    """Return the error that names the images, the first few of many."""
    listed = shorten([f'{name} ({why})' for name, why in problems])
    them = 'it' if len(problems) == 1 else 'them'
    return InputError(f'cannot read {listed}; remove {them}, or give --skip-unreadable')


def _is_lazy(images: Iterable[Source]) -> TypeGuard[Sequence[Image.Image]]:
    if not isinstance(images, Sequence) or isinstance(images, list | tuple):
        return False
    return len(images) > 0 and isinstance(images[0], Image.Image)


def _checked(images: Iterable[Any]) -> list[Source]:
    if not isinstance(images, Iterable):
        raise InputError(f'images is a {type(images).__name__}; give files, folders or PIL images')
    sources = []
    for index, item in enumerate(images):
        if not isinstance(item, _SOURCES):
            column = "; of a data set give the column of images: dataset['image']" if isinstance(item, dict) else ''
            raise InputError(
                f'images[{index}] is a {type(item).__name__}, not the path of a file or folder or a PIL image{column}'
            )
        sources.append(item)
    if not sources:
        raise InputError('there are no images; give files, folders or PIL images')
    return sources


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            path.stat()
            return [path]
    except OSError as error:
        raise InputError(f'images {path}: {error.strerror}') from error
    endings = get_img_extensions(as_set=True).union(IMG_EXTENSIONS)
    others: Counter[str] = Counter()
    found = list(find_images(path, endings, others))
    if not found:
        raise InputError(f'images {path}: no images in this folder; searched for {", ".join(sorted(endings))}')
    if others:
        warnings.warn(left_out(path, others), stacklevel=2)
    return sorted(found, key=lambda file: natural_key(str(file)))


def _printable(path: Path) -> str:
    name = path.as_posix().encode('utf-8', 'backslashreplace').decode()
    return name.replace('\n', '\\n').replace('\r', '\\r')


def _problem(item: Any) -> str | None:
    try:
        if isinstance(item, Path):
            with open_image(item):
                pass
        else:
            with _loading:
                item.load()
    except Exception as error:  # decoders raise whatever occurs to them: SyntaxError, struct.error, IndexError, ...
        return reason(error)
    return None
