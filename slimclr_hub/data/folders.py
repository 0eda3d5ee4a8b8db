"""Images in folders, one folder for each class, with one numbering of the classes for all splits."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from slimclr_hub.data.labels import UNLABELLED, check_known, class_names, numbered
from slimclr_hub.errors import InputError
from slimclr_hub.images import find_images, left_out, read_image
from slimclr_hub.text import natural_key


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """Images below `root`, of which the folders at its first level are the classes.

    Where images lie in `root` itself there are no classes. Names that begin with a dot are left out, and a folder is
    read once, whatever links lead to it. Files are in natural order of their paths.

    Args:
        root: The folder of one split.
        mode: Pillow's mode of the images.
        numbers: Class -> its number, as `class_numbers` gives them of the training images; those of `root` unless
            given.

    Attributes:
        samples: Path and class of each image.
        class_names: Names of the classes by their number, if there are any.

    Raises:
        InputError: There are no images, or some are of a class that `numbers` does not have.
    """

    def __init__(self, root: Path, mode: str, numbers: Mapping[str, int] | None = None) -> None:
        others: Counter[str] = Counter()
        found = sorted(map(str, find_images(root, IMG_EXTENSIONS, others)), key=natural_key)
        if others:
            warnings.warn(left_out(root, others), stacklevel=2)
        if not found:
            raise InputError(f'{root}: no images found; endings of images are {", ".join(IMG_EXTENSIONS)}')
        parts = [Path(path).relative_to(root).parts for path in found]
        labelled = all(len(names) > 1 for names in parts)
        classes = numbered(names[0] for names in parts) if labelled else {}
        numbers = dict(numbers or classes)
        check_known(classes, numbers, str(root))
        self.mode = mode
        self.class_names = class_names(numbers)
        self.samples = [
            (path, numbers[names[0]] if labelled else UNLABELLED) for path, names in zip(found, parts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, self.mode), label

    def name(self, index: int) -> str:
        """Path of an image."""
        return self.samples[index][0]

    def fingerprint(self) -> list[Any]:
        """Number of images, and a hash of their paths, classes, sizes and times."""
        digest = hashlib.sha256(json.dumps(self.samples).encode())
        for path, _ in self.samples:
            digest.update(file_state(path).encode())
        return [len(self), digest.hexdigest()]


def class_numbers(root: Path) -> dict[str, int]:
    """Class -> its number, of the folders at the first level of `root` that have images, in natural order."""
    below = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')]
    return numbered(path.name for path in below if any(True for _ in find_images(path, IMG_EXTENSIONS, Counter())))


def file_state(path: str) -> str:
    """Size and time of a file, one of which changes with it."""
    status = os.stat(path)
    return f'{status.st_size} {status.st_mtime_ns}\n'
