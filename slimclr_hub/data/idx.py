"""Reader of the IDX format, in which MNIST and Fashion-MNIST are distributed.

Debian's package and torchvision's cache hold the same four files, the one gzipped, the other not; this reads both.
"""

import gzip
from pathlib import Path

import numpy as np

from slimclr_hub.errors import InputError

_PREFIX = {'train': 'train', 'test': 't10k'}
_TORCHVISION_SUBFOLDER = 'FashionMNIST/raw'


def read_split(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of Fashion-MNIST.

    Args:
        folder: Debian's folder (`/usr/share/datasets/fashion-mnist`) or the root given to torchvision.
        split: `train` or `test`.

    Returns:
        Images, uint8 of shape [N, 28, 28], and labels, uint8 of shape [N].

    Raises:
        InputError: The folder or one of its files is missing, or a file is not IDX.
    """
    folder = Path(folder)
    images = _read(_find(folder, f'{_PREFIX[split]}-images-idx3-ubyte'))
    labels = _read(_find(folder, f'{_PREFIX[split]}-labels-idx1-ubyte'))
    if len(images) != len(labels):
        raise InputError(f'{folder}: {len(images)} {split} images but {len(labels)} labels; fetch the files again')
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for parent in folder, folder / _TORCHVISION_SUBFOLDER:
        for path in parent / name, parent / f'{name}.gz':
            if path.is_file():
                return path
    raise InputError(
        f'no {name} or {name}.gz in {folder} or its {_TORCHVISION_SUBFOLDER}; `apt-get install dataset-fashion-mnist` '
        'puts the files into /usr/share/datasets/fashion-mnist, torchvision.datasets.FashionMNIST(root, download=True) '
        'into root'
    )


def _read(path: Path) -> np.ndarray:
    opener = gzip.open if path.suffix == '.gz' else open
    try:
        with opener(path, 'rb') as file:
            data = file.read()
        zero, dtype, ndim = int.from_bytes(data[:2], 'big'), data[2], data[3]
        shape = np.frombuffer(data, '>i4', count=ndim, offset=4)
        if zero != 0 or dtype != 0x08:
            raise ValueError('not an IDX file of unsigned bytes')
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f'cannot read {path}: {error}; fetch the file again') from error
