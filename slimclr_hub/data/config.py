"""Configuration of training and evaluation images."""

from dataclasses import dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.settings import Incidental, at_least, at_most, check_fraction, plain

EMBEDDED = 'fashion-mnist-6k'
FASHION_MNIST = 'fashion-mnist'
_TIMM_KINDS = ('folder', 'hfds/', 'hfids/', 'wds/', 'tfds/', 'torch/')
_STREAMS = ('hfids/', 'wds/', 'tfds/')
WITH_KEYS = ('hfds/', *_STREAMS)
"""Beginnings of the names of sources with columns, or fields, of images and labels."""


@dataclass(frozen=True)
class ImagesConfig:
    """The images, and what a network sees of them.

    Args:
        name: `fashion-mnist-6k` (ships with the package), `fashion-mnist` (its IDX files in `root`), `folder` (an image
            folder or tar in `root`), or a name of timm's: `hfds/USER/NAME` (Hub data set), `hfids/USER/NAME`
            (streamed), `wds/` (webdataset shards in `root`), `torch/cifar10`.
        train_split: Split to train on; for webdataset, the pattern of its shards.
        val_split: Split to evaluate on; null for none.
        size: Height and width in pixels of the images that the network is made for and evaluated on.
        channels: 3 for RGB, 1 for gray.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        crop_pct: Fraction of the image that evaluation crops from its centre.
        num_samples: Images an epoch, where a stream does not know its own length.
        image_key: Name of a Hub data set's column of images, or ending of a shard's members; found where null.
        label_key: Name of a Hub data set's column of labels, or field of a shard's json; found where null.
    """

    name: str = EMBEDDED
    train_split: str = 'train'
    val_split: str | None = 'validation'
    size: int = 28
    channels: int = 1
    mean: tuple[float, ...] = (0.286,)
    std: tuple[float, ...] = (0.353,)
    crop_pct: float = 1.0
    num_samples: int | None = None
    image_key: str | None = None
    label_key: str | None = None

    def __post_init__(self) -> None:
        if self.name not in (EMBEDDED, FASHION_MNIST) and not self.name.startswith(_TIMM_KINDS):
            raise InputError(
                f'data.name {self.name!r} is not {EMBEDDED}, {FASHION_MNIST} or one that begins with '
                f'{", ".join(_TIMM_KINDS)}'
            )
        at_least('data.size', self.size, 2)
        at_most('data.size', self.size, MAX_IMAGE_SIZE)
        if self.num_samples is not None:
            at_least('data.num_samples', self.num_samples, 1)
        if self.channels not in (1, 3):
            raise InputError(f'data.channels is {self.channels}; give 3 for RGB or 1 for gray')
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != self.channels:
                raise InputError(f'data.{name} has {len(getattr(self, name))} values for data.channels {self.channels}')
        if not all(0 < value < inf for value in self.std):
            raise InputError(f'data.std {list(self.std)} holds a value that is not above 0')
        if not all(map(isfinite, self.mean)):
            raise InputError(f'data.mean {list(self.mean)} holds a value that is no number')
        if not 0 < self.crop_pct <= 1:
            raise InputError(f'data.crop_pct is {self.crop_pct}; give a fraction in (0, 1]')

    @property
    def mode(self) -> str:
        """Pillow's mode of the images."""
        return 'RGB' if self.channels == 3 else 'L'

    @property
    def streams(self) -> bool:
        """True if the source is read in order rather than by index."""
        return self.name.startswith(_STREAMS)


@dataclass(frozen=True)
class LoaderConfig(Incidental):
    """Loading of the images.

    Args:
        root: Folder of the data set, where the name needs one.
        num_workers: Worker processes that load and augment, on each process; a stream is divided over them.
        download: Let torchvision download its data set into `root`.
        max_corrupt: Distinct unreadable images that each process may replace, or leave out of evaluation, before it
            stops.
        timeout: Seconds to wait for a batch in training; then the run ends with its state saved.
    """

    root: str | None = None
    num_workers: int = 2
    download: bool = False
    max_corrupt: int = 100
    timeout: int = 600

    def __post_init__(self) -> None:
        at_least('data.num_workers', self.num_workers, 0)
        at_least('data.max_corrupt', self.max_corrupt, 0)
        at_least('data.timeout', self.timeout, 1)


@dataclass(frozen=True)
class DataConfig(LoaderConfig, ImagesConfig):
    """Images to train and evaluate on, and the batches of training.

    Args:
        batch_size: Images of an optimizer step over all processes.
        shuffle_buffer: Encoded images that each worker holds to shuffle a stream for training; 0 or 1 disables it.
    """

    batch_size: int = 128
    shuffle_buffer: int = 2048

    def __post_init__(self) -> None:
        ImagesConfig.__post_init__(self)
        LoaderConfig.__post_init__(self)
        at_least('data.batch_size', self.batch_size, 2)
        at_least('data.shuffle_buffer', self.shuffle_buffer, 0)
        if self.root is not None and self.name == EMBEDDED:
            raise InputError(
                f'data.root {self.root}: data.name {EMBEDDED} ships with the package and takes no folder; for images '
                'of your own give --data.name folder, too'
            )

    def required_root(self) -> str:
        """Return `root`; raise an InputError if it is not given."""
        if self.root is None:
            hint = {
                FASHION_MNIST: ', for example --data.root /usr/share/datasets/fashion-mnist',
                'folder': ', the folder of images',
            }
            raise InputError(f'data.name {self.name} needs data.root{hint.get(self.name, "")}')
        return self.root

    @property
    def look(self) -> dict[str, Any]:
        """What a network's folder says of the images that it takes."""
        return {name: getattr(self, name) for name in ('size', 'mean', 'std', 'crop_pct')}

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the images of an evaluation, as JSON has it.

        A run may be resumed where its `root` has moved to, but an evaluation of one folder is none of another.
        """
        return {name: plain(getattr(self, name)) for name in ('root', *(field.name for field in fields(ImagesConfig)))}


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Images with classes, and a choice among those that train a classifier; other arguments are `DataConfig`'s.

    Args:
        train_share: Share of the training images of each class to train on, at least one of each; all where null.
        per_class: Training images of each class to train on; all where null.
        train_list: File with the names of the training images to train on, one a line, such as `1percent.txt` and
            `10percent.txt` of SimCLR's repository for ImageNet; all where null.
        hold_out: Share of each class that is held out for validation, of a folder that has no such split.
        choice_seed: Seed of these choices.
    """

    train_share: float | None = None
    per_class: int | None = None
    train_list: str | None = None
    hold_out: float = 0.2
    choice_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_share is not None and not 0 < self.train_share <= 1:
            raise InputError(f'data.train_share is {self.train_share}; give a share in (0, 1]')
        if self.per_class is not None:
            at_least('data.per_class', self.per_class, 1)
        check_fraction('data.hold_out', self.hold_out)
        at_least('data.choice_seed', self.choice_seed, 0)
        if len(self.chosen_by) > 1:
            raise InputError(f'{" and ".join(self.chosen_by)} each choose training images; give one of them')
        if self.chosen_by and self.streams:
            raise InputError(f'{self.chosen_by[0]} chooses images by index, and data.name {self.name} is a stream')

    @property
    def choice(self) -> str | None:
        """Words for the training images that are chosen; None for all."""
        if self.train_share is not None:
            return f'{100 * self.train_share:g} % of the labels'
        if self.per_class is not None:
            return f'{self.per_class} labels a class'
        return None if self.train_list is None else f'the labels of {Path(self.train_list).name}'

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """The settings that choose training images."""
        names = ('train_share', 'per_class', 'train_list')
        return tuple(f'data.{name}' for name in names if getattr(self, name) is not None)
