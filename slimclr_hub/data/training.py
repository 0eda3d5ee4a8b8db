"""Training batches of one process, from any source, on its device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from slimclr_hub.data.batches import Batch, CorruptImages
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.indexed import EpochBatches, IndexedFeed, IndexedImages, Known
from slimclr_hub.data.loaders import ToDevice, loader_options
from slimclr_hub.data.sources import Images, known_classes, make_dataset, open_by_timm
from slimclr_hub.data.streams.shards import Shards, open_shards
from slimclr_hub.data.streams.stream import Layout, OneWayFeed, Order, ShardOrder, StreamedChunks, StreamFeed, TimmOrder
from slimclr_hub.data.views import Normalize, SingleImageTransform, ViewConfig, Views, make_crop, make_view
from slimclr_hub.errors import DataError, InputError

_logger = logging.getLogger(__name__)
Feed = IndexedFeed | StreamFeed | OneWayFeed
Position = dict[str, Any] | None
_LEAST_IMAGES = 2  # of a process in a microbatch: batch normalisation of a single image is degenerate


class TrainData:
    """Training images of this process.

    An optimizer step takes `config.batch_size` images over all processes, in `microbatches` that are divided over the
    processes. All randomness follows from the seed, the epoch and the index of an image, so that an epoch can be
    entered at any step. Each image has `view_count` views, 1 or 2; the second is drawn from `second_views`, or from
    `views` where that is None. With a transform in the place of `views`, which makes uint8 tensors [C, H, W] of PIL
    images and draws from torch's global generator, there is one. Batches lie on `device`. With `num_classes`, which
    messages call `classes_key`, every image has a label below it. `images` are those of the split, where they are open
    already.

    Raises:
        InputError: There is no such source, or the batch does not fit the data, the processes or the microbatches; or
            the source is known to have no labels, or more classes.
    """

    def __init__(
        self,
        config: DataConfig,
        views: ViewConfig | Callable[[Any], torch.Tensor],
        second_views: ViewConfig | None = None,
        *,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        microbatches: int = 1,
        view_count: int = 2,
        device: torch.device | str = 'cpu',
        num_classes: int | None = None,
        classes_key: str = 'method.num_classes',
        images: Images | None = None,
    ) -> None:
        _check_batch(config.batch_size, processes, microbatches)
        if view_count not in (1, 2):
            raise InputError(f'view_count is {view_count}; give 1 or 2')
        self.seed = seed
        self.processes = processes
        self.rank = rank
        self.microbatches = microbatches
        self.workers = max(1, config.num_workers)
        self.size = config.batch_size // microbatches // processes
        self.corrupt = CorruptImages(config.max_corrupt)
        self.num_classes, self.classes_key, self.name = num_classes, classes_key, config.name
        self.to_device = ToDevice(torch.device(device))
        self.normalize = Normalize(config.mean, config.std, self.to_device.device)
        self.augment, self.distributions = None, []
        if isinstance(views, ViewConfig):
            self.distributions = [views, second_views or views][:view_count]
            self.augment = _device_augmentation() if views.backend == 'kornia' else None
            transform = Views(*(self._transform(each, each.size or config.size) for each in self.distributions))
        else:
            transform = Views(views)
        if config.streams:
            self.feed, length = self._stream_feed(config, transform)
        else:
            dataset = make_dataset(config, config.train_split) if images is None else images
            self.feed, length = self._indexed_feed(config, dataset, transform)
        self.notes: tuple[str, ...] = self.feed.notes  # sentences that a user must read before training starts
        self.steps_per_epoch = length // config.batch_size

    def know(self, known: Known) -> None:
        """Let images by index come with what a teacher knows of them; once, before the first epoch.

        Views of a neighbour follow those of its image.
        """
        assert isinstance(self.feed, IndexedFeed)
        self.feed.images.known = known
        if known.neighbours is not None:
            self.distributions *= 2

    def epoch(self, epoch: int, start: int = 0, position: Position = None) -> Iterator[Batch]:
        """Yield microbatches of an epoch from optimizer step `start` on, both counted from 0; a stream may end early.

        `position` is that after the last batch before `start`.

        Raises:
            DataError: Too many images cannot be read, a stream is damaged, or a label is not one of the classes.
            InputError: The position is not one of this run.
        """
        micro, end = start * self.microbatches, self.steps_per_epoch * self.microbatches
        if micro >= end:
            return
        for chunk, after in self.feed.chunks(epoch, micro, position):
            self.corrupt.add(chunk['problems'])
            # Smaller ones only report unreadable images.
            if len(chunk['labels']) < self.size:
                continue
            self._check_labels(chunk['labels'])
            labels, *tensors = self.to_device((chunk['labels'], *chunk['features'], *chunk['views']))
            features, views = tensors[: len(chunk['features'])], tensors[len(chunk['features']) :]
            corrupt = tuple(name for name, _ in chunk['problems'])
            yield Batch(self._views(views, epoch, micro), labels, after, corrupt, tuple(features))
            micro += 1
            if micro == end:
                return
        # The joined remainders of workers, and their shares for several processes, may be short of a batch.
        if (end - micro - 1) * self.size > len(self.corrupt.reasons) + self.workers:
            _logger.warning(
                'epoch %d ended after %d of %d batches: the shards hold fewer images than were announced; fetch those '
                'that are incomplete, or correct data.num_samples',
                epoch + 1,
                micro,
                end,
            )

    def _check_labels(self, labels: torch.Tensor) -> None:
        # Before they go to the device, where an index beyond the classes would end in an assertion of its kernel.
        if self.num_classes is None:
            return
        least, most = labels.min().item(), labels.max().item()
        if least < 0:
            raise DataError(f'data.name {self.name}: an image has no label, and each needs one; leave it out')
        if most >= self.num_classes:
            raise DataError(
                f'data.name {self.name}: an image has class {most}, and there are {self.num_classes}; give '
                f'--{self.classes_key} {most + 1} or more'
            )

    def _views(self, views: Sequence[torch.Tensor], epoch: int, micro: int) -> tuple[torch.Tensor, ...]:
        if self.augment is not None:
            numbers = (self.seed, epoch, *divmod(micro, self.microbatches), self.rank)
            pairs = zip(views, self.distributions, strict=True)
            views = [self.augment(crops, config, *numbers, i) for i, (crops, config) in enumerate(pairs)]
        return tuple(map(self.normalize, views))

    def _transform(self, views: ViewConfig, size: int) -> SingleImageTransform:
        channels = len(self.normalize.mean)
        return SingleImageTransform(make_crop(views, size) if self.augment else make_view(views, size, channels))

    def _layout(self, config: DataConfig, length: int) -> Layout:
        if config.batch_size > length:
            raise InputError(f'data.batch_size {config.batch_size} is larger than the data set of {length} images')
        batches = length // config.batch_size * self.microbatches
        return Layout(self.processes, self.workers, self.size, batches)

    def _indexed_feed(self, config: DataConfig, dataset: Images, transform: Views) -> tuple[Feed, int]:
        length, classes = len(dataset), known_classes(dataset)
        if self.num_classes is not None and classes == 0:
            raise InputError(
                f'data.name {config.name}: images have no labels; let each class have a folder, or train from images '
                'alone, as by --method.name simclr'
            )
        if self.num_classes is not None and classes is not None and classes > self.num_classes:
            raise InputError(
                f'data.name {config.name}: images have {classes} classes, and {self.classes_key} is '
                f'{self.num_classes}; give --{self.classes_key} {classes}'
            )
        images = IndexedImages(dataset, transform, self.seed, config.max_corrupt)
        count = self._layout(config, length).batches
        batches = EpochBatches(length, self.seed, self.size, self.processes, self.rank, count)
        return IndexedFeed(images, batches, loader_options(config, self.seed)), length

    def _stream_feed(self, config: DataConfig, transform: Views) -> tuple[Feed, int]:
        order: Order
        notes: tuple[str, ...] = ()
        facts: dict[str, int] = {}
        if config.name.startswith('tfds/'):
            where = f'data.name {config.name}, split {config.train_split}'
            dataset = open_by_timm(config, config.train_split, where, training=True)
            dataset.set_loader_cfg(num_workers=config.num_workers)
            length = dataset.reader.num_samples
            layout = self._layout(config, length)
            order = TimmOrder(dataset, self.rank)
        else:
            shards = open_shards(config, config.train_split)
            length = _stream_length(config, shards)
            layout = self._layout(config, length)
            order = ShardOrder(shards, layout, self.rank, self.seed, config.shuffle_buffer)
            facts = {'shards': len(shards.names), 'shuffle_buffer': config.shuffle_buffer}
            if shards.lengths is None and self.processes > 1:
                notes = (
                    f'data.name {config.name}: the lengths of the {len(shards.names)} shards are unknown, so each of '
                    f'{self.processes} processes reads all of them and uses its part; an _info.json, or Parquet files, '
                    'would spare that.',
                )
        chunks = StreamedChunks(order, transform, layout, self.seed, config.mode, config.max_corrupt)
        feed = StreamFeed(chunks, loader_options(config, self.seed), notes, facts)
        return (feed if facts else OneWayFeed(feed, config.name)), length


def _stream_length(config: DataConfig, shards: Shards) -> int:
    announced = shards.total
    if shards.lengths is None:
        if announced is None:
            raise InputError(f'data.name {config.name}: a stream of unknown length needs data.num_samples')
        return announced
    length = sum(shards.lengths)
    if announced is not None and announced > length:
        by = 'data.num_samples' if config.num_samples is not None else f'data.train_split {config.train_split}'
        raise InputError(
            f'{by} announces {announced} images, and the shards hold {length}; fetch those that are incomplete, or '
            f'give data.num_samples {length}'
        )
    return length if announced is None else announced


def _device_augmentation() -> Callable[..., torch.Tensor]:
    try:
        from slimclr_hub.data.device_views import make_views
    except ImportError as error:
        raise InputError(
            f'views.backend kornia: {error}; pip install "slimclr-hub[gpu]" brings it, or take views.backend cpu'
        ) from error
    return make_views


def _check_batch(batch: int, processes: int, microbatches: int) -> None:
    if processes < 1 or microbatches < 1:
        raise InputError(f'there are {processes} processes and {microbatches} microbatches; give 1 or more of both')
    shares = processes * microbatches
    least = _LEAST_IMAGES * shares
    if batch % shares or batch < least:
        nearest = max(round(batch / shares) * shares, least)
        what = 'does not divide over' if batch % shares else f'leaves fewer than {_LEAST_IMAGES} images to each of'
        raise InputError(
            f'data.batch_size {batch} {what} {processes} processes x {microbatches} microbatches; the nearest '
            f'that fits is {nearest}'
        )
