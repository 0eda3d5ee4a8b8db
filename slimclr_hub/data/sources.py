"""Where images come from: the embedded set, Fashion-MNIST's own files, and everything timm's `create_dataset` reads."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from slimclr_hub.data.idx import read_split
from slimclr_hub.data.streams.shard_names import find_shards, is_remote
from slimclr_hub.data.transfer import TRANSFERS
from slimclr_hub.errors import InputError

EMBEDDED = 'fashion-mnist-6k'
FASHION_MNIST = 'fashion-mnist'
_EMBEDDED_FILE = Path(__file__).parent / 'embedded' / 'fashion_mnist_6k.npz'
_TIMM_KINDS = ('folder', 'hfds/', 'hfids/', 'wds/', 'tfds/', 'torch/')
_SPLIT_FOLDERS = ({'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'})  # timm's synonyms
HOW_NOT_WHICH = ('num_workers', 'download', 'max_corrupt', 'transfer', 'read_ahead')
"""Fields of `DataConfig` that say how images come, not which."""
_STREAMS = ('hfids/', 'wds/', 'tfds/')


@dataclass(frozen=True)
class DataConfig:
    """Images to train on.

    Args:
        name: `fashion-mnist-6k` (ships with the package), `fashion-mnist` (its IDX files in `root`), `folder` (an image
            folder or tar in `root`), or a name of timm's: `hfds/USER/NAME` (Hub data set), `hfids/USER/NAME`
            (streamed), `wds/` (webdataset shards in `root`), `torch/cifar10`.
        root: Folder of the data set, where the name needs one.
        train_split: Split to train on; for webdataset, the pattern of its shards.
        val_split: Split that k-NN classifies; null for none.
        size: Height and width in pixels of the images that the network is made for and evaluated on.
        channels: 3 for RGB, 1 for gray.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        crop_pct: Share of the image that evaluation crops from its centre.
        batch_size: Images a step over all processes.
        num_workers: Worker processes that load and augment, on each process.
        num_samples: Images an epoch, where a stream does not know its own length.
        image_key: Name of a Hub data set's column of images.
        label_key: Name of a Hub data set's column of labels.
        download: Let torchvision download its data set into `root`.
        max_corrupt: Distinct images that each process may replace because they cannot be read, before training stops.
        shuffle_buffer: Encoded images that each worker holds to shuffle a stream that it trains on; 0 or 1 for none.
        transfer: What workers hand over to training: `uint8`, views of 8 bits, copied beside what the device computes
            and normalised there for a batch at a time, or `float32`, views that the workers have normalised, copied
            between computations. Batches are the same. For views.backend kornia crops always have 8 bits.
        read_ahead: Let workers begin with the next epoch while the last batches of one are trained on, rather than
            when it is asked for. Batches are the same.
    """

    name: str = EMBEDDED
    root: str | None = None
    train_split: str = 'train'
    val_split: str | None = 'validation'
    size: int = 28
    channels: int = 1
    mean: tuple[float, ...] = (0.286,)
    std: tuple[float, ...] = (0.353,)
    crop_pct: float = 1.0
    batch_size: int = 128
    num_workers: int = 2
    num_samples: int | None = None
    image_key: str | None = None
    label_key: str | None = None
    download: bool = False
    max_corrupt: int = 100
    shuffle_buffer: int = 2048
    transfer: str = 'uint8'
    read_ahead: bool = True

    def __post_init__(self) -> None:
        if self.name not in (EMBEDDED, FASHION_MNIST) and not self.name.startswith(_TIMM_KINDS):
            raise InputError(
                f'data.name {self.name!r} is not {EMBEDDED}, {FASHION_MNIST} or one that begins with '
                f'{", ".join(_TIMM_KINDS)}'
            )
        for name, least in (
            ('size', 2),
            ('batch_size', 2),
            ('num_workers', 0),
            ('max_corrupt', 0),
            ('shuffle_buffer', 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f'data.{name} is {getattr(self, name)}; give {least} or more')
        if self.transfer not in TRANSFERS:
            raise InputError(f'data.transfer is {self.transfer!r}; give {" or ".join(TRANSFERS)}')
        if self.num_samples is not None and self.num_samples < 1:
            raise InputError(f'data.num_samples is {self.num_samples}; give 1 or more')
        if self.channels not in (1, 3):
            raise InputError(f'data.channels is {self.channels}; give 3 for RGB or 1 for gray')
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != self.channels:
                raise InputError(f'data.{name} has {len(getattr(self, name))} values for data.channels {self.channels}')
        if min(self.std) <= 0:
            raise InputError(f'data.std {list(self.std)} holds a value that is not above 0')
        if not 0 < self.crop_pct <= 1:
            raise InputError(f'data.crop_pct is {self.crop_pct}; give a share in (0, 1]')

    @property
    def mode(self) -> str:
        """Pillow's mode of the images."""
        return 'RGB' if self.channels == 3 else 'L'

    @property
    def streams(self) -> bool:
        """Whether the source is read in order rather than by index."""
        return self.name.startswith(_STREAMS)


class ArrayImages(Dataset[tuple[Any, int]]):
    """Images held in memory.

    Args:
        images: uint8 [N, H, W].
        labels: Integers [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mode: str) -> None:
        self.images = images
        self.labels = labels
        self.mode = mode
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def make_dataset(config: DataConfig, split: str, training: bool) -> Dataset | IterableDataset:
    """Open one split as timm does: (PIL image, label) pairs, with an attribute `transform` to set.

    Args:
        config: The source.
        split: `train`, `validation` or a name that the source knows.
        training: Whether a stream should shuffle and shard for training.

    Raises:
        InputError: There is no such source or split, or it holds no image.
    """
    mode = config.mode
    if config.name == EMBEDDED:
        return ArrayImages(*read_embedded(_idx_split(split)), mode)
    if config.name == FASHION_MNIST:
        if config.root is None:
            raise InputError(
                f'data.name {FASHION_MNIST} needs data.root, for example --data.root /usr/share/datasets/fashion-mnist'
            )
        return ArrayImages(*read_split(config.root, _idx_split(split)), mode)
    return _timm_dataset(config, split, training, mode)


def read_embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [N, 28, 28], and labels, uint8 [N], of the embedded set; `split` is `train` or `test`.

    Raises:
        InputError: The file is not the one that was packaged.
    """
    expected = _EMBEDDED_FILE.with_suffix('.sha256').read_text().split()[0]
    if hashlib.sha256(_EMBEDDED_FILE.read_bytes()).hexdigest() != expected:
        raise InputError(f'{_EMBEDDED_FILE} is damaged: its sha256 is not {expected}; install the package again')
    with np.load(_EMBEDDED_FILE) as arrays:
        return arrays[f'{split}_images'], arrays[f'{split}_labels']


def has_validation(config: DataConfig) -> bool:
    """Whether there are images to validate on apart from those to train on.

    An image folder without sub-folders for its splits has none: timm would open the same images for both.
    """
    if config.val_split is None:
        return False
    if config.name != 'folder' or config.root is None:
        return True
    return _split_folder(Path(config.root), config.val_split) is not None


def _split_folder(root: Path, split: str) -> Path | None:
    names = next((group for group in _SPLIT_FOLDERS if split in group), {split})
    return next((root / name for name in sorted(names) if (root / name).is_dir()), None)


def _idx_split(split: str) -> str:
    names = {'train': 'train', 'training': 'train', 'test': 'test', 'val': 'test', 'validation': 'test'}
    if split not in names:
        raise InputError(f'split {split!r} is not train or validation')
    return names[split]


def _timm_dataset(config: DataConfig, split: str, training: bool, mode: str) -> Dataset | IterableDataset:
    where = f'data.name {config.name}' + (f', data.root {config.root}' if config.root else '') + f', split {split}'
    if config.name == 'folder':
        if config.root is None:
            raise InputError('data.name folder needs data.root, the folder of images')
        if not Path(config.root).exists():
            raise InputError(f'data.root {config.root} does not exist')
        root = Path(config.root)
        others = [name for group in _SPLIT_FOLDERS for name in sorted(group) if (root / name).is_dir()]
        if others and _split_folder(root, split) is None:
            raise InputError(f'{where}: there is no such split; there are {", ".join(others)}')
    if config.name.startswith(('wds/', 'torch/')) and config.root is None:
        raise InputError(f'data.name {config.name} needs data.root')
    num_samples = config.num_samples
    if config.name.startswith('wds/') and 'tar' not in split and '..' not in split and not is_remote(str(config.root)):
        # timm knows patterns and the splits of an _info.json; this is how it takes a list.
        files, lengths, _ = find_shards(str(config.root), split)
        split, num_samples = '::'.join(files), num_samples or sum(lengths or ())
    elif config.name.startswith('wds/') and not is_remote(str(config.root)) and not Path(str(config.root)).is_dir():
        raise InputError(f'data.root {config.root} does not exist')
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
            input_img_mode=mode,
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
