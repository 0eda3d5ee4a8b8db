"""Training images of a sharded stream: exact shares for workers, and a position from which an epoch is resumed.

Every worker returns its own share of the epoch in microbatches, and workers take turns. A position is the number of
samples used of every share and the worker whose turn it is; from there the same batches follow as without a stop.
"""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slimclr_hub.data.batches import Chunk, Sample, make_chunk, on_one_line
from slimclr_hub.data.labels import class_number
from slimclr_hub.data.seeding import drawing, mixed_seed, permutation
from slimclr_hub.data.streams.shards import Raw, Shards
from slimclr_hub.errors import InputError
from slimclr_hub.images import Problem, read_image, reason

T = TypeVar('T')
Place = tuple[int, ...]
"""Identity of a sample in its epoch, such as its shard and its number in it."""
Order = Callable[[int, int], Iterator[tuple[Place, Raw]]]
"""(epoch, role) -> samples of a worker's share in training order; a place is unique in the epoch."""
Start = tuple[int, int, list[int]]
"""Epoch, role of the first worker, and samples used of each share when workers begin."""


@dataclass(frozen=True)
class Layout:
    """Division of an epoch of a stream; it has to be the same where a run is resumed within an epoch.

    Each process has a share for each of `workers`, and an epoch of `batches` microbatches of `images` images.
    """

    processes: int
    workers: int
    images: int
    batches: int


@dataclass(frozen=True)
class ShardOrder:
    """Order of the samples of shards, divided over the workers of all processes and shuffled by a buffer."""

    shards: Shards
    layout: Layout
    rank: int
    seed: int
    buffer: int

    def __call__(self, epoch: int, role: int) -> Iterator[tuple[Place, Raw]]:
        """Yield samples of a share, shuffled."""
        return _shuffled(self._share(epoch, role), self.buffer, mixed_seed(self.seed, epoch, self.rank, role))

    def _share(self, epoch: int, role: int) -> Iterator[tuple[Place, Raw]]:
        """Yield samples of a share in stored order; over all shares every sample occurs once, but for the last batch.

        With known lengths, an epoch is the beginning of the permuted shards, in whole batches, cut into one range for
        each process and within it into whole microbatches for each worker: a worker reads its own shards, and parts of
        those at its borders. With unknown lengths, shards are divided over the workers, and process r of P takes
        samples r, r + P, ... of them: every process reads all, and their counts differ by at most one sample for each
        worker.
        """
        shards, layout = self.shards, self.layout
        order = permutation(len(shards.names), self.seed, epoch).tolist()
        if shards.lengths is None:
            order = order[role :: layout.workers]
            chosen = range(self.rank, sys.maxsize, layout.processes)
        else:
            each, more = divmod(layout.batches, layout.workers)
            # The first workers take the odd batches, as turns are taken from the first on.
            first = self.rank * layout.batches + role * each + min(role, more)
            chosen = range(first * layout.images, (first + each + (role < more)) * layout.images)
        begin = 0
        for shard in order:
            if not chosen or begin >= chosen.stop:
                return
            announced = None if shards.lengths is None else shards.lengths[shard]
            if announced is not None and begin + announced <= chosen.start:
                begin += announced
                continue
            found = 0
            for raw in shards.read(shard):
                if begin + found >= chosen.stop:
                    return
                if begin + found in chosen:
                    yield (shard, found), raw
                found += 1
            begin += found


def _shuffled(items: Iterator[T], size: int, seed: int) -> Iterator[T]:
    """Yield every item once, drawn from a buffer of `size` items in an order that follows from the seed."""
    if size <= 1:
        yield from items
        return
    rng = random.Random(seed)
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > size:
            i = rng.randrange(size)
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    rng.shuffle(held)
    yield from held


@dataclass(frozen=True)
class TimmOrder:
    """Order of timm's `IterableImageDataset`, which timm itself divides over workers and processes, and decodes."""

    dataset: Any
    rank: int

    def __call__(self, epoch: int, role: int) -> Iterator[tuple[Place, Raw]]:
        """Yield samples of the calling worker."""
        self.dataset.set_epoch(epoch)
        for i, (image, label) in enumerate(self.dataset):
            yield (self.rank, role, i), Raw(f'sample {i}', partial(_itself, image), class_number(label))


@dataclass(eq=False)
class StreamedChunks(IterableDataset[Chunk]):
    """Microbatches of this process's workers, each of its own share.

    `transform` draws from torch's global generator. After `max_corrupt` unreadable images they are reported without
    waiting for a full batch.
    """

    order: Order
    transform: Callable[[Any], tuple[torch.Tensor, ...]]
    layout: Layout
    seed: int
    mode: str
    max_corrupt: int

    def __post_init__(self) -> None:
        # Epoch, role of the first worker, samples used of each share; shared, as workers outlive an epoch.
        self.state = torch.zeros(2 + self.layout.workers, dtype=torch.int64).share_memory_()

    def enter(self, epoch: int, first: int, consumed: list[int]) -> None:
        """Set where the next iteration begins."""
        self.state.copy_(torch.tensor([epoch, first, *consumed]))

    def __iter__(self) -> Iterator[Chunk]:
        # Not a generator itself: what is read here must be what was set when the iteration was asked for.
        info = get_worker_info()
        epoch, first, *consumed = self.state.tolist()
        role = (first + (0 if info is None else info.id)) % len(consumed)
        return self._chunks(epoch, role, consumed[role])

    def _chunks(self, epoch: int, role: int, consumed: int) -> Iterator[Chunk]:
        samples: list[Sample] = []
        problems: list[Problem] = []
        for i, (place, raw) in enumerate(self.order(epoch, role)):
            if i < consumed:
                continue
            try:
                image = read_image(raw.load(), self.mode)
            except Exception as error:  # decoders raise whatever occurs to them: SyntaxError, struct.error, MemoryError
                problems.append((raw.name, reason(error)))
            else:
                with drawing(self.seed, epoch, *place):
                    samples.append(Sample(self.transform(image), raw.label, i + 1))
            if len(samples) == self.layout.images or len(dict(problems)) > self.max_corrupt:
                yield make_chunk(samples, problems, role)
                samples, problems = [], []
        if samples or problems:
            yield make_chunk(samples, problems, role)


class StreamFeed:
    """This process's microbatches of a stream; workers begin the next epoch with the last batch of one.

    A user must read `notes` before training. `facts` are further values that have to be the same where a run is resumed
    within an epoch.
    """

    def __init__(
        self, chunks: StreamedChunks, options: dict[str, Any], notes: tuple[str, ...], facts: dict[str, int]
    ) -> None:
        self.source = chunks
        self.loader: DataLoader[Chunk] = DataLoader(chunks, batch_size=None, collate_fn=_itself, **options)
        self.notes = notes
        self.layout = {**asdict(chunks.layout), **facts}
        self.ahead = self.loader.num_workers > 0
        self._begun: tuple[Start, Iterator[Chunk]] | None = None

    def chunks(self, epoch: int, start: int, position: Any) -> Iterator[tuple[Chunk, dict[str, Any]]]:
        """Yield microbatches of an epoch after a position; the remainders of the workers' shares come last, joined.

        An epoch has at most `batches` of the layout. The last chunk has no samples if only problems are left to report.
        """
        layout = self.source.layout
        number = start
        for chunk, after in self._rest(epoch, *self._begin(start, position)):
            number += len(chunk['labels']) == layout.images
            if number < layout.batches:
                yield chunk, after
                continue
            if self.ahead:
                beginning = (epoch + 1, *self._begin(0, None))
                self._begun = beginning, self._iterate(beginning)
            yield chunk, after
            return

    def _rest(self, epoch: int, first: int, consumed: list[int]) -> Iterator[tuple[Chunk, dict[str, Any]]]:
        layout = self.source.layout
        begun, self._begun = self._begun, None
        beginning = (epoch, first, list(consumed))
        tails: list[Chunk] = []
        problems: list[Problem] = []
        for chunk in begun[1] if begun is not None and begun[0] == beginning else self._iterate(beginning):
            problems += chunk['problems']
            if len(chunk['labels']) == layout.images:
                consumed[chunk['role']] = int(chunk['consumed'][-1])
                first = (chunk['role'] + 1) % layout.workers
                chunk['problems'], problems = problems, []
                yield chunk, self._position(first, consumed)
                continue
            # A share is at its end, or there are too many problems to continue.
            tails.append(chunk)
            if len(dict(problems)) > self.source.max_corrupt:
                break
        else:
            # In the order of shares, since which worker ends first is a matter of time.
            tails.sort(key=lambda tail: tail['role'])
            for chunk in _joined(tails, layout.images, consumed):
                chunk['problems'], problems = problems, []
                yield chunk, self._position(first, consumed)
        if problems:
            yield make_chunk((), problems), self._position(first, consumed)

    def _iterate(self, beginning: Start) -> Iterator[Chunk]:
        self.source.enter(*beginning)
        return on_one_line(iter(self.loader))  # which has workers begin

    def _begin(self, start: int, position: Any) -> tuple[int, list[int]]:
        if position is None:
            if start:
                raise InputError(f'step {start} of an epoch of a stream cannot be entered without a position')
            return 0, [0] * self.source.layout.workers
        for name, value in self.layout.items():
            if position['layout'].get(name) != value:
                raise InputError(
                    f'the run to resume stopped within an epoch of a stream with {name} '
                    f'{position["layout"].get(name)}; it cannot go on there with {value}'
                )
        return position['first'], list(position['consumed'])

    def _position(self, first: int, consumed: list[int]) -> dict[str, Any]:
        return {'first': first, 'consumed': list(consumed), 'layout': self.layout}


def _joined(tails: list[Chunk], size: int, consumed: list[int]) -> Iterator[Chunk]:
    """Join the remainders of several shares to microbatches; counts in `consumed` the samples used of each."""
    tails = [tail for tail in tails if len(tail['labels'])]
    roles = [tail['role'] for tail in tails for _ in tail['labels']]
    if len(roles) < size:
        return
    views = [torch.cat(views) for views in zip(*(tail['views'] for tail in tails), strict=True)]
    labels, used = (torch.cat([tail[key] for tail in tails]) for key in ('labels', 'consumed'))
    for start in range(0, len(roles) - size + 1, size):
        part = slice(start, start + size)
        for role, count in zip(roles[part], used[part].tolist(), strict=True):
            consumed[role] = count
        yield {
            'views': tuple(view[part] for view in views),
            'labels': labels[part],
            'consumed': used[part],
            'features': (),
            'role': roles[start],
            'problems': [],
        }


def _itself(value: Any) -> Any:
    return value


class OneWayFeed:
    """A feed that restarts its epoch wherever it is entered; `name` is that of the source."""

    def __init__(self, feed: StreamFeed, name: str) -> None:
        self.feed = feed
        self.notes = (
            f'data.name {name} cannot be entered within an epoch nor divided exactly: a resumed run restarts '
            "the epoch's images, and some may be seen twice or not at all.",
        )

    def chunks(self, epoch: int, start: int, position: Any) -> Iterator[tuple[Chunk, None]]:
        """Yield microbatches from the beginning of the epoch's stream."""
        for chunk, _ in self.feed.chunks(epoch, 0, None):
            yield chunk, None
