"""A choice among the images of a split: few labels, and images held out of a folder that has no split of its own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from slimclr_hub.errors import InputError, shorten


@dataclass(eq=False)
class ChosenImages(Dataset[tuple[Image.Image, int]]):
    """The images of a split with the given indices; classes and their names stay those of the split."""

    images: Any
    indices: np.ndarray

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes by their number, if known."""
        return self.images.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        return self.images.name(int(self.indices[index]))

    def fingerprint(self) -> list[Any]:
        """That of the split, and a hash of the indices."""
        return [*self.images.fingerprint(), hashlib.sha256(self.indices.astype(np.int64).tobytes()).hexdigest()]


def by_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices, ascending, of a share of the images of each class, rounded, and at least one of each."""
    return _by_class(labels, seed, lambda count, _: max(1, round(share * count)))


def by_count(labels: np.ndarray, count: int, seed: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Indices, ascending, of `count` images of each class; an InputError names a class that has fewer."""

    def check(there: int, label: int) -> int:
        if there < count:
            name = names[label] if names else label
            raise InputError(
                f'data.per_class {count}: class {name} has {there} training images; give at most {there}, or leave the '
                'class out'
            )
        return count

    return _by_class(labels, seed, check)


def by_names(files: Sequence[str], listed: Path) -> np.ndarray:
    """Indices, ascending, of the images that the file `listed` names, one a line, as `NAME` or `CLASS/NAME`.

    The ending of a name may be left out.

    Raises:
        InputError: The list cannot be read, or a name is that of no image, or of several.
    """
    try:
        lines = listed.read_text(encoding='utf-8').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'data.train_list {listed} cannot be read: {error}') from error
    wanted = {_parts(line.strip()) for line in lines if line.strip()}
    if not wanted:
        raise InputError(f'data.train_list {listed} names no image; give the name of a training image in each line')
    found: dict[tuple[str, ...], list[int]] = {}
    lengths = {len(parts) for parts in wanted}
    for index, file in enumerate(files):
        parts = _parts(file)
        for end in {parts[-length:] for length in lengths} & wanted:
            found.setdefault(end, []).append(index)
    for problem, names in (
        ('are not among the training images', wanted - found.keys()),
        ('are names of several training images; write CLASS/NAME', {end for end, of in found.items() if len(of) > 1}),
    ):
        if names:
            shown = shorten(sorted(map('/'.join, names)))
            raise InputError(f'data.train_list {listed}: {len(names)} of {len(wanted)} {problem}, {shown}')
    return np.unique([index for of in found.values() for index in of])


def _parts(file: str) -> tuple[str, ...]:
    path = Path(file)
    return (*path.parts[:-1], path.stem)


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices, ascending, of a share of the images of each class, rounded: at least one, and never all.

    Raises:
        InputError: A class has a single image.
    """

    def count(there: int, label: int) -> int:
        if there < 2:
            raise InputError(
                f'class {label} has a single image, and data.hold_out {share} is to hold one out; add images, or give '
                'a folder for validation'
            )
        return min(max(1, round(share * there)), there - 1)

    return _by_class(labels, seed, count)


def _by_class(labels: np.ndarray, seed: int, count: Any) -> np.ndarray:
    chosen = []
    for label in np.unique(labels).tolist():
        of_class = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed, label)).permutation(len(of_class))
        chosen.append(of_class[order[: count(len(of_class), label)]])
    return np.sort(np.concatenate(chosen))
