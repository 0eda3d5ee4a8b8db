"""Small data sets of real images on disk, in the formats that the package reads."""

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
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


def png_bytes(image: np.ndarray) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs as a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(root: Path, lengths: Sequence[int], damaged: Mapping[int, bytes] | None = None) -> list[Path]:
    """Write webdataset shards of the given lengths, whose labels number the samples through; some may be damaged.

    The first member of every shard is one that webdataset passes over, as its own writer's metadata.
    """
    images, _ = some_images('train', sum(lengths))
    paths, first = [], 0
    for shard, length in enumerate(lengths):
        members = [('__meta__', b'of no sample')]
        for i in range(first, first + length):
            members += [
                (f'{i:05d}.png', (damaged or {}).get(i, png_bytes(images[i]))),
                (f'{i:05d}.cls', str(i).encode()),
            ]
        paths.append(root / f'train-{shard:04d}.tar')
        write_tar(paths[-1], members)
        first += length
    return paths


def write_parquet(root: Path, lengths: Sequence[int], damaged: Mapping[int, bytes] | None = None) -> Path:
    """Write Parquet files as the Hub holds them, whose labels number the rows through; returns the folder."""
    import datasets

    images, _ = some_images('train', sum(lengths))
    root.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, length in enumerate(lengths):
        numbers = range(first, first + length)
        rows = [{'bytes': (damaged or {}).get(i, png_bytes(images[i])), 'path': None} for i in numbers]
        table = datasets.Dataset.from_dict({'image': rows, 'label': list(numbers)})
        table = table.cast_column('image', datasets.Image(decode=False))
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
        # Small groups of rows, so that a file is not one piece for its readers.
        table.cast(features).to_parquet(str(root / f'train-{shard:05d}-of-{len(lengths):05d}.parquet'), batch_size=7)
        first += length
    return root
