"""Division of a sharded stream over processes and workers, for each epoch."""

from dataclasses import dataclass
from itertools import accumulate

from slimclr_hub.data.seeding import permutation


@dataclass(frozen=True)
class Share:
    """Samples start, start + step, ... below stop of the concatenation of some shards.

    Args:
        shards: Indices of the shards, in the order to read.
        start: First sample, counted from the beginning of the first of these shards.
        stop: Sample before which to stop; None for the end of the last shard.
        step: 1 for all samples between.
    """

    shards: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    step: int = 1


@dataclass(frozen=True)
class Layout:
    """Division of an epoch of a stream; it has to be the same where a run is resumed within an epoch.

    Args:
        processes: Number of processes.
        workers: Shares of a process, one for each worker.
        images: Images of a process in a microbatch.
        batches: Microbatches an epoch.
    """

    processes: int
    workers: int
    images: int
    batches: int


def plan_epoch(
    lengths: tuple[int, ...] | None, count: int, layout: Layout, rank: int, seed: int, epoch: int
) -> list[Share]:
    """Plan the shares of one process's workers; over all processes every sample occurs once, but for the last batch.

    With known lengths, an epoch is the beginning of the permuted shards, in whole batches, cut into one range for each
    process and within it into whole microbatches for each worker: a worker reads its own shards, and parts of those at
    its borders. With unknown lengths, shards are divided over the workers, and process r of P takes samples r, r + P,
    ... of them: every process reads all, and their counts differ by at most one sample for each worker.

    Args:
        lengths: Samples of each shard, if known.
        count: Number of shards.
        layout: Division of the epoch.
        rank: Rank of the process.
        seed: Seed of all orders.
        epoch: The epoch.
    """
    order = [int(shard) for shard in permutation(count, seed, epoch)]
    workers = range(layout.workers)
    if lengths is None:
        return [Share(tuple(order[w :: layout.workers]), rank, None, layout.processes) for w in workers]
    ends = list(accumulate(lengths[shard] for shard in order))
    each, more = divmod(layout.batches, layout.workers)
    shares, first = [], rank * layout.batches * layout.images
    for w in workers:
        # The first workers take the odd batches, as turns are taken from the first on.
        length = (each + (w < more)) * layout.images
        shares.append(_range(order, ends, first, first + length))
        first += length
    return shares


def _range(order: list[int], ends: list[int], first: int, stop: int) -> Share:
    begins = [0, *ends[:-1]]
    inside = [i for i in range(len(order)) if begins[i] < stop and ends[i] > first]
    if first == stop or not inside:
        return Share(())
    offset = begins[inside[0]]
    return Share(tuple(order[i] for i in inside), first - offset, stop - offset)
