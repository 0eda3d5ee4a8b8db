"""Images in folders, one folder for each class, with one numbering of the classes for all splits."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from slimclr_hub.errors import InputError, shorten


class FolderReader(Reader):
    """Images below `root`, of which the folders at its first level are the classes; timm's interface of a reader.

    Where images lie in `root` itself there are no classes, and labels are None. Names that begin with a dot are left
    out, and a folder is read once, whatever links lead to it. Files are in natural order of their paths.

    Args:
        root: The folder of one split.
        numbers: Class -> its number, as `class_numbers` gives them of the training images; those of `root` unless
            given.

    Attributes:
        samples: Path and class of each image.
        class_to_idx: Class -> its number.

    Raises:
        InputError: There are no images, or some are of a class that `numbers` does not have.
    """

    def __init__(self, root: Path, numbers: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.root = str(root)
        others: Counter[str] = Counter()
        found = sorted(map(str, _images(root, others)), key=natural_key)
        if others:
            most = sorted(others.items(), key=lambda each: (-each[1], each[0]))[:5]
            listed = ', '.join(f'{count} {ending}' for ending, count in most)
            warnings.warn(f'{root}: files that are no images by their endings are left out: {listed}', stacklevel=2)
        if not found:
            raise InputError(f'{root}: no images found; endings of images are {", ".join(IMG_EXTENSIONS)}')
        parts = [Path(path).relative_to(root).parts for path in found]
        labelled = all(len(names) > 1 for names in parts)
        classes = _numbered({names[0] for names in parts} if labelled else set())
        self.class_to_idx = dict(numbers or classes)
        if unknown := [name for name in classes if name not in self.class_to_idx]:
            raise InputError(f'{root}: the training images have no class {shorten(unknown)}; name the folders as there')
        self.samples = [
            (path, self.class_to_idx[names[0]] if labelled else None) for path, names in zip(found, parts, strict=True)
        ]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        path, label = self.samples[index]
        return open(path, 'rb'), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def class_numbers(root: Path) -> dict[str, int]:
    """Class -> its number, of the folders at the first level of `root` that have images, in natural order."""
    below = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')]
    return _numbered({path.name for path in below if any(True for _ in _images(path, Counter()))})


def _numbered(classes: set[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(sorted(classes, key=natural_key))}


def _images(root: Path, others: Counter[str]) -> Iterator[Path]:
    """Yield paths of images below `root`, and count the other files by their endings."""
    seen = {root.resolve()}
    for folder, below, files in os.walk(root, followlinks=True):
        places = {name: Path(folder, name).resolve() for name in below if not name.startswith('.')}
        below[:] = [name for name, place in places.items() if place not in seen]
        seen.update(places.values())
        for name in files:
            if name.startswith('.'):
                continue
            ending = Path(name).suffix.lower()
            if ending in IMG_EXTENSIONS:
                yield Path(folder, name)
            else:
                others[ending or 'without'] += 1
