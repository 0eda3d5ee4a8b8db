"""Make the embedded data set: a fixed, stratified subset of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m tests.data_room.make_fashion_mnist_6k /usr/share/datasets/fashion-mnist

writes `slimclr_hub/data/embedded/fashion_mnist_6k.npz` and its checksum. The subset is the first 600 training and the
first 100 test images of each of the ten classes, in the order of the source: no seed is involved, and equal versions of
zlib give equal files.

Source: Xiao et al. 2017, https://github.com/zalandoresearch/fashion-mnist (MIT licence, see `LICENSE` beside the file).
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from slimclr_hub.data.sources import EMBEDDED_FILE, read_split

TRAIN_IMAGES_PER_CLASS = 600
TEST_IMAGES_PER_CLASS = 100


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` images of every class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main() -> None:
    """Read the folder that the command line names and write the subset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with the four IDX files, gzipped or not')
    folder = parser.parse_args().folder
    arrays = {}
    for split, count in ('train', TRAIN_IMAGES_PER_CLASS), ('test', TEST_IMAGES_PER_CLASS):
        images, labels = read_split(folder, split)
        chosen = first_of_each_class(labels, count)
        arrays[f'{split}_images'], arrays[f'{split}_labels'] = images[chosen], labels[chosen]
    np.savez_compressed(EMBEDDED_FILE, **arrays)
    digest = hashlib.sha256(EMBEDDED_FILE.read_bytes()).hexdigest()
    EMBEDDED_FILE.with_suffix('.sha256').write_text(f'{digest}  {EMBEDDED_FILE.name}\n')
    print(f'{EMBEDDED_FILE}: {EMBEDDED_FILE.stat().st_size / 1e6:.2f} MB, sha256 {digest}')


if __name__ == '__main__':
    main()
