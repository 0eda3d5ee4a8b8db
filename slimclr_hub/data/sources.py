"""Sources of images: the embedded set, Fashion-MNIST's own files, and everything timm's `create_dataset` reads."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset

from slimclr_hub.data.config import EMBEDDED, FASHION_MNIST, DataConfig
from slimclr_hub.data.folders import FolderReader, class_numbers
from slimclr_hub.data.streams.shards import find_shards, is_remote
from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash

EMBEDDED_FILE = Path(__file__).parent / 'embedded' / 'fashion_mnist_6k.npz'
_IDX_PREFIX = {'train': 'train', 'test': 't10k'}
_TORCHVISION_SUBFOLDER = 'FashionMNIST/raw'
_SPLIT_FOLDERS = ({'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'})  # timm's synonyms


@dataclass(eq=False)
class ArrayImages(Dataset[tuple[Any, int]]):
    """Images in memory, uint8 [N, H, W], with integer labels [N], as PIL images of Pillow's `mode`."""

    images: np.ndarray
    labels: np.ndarray
    mode: str
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def make_dataset(config: DataConfig, split: str, training: bool) -> Dataset | IterableDataset:
    """Open one split as timm does: (PIL image, label) pairs, with a settable attribute `transform`.

    `split` is `train`, `validation` or a name that the source knows; `training` shuffles and shards a stream.

    Raises:
        InputError: There is no such source or split, or it holds no image.
    """
    if config.name == EMBEDDED:
        return ArrayImages(*read_embedded(_idx_split(split)), config.mode)
    if config.name == FASHION_MNIST:
        return ArrayImages(*read_split(config.required_root(), _idx_split(split)), config.mode)
    return _timm_dataset(config, split, training)


def known_classes(dataset: Any) -> int | None:
    """Number of classes of a split; 0 where its images have no labels, None where only reading them would tell."""
    if isinstance(dataset, ArrayImages):
        return int(dataset.labels.max()) + 1
    reader = getattr(dataset, 'reader', None)
    return len(reader.class_to_idx) if isinstance(reader, FolderReader) else None


def read_embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images, uint8 [N, 28, 28], and labels, uint8 [N], of the embedded set; `split` is `train` or `test`.

    Raises:
        InputError: The file is not the one that was packaged.
    """
    expected = EMBEDDED_FILE.with_suffix('.sha256').read_text(encoding='utf-8').split()[0]
    if file_hash(EMBEDDED_FILE) != expected:
        raise InputError(f'{EMBEDDED_FILE} is damaged: its sha256 is not {expected}; install the package again')
    with np.load(EMBEDDED_FILE) as arrays:
        return arrays[f'{split}_images'], arrays[f'{split}_labels']


def has_validation(config: DataConfig) -> bool:
    """True if there are validation images of their own; timm would open a folder without splits for both."""
    if config.val_split is None:
        return False
    if config.name != 'folder' or config.root is None:
        return True
    return _split_folder(Path(config.root), config.val_split) is not None


def read_split(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images, uint8 [N, 28, 28], and labels, uint8 [N], of Fashion-MNIST from IDX files, gzipped or not.

    `folder` is Debian's (`/usr/share/datasets/fashion-mnist`) or torchvision's root; `split` is `train` or `test`.

    Raises:
        InputError: The folder or one of its files is missing, or a file is not IDX.
    """
    folder = Path(folder)
    images = _read_idx(_find_idx(folder, f'{_IDX_PREFIX[split]}-images-idx3-ubyte'))
    labels = _read_idx(_find_idx(folder, f'{_IDX_PREFIX[split]}-labels-idx1-ubyte'))
    if len(images) != len(labels):
        raise InputError(f'{folder}: {len(images)} {split} images but {len(labels)} labels; fetch the files again')
    return images, labels


def _find_idx(folder: Path, name: str) -> Path:
    for parent in folder, folder / _TORCHVISION_SUBFOLDER:
        for path in parent / name, parent / f'{name}.gz':
            if path.is_file():
                return path
    raise InputError(
        f'no {name} or {name}.gz in {folder} or its {_TORCHVISION_SUBFOLDER}; `apt-get install dataset-fashion-mnist` '
        'puts the files into /usr/share/datasets/fashion-mnist, torchvision.datasets.FashionMNIST(root, download=True) '
        'into root'
    )


def _read_idx(path: Path) -> np.ndarray:
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


def _split_folder(root: Path, split: str) -> Path | None:
    names = next((group for group in _SPLIT_FOLDERS if split in group), {split})
    return next((root / name for name in sorted(names) if (root / name).is_dir()), None)


def _idx_split(split: str) -> str:
    names = {'train': 'train', 'training': 'train', 'test': 'test', 'val': 'test', 'validation': 'test'}
    if split not in names:
        raise InputError(f'split {split!r} is not train or validation')
    return names[split]


def _timm_dataset(config: DataConfig, split: str, training: bool) -> Dataset | IterableDataset:
    where = f'data.name {config.name}' + (f', data.root {config.root}' if config.root else '') + f', split {split}'
    if config.name == 'folder':
        root = Path(config.required_root())
        if not root.exists():
            raise InputError(f'data.root {root} does not exist')
        others = [name for group in _SPLIT_FOLDERS for name in sorted(group) if (root / name).is_dir()]
        if others and _split_folder(root, split) is None:
            raise InputError(f'{where}: there is no such split; there are {", ".join(others)}')
        if root.is_dir():
            return _folder_dataset(config, root, split, where)
    num_samples = config.num_samples
    if config.name.startswith('torch/'):
        config.required_root()
    elif config.name.startswith('wds/') and not is_remote(address := config.required_root()):
        if not Path(address).is_dir():
            raise InputError(f'data.root {address} does not exist')
        if 'tar' not in split and '..' not in split:
            # timm knows patterns and the splits of an _info.json; this is how it takes a list.
            files, lengths, _ = find_shards(address, split)
            split, num_samples = '::'.join(files), num_samples or sum(lengths or ())
    keys: dict[str, Any] = {'input_key': config.image_key, 'target_key': config.label_key}
    try:
        dataset = create_dataset(
            '' if config.name == 'folder' else config.name,
            root=config.root,
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            num_samples=num_samples,
            input_img_mode=config.mode,
            **{name: key for name, key in keys.items() if key is not None},
        )
    except ImportError as error:
        raise InputError(
            f'{where}: {error}; pip install "slimclr-hub[train]" brings what timm reads it with'
        ) from error
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError) as error:
        raise InputError(f'{where}: {str(error) or "not found"}') from error
    if not len(dataset):
        raise InputError(f'{where}: no images found; a stream of unknown length needs data.num_samples')
    if not config.streams:
        _check_first_image(dataset, config, where)
    return dataset


def _folder_dataset(config: DataConfig, root: Path, split: str, where: str) -> Dataset:
    # Classes are numbered by the training images, also where another split lacks some.
    train = _split_folder(root, config.train_split)
    numbers = class_numbers(train) if train is not None and split != config.train_split else None
    dataset = ImageDataset(
        str(root), reader=FolderReader(_split_folder(root, split) or root, numbers), input_img_mode=config.mode
    )
    _check_first_image(dataset, config, where)
    return dataset


def _check_first_image(dataset: Any, config: DataConfig, where: str) -> None:
    # A wrong column would otherwise come to light in a worker, in the middle of an epoch.
    if config.name.startswith('hfds/') and config.label_key is None:
        table = dataset.reader.dataset
        if 'label' not in table.column_names:
            dataset.reader.dataset = table.add_column('label', [-1] * len(table))
    try:
        dataset[0]
    except (TypeError, KeyError, OSError, AssertionError, RuntimeError) as error:
        raise InputError(
            f'{where}: cannot read the first image ({error!r}); data.image_key is {config.image_key}, data.label_key '
            f'{config.label_key}'
        ) from error
