"""Images by index: the embedded set, Fashion-MNIST's own files, folders, Hub data sets, and what timm reads besides."""

import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from slimclr_hub.data import subset
from slimclr_hub.data.config import EMBEDDED, FASHION_MNIST, DataConfig, LabelledDataConfig
from slimclr_hub.data.folders import FolderImages, class_numbers, file_state
from slimclr_hub.data.labels import class_number
from slimclr_hub.data.streams.shards import check_tar, shard_names
from slimclr_hub.data.tables import TableImages
from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.images import read_image, reason
from slimclr_hub.text import GARMENTS

EMBEDDED_FILE = Path(__file__).parent / 'embedded' / 'fashion_mnist_6k.npz'
_IDX_PREFIX = {'train': 'train', 'test': 't10k'}
_TORCHVISION_SUBFOLDER = 'FashionMNIST/raw'
_TRIED = 10  # images, of which one has to be readable
_ANY_LENGTH = 10**9  # of a split, in which places of slices are compared
_SPLIT_FOLDERS = ({'train', 'training'}, {'val', 'valid', 'validation', 'eval', 'evaluation'})  # timm's synonyms


class Images(Protocol):
    """Images by index with their classes, `UNLABELLED` where there is none."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes by their number, if known."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image; exceptions of the decoder pass through."""

    def name(self, index: int) -> str:
        """What messages call an image."""

    def fingerprint(self) -> list[Any]:
        """Number of images, and what changes with them where that is quick to tell."""


@dataclass(eq=False)
class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images in memory, uint8 [N, H, W], with integer labels [N], as PIL images of Pillow's `mode`."""

    images: np.ndarray
    labels: np.ndarray
    mode: str
    class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.labels[index])

    def name(self, index: int) -> str:
        """Number of an image."""
        return f'image {index}'

    def fingerprint(self) -> list[Any]:
        """Number of images, and a hash of them and their labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return [len(self), digest.hexdigest()]


@dataclass(eq=False)
class TarImages(Dataset[tuple[Image.Image, int]]):
    """Images in a tar file, whose folders are the classes, by timm's reader."""

    reader: Any
    mode: str

    def __post_init__(self) -> None:
        self.class_names = sorted(self.reader.class_name_to_idx, key=self.reader.class_name_to_idx.__getitem__)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        return read_image(file.read(), self.mode), int(label)

    def name(self, index: int) -> str:
        """Path in the file."""
        return f'{self.reader.root}/{self.reader.filename(index)}'

    def fingerprint(self) -> list[Any]:
        """Number of images, and size and time of the file."""
        return [len(self), file_state(self.reader.root)]


@dataclass(eq=False)
class TorchImages(Dataset[tuple[Image.Image, int]]):
    """A data set of torchvision."""

    dataset: Any
    mode: str

    def __post_init__(self) -> None:
        classes = getattr(self.dataset, 'classes', None)
        self.class_names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return read_image(image, self.mode), class_number(label)

    def name(self, index: int) -> str:
        """Number of an image."""
        return f'image {index}'

    def fingerprint(self) -> list[Any]:
        """Number of images."""
        return [len(self)]


def make_dataset(config: DataConfig, split: str) -> Images:
    """Open one split of a source that is read by index; of a `LabelledDataConfig` those images that it chooses.

    `split` is `train`, `validation` or a name that the source knows.

    Raises:
        InputError: There is no such source or split, or none of its first images can be read; or a choice among the
            images does not fit them.
    """
    if not isinstance(config, LabelledDataConfig):
        return _open_split(config, split)
    trains, holds_out = split == config.train_split, _holds_out(config)
    if not holds_out and not (trains and config.chosen_by):
        return _open_split(config, split)
    images = _open_split(config, config.train_split)
    labels = _known_labels(images, config)
    indices = np.arange(len(labels))
    if holds_out:
        out = subset.held_out(labels, config.hold_out, config.choice_seed)
        indices = np.setdiff1d(indices, out) if trains else out
    if not trains or not config.chosen_by:
        return subset.ChosenImages(images, indices)
    if config.train_list is not None:
        of_list = subset.by_names([images.name(index) for index in range(len(images))], Path(config.train_list))
        return subset.ChosenImages(images, np.intersect1d(indices, of_list))
    if config.per_class is not None:
        few = subset.by_count(labels[indices], config.per_class, config.choice_seed, images.class_names)
    else:
        assert config.train_share is not None
        few = subset.by_share(labels[indices], config.train_share, config.choice_seed)
    return subset.ChosenImages(images, indices[few])


def _holds_out(config: LabelledDataConfig) -> bool:
    """True if validation images are some of a folder's training images, as it has no split for them."""
    if config.name != 'folder' or config.root is None or config.val_split is None or not config.hold_out:
        return False
    root = Path(config.root)
    return root.is_dir() and split_folder(root, config.val_split) is None


def labels_of(images: Images) -> np.ndarray | None:
    """Classes [N] of all images of a split; None where only reading the images would tell."""
    if isinstance(images, subset.ChosenImages):
        labels = labels_of(images.images)
        return None if labels is None else labels[images.indices]
    if isinstance(images, ArrayImages):
        return images.labels.astype(np.int64)
    if isinstance(images, FolderImages):
        return np.array([label for _, label in images.samples])
    return images.labels() if isinstance(images, TableImages) else None


def _known_labels(images: Images, config: DataConfig) -> np.ndarray:
    labels = labels_of(images)
    if labels is None:
        raise InputError(
            f'data.name {config.name} tells no classes before its images are read, so none can be chosen by class; '
            'give a folder, or a Hub data set by hfds/'
        )
    if labels.min() < 0:
        raise InputError(
            f'data.name {config.name}, data.root {config.root}: an image has no class, and images are to be chosen by '
            'class; let each class have a folder'
        )
    return labels


def _open_split(config: DataConfig, split: str) -> Images:
    if config.name in (EMBEDDED, FASHION_MNIST):
        named = _idx_split(split)
        arrays = read_embedded(named) if config.name == EMBEDDED else read_split(config.required_root(), named)
        return ArrayImages(*arrays, config.mode, GARMENTS)
    where = f'data.name {config.name}' + (f', data.root {config.root}' if config.root else '') + f', split {split}'
    if config.name == 'folder':
        found = _folder(config, split, where)
    elif config.name.startswith('hfds/'):
        found = TableImages(config, split)
    else:
        config.required_root()
        found = TorchImages(open_by_timm(config, split, where), config.mode)
    if not len(found):
        raise InputError(f'{where}: no images found')
    _check_first_images(found, where)
    return found


def known_classes(dataset: Images) -> int | None:
    """Number of classes of a split; 0 where its images have no labels, None where only reading them would tell."""
    if isinstance(dataset, subset.ChosenImages):
        return known_classes(dataset.images)
    if isinstance(dataset, ArrayImages):
        return int(dataset.labels.max()) + 1
    return len(dataset.class_names or ()) if isinstance(dataset, FolderImages) else None


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
    """True if there are validation images, and none of them are the training images."""
    if config.val_split is None:
        return False
    if config.name == 'folder':
        if config.root is None:
            return True
        if isinstance(config, LabelledDataConfig) and _holds_out(config):
            return True
        root = Path(config.root)
        val, train = split_folder(root, config.val_split), split_folder(root, config.train_split) or root
        return val is not None and not val.resolve().is_relative_to(train.resolve())
    if config.name.startswith('wds/') and config.root is not None:
        held_out = shard_names(config.root, config.val_split)
        return bool(held_out) and set(held_out).isdisjoint(shard_names(config.root, config.train_split))
    if config.name in (EMBEDDED, FASHION_MNIST):
        return _idx_split(config.val_split) != _idx_split(config.train_split)
    if config.name.startswith('torch/'):
        return _synonyms(config.val_split) != _synonyms(config.train_split)
    return not _overlap(config.train_split, config.val_split)


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


def split_folder(root: Path, split: str) -> Path | None:
    """Folder of a split, by its name or one of the usual others for it; None if there is none."""
    return next((root / name for name in sorted(_synonyms(split)) if (root / name).is_dir()), None)


def _synonyms(split: str) -> set[str]:
    return next((group for group in _SPLIT_FOLDERS if split in group), {split})


def _overlap(train: str, val: str) -> bool:
    """True if two splits, such as `train[:90%]` and `train[90%:]`, share images."""
    sliced = [dict(re.findall(r'([^+\[\]]+)(\[[^\]]*\])?', spec.replace(' ', ''))) for spec in (train, val)]
    shared = sliced[0].keys() & sliced[1].keys()
    if any(not each[name] for name in shared for each in sliced):
        return True
    if not shared:
        return False
    from datasets import ReadInstruction

    lengths = dict.fromkeys(sliced[0].keys() | sliced[1].keys(), _ANY_LENGTH)
    try:
        parts = [ReadInstruction.from_spec(spec).to_absolute(lengths) for spec in (train, val)]
    except (ValueError, AssertionError):
        return False  # whatever opens them says what is wrong
    return any(
        a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to) for a in parts[0] for b in parts[1]
    )


def _idx_split(split: str) -> str:
    names = {'train': 'train', 'training': 'train', 'test': 'test', 'val': 'test', 'validation': 'test'}
    if split not in names:
        raise InputError(f'split {split!r} is not train or validation')
    return names[split]


def _folder(config: DataConfig, split: str, where: str) -> Images:
    root = Path(config.required_root())
    if not root.exists():
        raise InputError(f'data.root {root} does not exist')
    if not root.is_dir():
        check_tar(root)
        return TarImages(open_by_timm(config, split, where).reader, config.mode)
    others = [name for group in _SPLIT_FOLDERS for name in sorted(group) if (root / name).is_dir()]
    own = split_folder(root, split)
    if others and own is None:
        raise InputError(f'{where}: there is no such split; there are {", ".join(others)}')
    # Classes are numbered by the training images, also where another split lacks some.
    train = split_folder(root, config.train_split)
    numbers = class_numbers(train) if train is not None and split != config.train_split else None
    return FolderImages(own or root, config.mode, numbers)


def open_by_timm(config: DataConfig, split: str, where: str, training: bool = False) -> Any:
    """Open what timm reads; `training` has it shuffle a stream."""
    keys: dict[str, Any] = {}
    if config.name.startswith('tfds/'):
        keys = {'input_key': config.image_key, 'target_key': config.label_key}
    try:
        return create_dataset(
            '' if config.name == 'folder' else config.name,
            root=config.root,
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            num_samples=config.num_samples,
            input_img_mode=config.mode,
            **keys,
        )
    except ImportError as error:
        raise InputError(
            f'{where}: {error}; pip install "slimclr-hub[train]" brings what timm reads it with'
        ) from error
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError) as error:
        raise InputError(f'{where}: {reason(error) if str(error) else "not found"}') from error


def _check_first_images(images: Images, where: str) -> None:
    # A source whose images are of another kind would otherwise come to light in a worker, in the middle of an epoch.
    problems = []
    for index in range(min(_TRIED, len(images))):
        try:
            images[index]
        except Exception as error:  # decoders raise whatever occurs to them
            problems.append(f'{images.name(index)} ({reason(error)})')
        else:
            return
    raise InputError(f'{where}: the first {len(problems)} images cannot be read, as {problems[0]}')
