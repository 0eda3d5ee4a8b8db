"""Loaders whose every view depends on nothing but the seed, the epoch and the image's index.

So a run that is resumed sees what it would have seen, with any number of workers and processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from slimclr_hub.data.seeding import drawing
from slimclr_hub.data.sources import DataConfig, make_dataset
from slimclr_hub.data.views import ViewConfig, Views, make_view
from slimclr_hub.errors import InputError

Key = tuple[int, int]
_EVAL_BATCH = 128


class EpochSampler(Sampler[Key]):
    """(epoch, index) of every image, in an order that follows from the seed and the epoch.

    Args:
        length: Images in the data set.
        seed: Seed of all orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


class SeededDataset(Dataset[tuple[Any, int]]):
    """A data set by (epoch, index), whose random transform is seeded for each image.

    Args:
        dataset: (PIL image, label) by index.
        transform: A transform that draws from torch's global generator.
        seed: Seed of all transforms.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any], Any], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        image, label = self.dataset[key[1]]
        with drawing(self.seed, *key):
            return self.transform(image), label


def train_loader(config: DataConfig, views: ViewConfig, seed: int, processes: int) -> tuple[DataLoader, int]:
    """Loader of ((query view, key view), label) for training.

    For a data set by index a batch is that of all processes, for the caller to split; for a stream, which shards itself
    over processes, it is the batch of one. An incomplete last batch is dropped.

    Returns:
        The loader and its steps an epoch.

    Raises:
        InputError: The batch does not divide over the processes, or is larger than the data set.
    """
    if config.batch_size % processes:
        raise InputError(f'data.batch_size {config.batch_size} does not divide over {processes} processes')
    dataset = make_dataset(config, config.train_split, training=True)
    length = len(dataset)  # type: ignore[arg-type]
    if config.batch_size > length:
        raise InputError(f'data.batch_size {config.batch_size} is larger than the data set of {length} images')
    view = make_view(views, views.size or config.size, config.mean, config.std)
    transform = Views(view, view)
    workers = _workers(config, seed)
    if isinstance(dataset, IterableDataset):
        dataset.transform = transform  # type: ignore[attr-defined]
        if hasattr(dataset, 'set_loader_cfg'):
            dataset.set_loader_cfg(num_workers=config.num_workers)
        loader = DataLoader(dataset, batch_size=config.batch_size // processes, drop_last=True, **workers)
    else:
        sampler = EpochSampler(length, seed)
        seeded = SeededDataset(dataset, transform, seed)
        loader = DataLoader(seeded, batch_size=config.batch_size, sampler=sampler, drop_last=True, **workers)
    return loader, length // config.batch_size


def eval_loader(config: DataConfig, split: str, at_most: int | None, seed: int, processes: int = 1) -> DataLoader:
    """Loader of (centre crop, label); where there are more images than `at_most`, a fixed random choice of them.

    A batch is that of all processes, for the caller to split.
    """
    dataset = make_dataset(config, split, training=False)
    dataset.transform = create_transform(  # type: ignore[attr-defined]
        (config.channels, config.size, config.size),
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation='bilinear',
    )
    length = len(dataset)  # type: ignore[arg-type]
    if at_most is not None and length > at_most and not isinstance(dataset, IterableDataset):
        chosen = np.random.default_rng(seed).permutation(length)[:at_most]
        dataset = Subset(dataset, np.sort(chosen).tolist())
    return DataLoader(
        dataset, batch_size=min(config.batch_size // processes, _EVAL_BATCH) * processes, **_workers(config, seed)
    )


def _workers(config: DataConfig, seed: int) -> dict[str, Any]:
    return {
        'num_workers': config.num_workers,
        'persistent_workers': config.num_workers > 0,
        # Of their own, so that seeding workers draws nothing from the global one, which shuffles keys.
        'generator': torch.Generator().manual_seed(seed),
        'pin_memory': torch.cuda.is_available(),
    }
