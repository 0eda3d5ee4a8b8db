"""Loaders: options of torch's workers, the evaluation loader, and copies to the device."""

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from slimclr_hub.data.batches import CorruptImages, on_one_line
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.labels import UNREADABLE
from slimclr_hub.data.sources import Images, make_dataset, open_by_timm
from slimclr_hub.data.streams.shards import Raw, Shards, open_shards
from slimclr_hub.data.streams.stream import TimmOrder
from slimclr_hub.errors import InputError
from slimclr_hub.images import CentreFirst, Problem, read_image, reason

_EVAL_BATCH = 128


def loader_options(config: DataConfig, seed: int) -> dict[str, Any]:
    """Return arguments of torch's loader that decide how its workers run."""
    return {
        'num_workers': config.num_workers,
        'persistent_workers': config.num_workers > 0,
        # Of their own, so that seeding workers draws nothing from the global one, which shuffles keys.
        'generator': torch.Generator().manual_seed(seed),
        'pin_memory': torch.cuda.is_available(),
        'worker_init_fn': prepare_worker,
    }


def prepare_worker(worker: int) -> None:
    """Ignore signals that ask the training process to stop, and end where a batch cannot be handed over to it.

    It needs batches until it has stopped. Signals of a scheduler, a launcher, a terminal and the keyboard reach
    workers, too. SIGTERM is obeyed if that process sends it. A batch that finds no room in the shared memory would be
    lost otherwise, and waited for without an end.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_without_room)  # type: ignore[attr-defined]
    for number in signal.SIGUSR1, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where a worker ends with the first SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_without_room(error: Exception, batch: Any) -> None:
    os._exit(os.EX_IOERR)


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        continue
    os._exit(0)


_Item = tuple[torch.Tensor | None, int, Problem | None]
_Batch = tuple[torch.Tensor, torch.Tensor, list[Problem]]


class EvalLoader:
    """Batches of (centre crops [b, C, H, W], labels [b]).

    An image that cannot be read is of zeros, and its label is `UNREADABLE`, so that the processes' parts of a batch
    stay equal; `readable` leaves it out.

    Args:
        loader: Loader of batches and of the problems met on the way.
        source: Where the images come from: fingerprint and names of the classes.
        total: Images in all batches of all processes, as far as a stream tells.
        batch_size: Images of a batch, over all processes.
        corrupt: Counts those that cannot be read.
    """

    def __init__(
        self, loader: Any, source: 'Images | EvalStream', total: int, batch_size: int, corrupt: CorruptImages
    ) -> None:
        self._loader = loader
        self.batch_size = batch_size
        self.source = source
        self.total = total
        self.corrupt = corrupt

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels, problems in on_one_line(self._loader):
            self.corrupt.add(problems)
            yield images, labels

    def readable(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches without the images that cannot be read."""
        for images, labels in self:
            kept = labels != UNREADABLE
            if kept.any():
                yield images[kept], labels[kept]

    def prepared(self, accelerator: Any) -> 'EvalLoader':
        """The same batches, divided over the processes of an accelerator and on its device.

        Raises:
            InputError: They are of a stream, and there are several processes.
        """
        if isinstance(self.source, EvalStream) and accelerator.num_processes > 1:
            raise InputError(
                f'{self.source.name}: a stream does not come in equal parts for several processes, and evaluation has '
                'to see each image once; run one process'
            )
        loader = accelerator.prepare_data_loader(self._loader)
        return EvalLoader(loader, self.source, self.total, self.batch_size, self.corrupt)


def eval_loader(
    config: DataConfig,
    split: str,
    at_most: int | None,
    seed: int,
    processes: int = 1,
    share: tuple[int, int] = (0, 1),
    corrupt: CorruptImages | None = None,
    alter: Callable[[Image.Image], Image.Image] | None = None,
    images: Images | None = None,
) -> EvalLoader:
    """Load (centre crop, label) in batches of all processes; of more images than `at_most`, a fixed random choice.

    Args:
        config: The images.
        split: The split.
        at_most: Images to load at most; a stream has all.
        seed: Seed of the choice.
        processes: Processes over which a batch will be divided.
        share: (r, P) for the r-th of P shares of the images, for batches that will not be.
        corrupt: Counts the images that cannot be read; a count of its own unless given.
        alter: Changes the crops before they are normalised.
        images: The images of the split, where they are open already.

    Raises:
        InputError: There is no such source or split, or it is a stream and is to be divided.
    """
    steps = create_transform(
        (config.channels, config.size, config.size),
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation='bilinear',
    )
    if alter is not None:
        tensors = next(i for i, step in enumerate(steps.transforms) if isinstance(step, MaybeToTensor))
        steps.transforms.insert(tensors, alter)
    transform = CentreFirst(steps)
    source: Images | EvalStream
    dataset: Dataset[_Item]
    if config.streams:
        if share[1] > 1:
            raise InputError(f'data.name {config.name} is a stream, which does not divide; run it on one process')
        dataset = source = EvalStream(config, split, transform)
        total = source.total
    else:
        source = make_dataset(config, split) if images is None else images
        total = len(source)
        chosen = np.arange(total)
        if at_most is not None and total > at_most:
            total = at_most
            chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:at_most])
        dataset = EvalImages(source, transform, chosen[share[0] :: share[1]])
    batch_size = min(max(config.batch_size // processes, 1), _EVAL_BATCH) * processes
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=partial(_collate, (config.channels, config.size, config.size)),
        # Most pass over the images once; workers that outlive it would hold memory until the process ends.
        **loader_options(config, seed) | {'persistent_workers': False},
    )
    return EvalLoader(loader, source, total, batch_size, corrupt or CorruptImages(config.max_corrupt, 'left out'))


@dataclass(eq=False)
class EvalImages(Dataset[_Item]):
    """Transformed images of the given indices; one that cannot be read has the problem in its place."""

    source: Images
    transform: Callable[[Any], torch.Tensor]
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = int(self.indices[position])
        try:
            image, label = self.source[index]
            return self.transform(image), label, None
        except Exception as error:  # decoders raise whatever occurs to them: SyntaxError, struct.error, MemoryError
            return None, UNREADABLE, (self.source.name(index), reason(error))


class EvalStream(IterableDataset[_Item]):
    """Transformed images of a stream, each once, as `EvalImages` has them; workers take turns in the shards.

    Attributes:
        name: Words for it.
        total: Number of images, as far as the stream tells, or `data.num_samples`.
        class_names: Names of the classes by their number, if known.
    """

    def __init__(self, config: DataConfig, split: str, transform: Callable[[Any], torch.Tensor]) -> None:
        self.transform = transform
        self.mode = config.mode
        self.name = where = f'data.name {config.name}, split {split}'
        if config.name.startswith('tfds/'):
            dataset = open_by_timm(config, split, where)
            # timm divides it over workers by itself.
            self.read: Callable[[int, int], Iterator[Raw]] = partial(_by_timm, dataset)
            total: int | None = dataset.reader.num_samples
            self.class_names: Sequence[str] | None = None
        else:
            shards = open_shards(config, split)
            self.read = partial(_every, shards)
            total = shards.total if shards.lengths is None else sum(shards.lengths)
            self.class_names = shards.class_names
        if total is None:
            raise InputError(f'{where}: a stream of unknown length needs data.num_samples')
        self.total = total

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        for raw in self.read(*((0, 1) if info is None else (info.id, info.num_workers))):
            try:
                item = self.transform(read_image(raw.load(), self.mode)), raw.label, None
            except Exception as error:  # as above
                yield None, UNREADABLE, (raw.name, reason(error))
            else:
                yield item

    def fingerprint(self) -> list[Any]:
        """Number of images."""
        return [self.total]


def _every(shards: Shards, worker: int, workers: int) -> Iterator[Raw]:
    for shard in range(worker, len(shards.names), workers):
        yield from shards.read(shard)


def _by_timm(dataset: Any, worker: int, workers: int) -> Iterator[Raw]:
    yield from (raw for _, raw in TimmOrder(dataset, 0)(0, worker))


def _collate(shape: tuple[int, ...], items: Sequence[_Item]) -> _Batch:
    images = torch.stack([torch.zeros(shape) if image is None else image for image, _, _ in items])
    labels = torch.tensor([label for _, label, _ in items], dtype=torch.int64)
    return images, labels, [problem for _, _, problem in items if problem is not None]


class ToDevice:
    """Copy tensors to a device asynchronously, on a CUDA stream that does not wait for the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def __call__(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the device, ready for kernels queued from here on; copies of pageable memory block."""
        if self.stream is None:
            return self._copies(tensors)
        with torch.cuda.stream(self.stream):
            placed = self._copies(tensors)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in placed:
            # Their memory is of the copying stream, which would write the next batch to it once they are dropped.
            tensor.record_stream(current)
        return placed

    def _copies(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
