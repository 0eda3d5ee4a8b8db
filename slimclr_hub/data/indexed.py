"""Training images by index: every epoch has its own order, which arithmetic divides over microbatches and processes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from slimclr_hub.data.batches import Chunk, Sample, make_chunk, on_one_line
from slimclr_hub.data.seeding import drawing, permutation
from slimclr_hub.data.sources import Images
from slimclr_hub.errors import DataError
from slimclr_hub.images import Problem, reason

Key = tuple[int, int]
_REPLACEMENT, _NEIGHBOUR = 1, 2  # keep the draws of a replacement and of a neighbour apart from those of the views


@dataclass(frozen=True)
class Known:
    """What a teacher knows of N training images.

    Args:
        features: Its pooled features [N, F], which come with the images; None where they do not.
        neighbours: The k nearest other images of each [N, k], of which one comes with it; None where none does.
    """

    features: np.ndarray | None = None
    neighbours: np.ndarray | None = None


@dataclass(eq=False)
class EpochBatches(Sampler[list[Key]]):
    """(epoch, index) of this process's images of each microbatch, from microbatch `start` of epoch `epoch` on.

    Process r takes the r-th contiguous slice of images order[k * m : (k + 1) * m] of microbatch k, where m is the size
    of a microbatch over all processes, P * `size`. Epochs of `count` microbatches follow each other without an end, so
    that workers read ahead; `ahead=False` ends with the epoch, for benchmarks whose cases take turns.
    """

    length: int
    seed: int
    size: int
    processes: int
    rank: int
    count: int
    ahead: bool = True
    epoch: int = 0
    start: int = 0

    def __iter__(self) -> Iterator[list[Key]]:
        start = self.start
        for epoch in itertools.count(self.epoch) if self.ahead else (self.epoch,):
            order = permutation(self.length, self.seed, epoch)
            for k in range(start, self.count):
                first = (k * self.processes + self.rank) * self.size
                yield [(epoch, int(index)) for index in order[first : first + self.size]]
            start = 0

    def after(self, epoch: int, k: int) -> tuple[int, int] | None:
        """Return epoch and number of the microbatch after the `k`-th of an epoch, or None at the end."""
        if k + 1 < self.count:
            return epoch, k + 1
        return (epoch + 1, 0) if self.ahead else None


@dataclass(eq=False)
class IndexedImages(Dataset[tuple[Sample | None, list[Problem]]]):
    """Samples by (epoch, index); an unreadable image is replaced by another one of the data set.

    Replacement, neighbour and views follow from the seed, the epoch and the index; `transform` draws from torch's
    global generator. For one index, `max_corrupt` unreadable images are tolerated. An image whose neighbours cannot be
    read is its own.
    """

    dataset: Images
    transform: Callable[[Any], tuple[torch.Tensor, ...]]
    seed: int
    max_corrupt: int
    known: Known = Known()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Sample | None, list[Problem]]:
        """Return the sample, or None where too many in a row are unreadable; and the unreadable images."""
        epoch, index = key
        problems: list[Problem] = []
        found = self._read(self._candidates(epoch, index), problems)
        if found is None:
            return None, problems
        chosen, image, label = found
        with drawing(self.seed, epoch, index):
            views = self.transform(image)
        shown = [chosen]
        if self.known.neighbours is not None:
            rng = np.random.default_rng((self.seed, epoch, index, _NEIGHBOUR))
            nearest = rng.permutation(self.known.neighbours[chosen])
            found = self._read(map(int, (*nearest, chosen)), problems)
            if found is None:
                return None, problems
            neighbour, image, _ = found
            with drawing(self.seed, epoch, index, _NEIGHBOUR):
                views = (*views, *self.transform(image))
            shown.append(neighbour)
        table = self.known.features
        features = () if table is None else tuple(torch.from_numpy(table[i].copy()) for i in shown)
        return Sample(views, label, features=features), problems

    def _read(self, candidates: Iterable[int], problems: list[Problem]) -> tuple[int, Image.Image, int] | None:
        """Index, image and class of the first one that can be read; None where too many before it cannot."""
        for candidate in candidates:
            try:
                return candidate, *self.dataset[candidate]
            except Exception as error:  # decoders raise whatever occurs to them: SyntaxError, struct.error, MemoryError
                problems.append((self.dataset.name(candidate), reason(error)))
                if len(problems) > self.max_corrupt:
                    break
        return None

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        # Anywhere rather than the next: neighbours are often of one class, and damaged together.
        rng = np.random.default_rng((self.seed, epoch, index, _REPLACEMENT))
        tried = {index}
        while len(tried) < len(self):
            candidate = int(rng.integers(len(self)))
            if candidate not in tried:
                tried.add(candidate)
                yield candidate


def collate(items: list[tuple[Sample | None, list[Problem]]]) -> Chunk:
    """Collect the samples of one microbatch and the problems met on the way."""
    samples = [sample for sample, _ in items if sample is not None]
    return make_chunk(samples, [problem for _, problems in items for problem in problems])


class IndexedFeed:
    """This process's microbatches of a data set by index.

    Workers continue from batch to batch and epoch to epoch as long as the next microbatch is asked for; otherwise they
    restart at the one that is. `options` are arguments of torch's loader.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, images: IndexedImages, batches: EpochBatches, options: dict[str, Any]) -> None:
        self.images, self.batches = images, batches
        self.loader = DataLoader(images, batch_sampler=batches, collate_fn=collate, **options)
        self._running: Iterator[Chunk] = iter(())
        self._next: tuple[int, int] | None = None

    def chunks(self, epoch: int, start: int, position: Any) -> Iterator[tuple[Chunk, None]]:
        """Yield microbatches of an epoch from the `start`-th on; raise a DataError if no image can be read."""
        for k in range(start, self.batches.count):
            chunk = self._take(epoch, k)
            yield chunk, None
            if len(chunk['labels']) < self.batches.size:
                name, why = chunk['problems'][0]
                raise DataError(f'no image of the data set can be read; the first was {name} ({why})')

    def _take(self, epoch: int, k: int) -> Chunk:
        if self._next != (epoch, k):
            self.batches.epoch, self.batches.start = epoch, k
            self._running = on_one_line(self.loader)
        self._next = None  # where the loader stands once it has failed is not known
        chunk = next(self._running)
        self._next = self.batches.after(epoch, k)
        return chunk
