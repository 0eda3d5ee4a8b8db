"""Small data sets of real images on disk, in the formats that the package reads."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from slimclr_hub.data.sources import read_embedded

IDX_NAMES = {'train': 'train', 'test': 't10k'}


def some_images(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the embedded set and their labels."""
    images, labels = read_embedded(split)
    return images[:count], labels[:count]


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of unsigned bytes in the IDX format, as http://yann.lecun.com/exdb/mnist describes it."""
    header = bytes([0, 0, 8, array.ndim]) + b''.join(length.to_bytes(4, 'big') for length in array.shape)
    return header + array.tobytes()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, gzipped: bool = False) -> None:
    """Write one split under the names that MNIST has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ('images-idx3-ubyte', images), ('labels-idx1-ubyte', labels):
        data = idx_bytes(array)
        suffix = '.gz' if gzipped else ''
        (folder / f'{IDX_NAMES[split]}-{name}{suffix}').write_bytes(gzip.compress(data) if gzipped else data)


def write_idx_set(folder: Path, train: int, test: int) -> Path:
    """Write the first images of the embedded set's two splits; returns the folder."""
    for split, count in ('train', train), ('test', test):
        write_idx(folder, split, *some_images(split, count))
    return folder


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    """Write images as numbered PNG files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{i:04d}.png')
    return folder


def write_classes(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Write images as PNG files in a folder for each class; returns the folder."""
    for label in np.unique(labels):
        write_pngs(folder / f'class{label}', images[labels == label])
    return folder
