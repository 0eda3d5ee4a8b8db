"""Queues of embeddings of earlier images, oldest first out; buffers of a method, so that checkpoints keep them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from slimclr_hub.distributed import gather
from slimclr_hub.errors import InputError


def random_queue(size: int, dim: int) -> torch.Tensor:
    """[size, dim], in random directions, of unit length."""
    return F.normalize(torch.randn(size, dim), dim=1)


def centred(queue: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [B, D], then the queue [K, D], without the mean of the queue, of unit length again."""
    mean = queue.mean(0)
    return [F.normalize(each - mean, dim=1) for each in (*rows, queue)]


@torch.no_grad()
def enqueue(pointer: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Replace the oldest rows of queues by those of all processes, in place; row i of all queues is of one image.

    Args:
        pointer: Place of the oldest row, a scalar, which moves on.
        pairs: Queues [K, D] with new rows [B, D] of this process; D may differ between them.

    Raises:
        InputError: K is not a multiple of the rows of all processes.
    """
    gathered = [(queue, gather(rows)) for queue, rows in pairs]
    (size, count) = (len(gathered[0][0]), len(gathered[0][1]))
    if size % count:
        raise InputError(f'queue_size {size} is not a multiple of the batch of {count} over all processes')
    # By index rather than by slice, so that the pointer never has to travel to the host.
    places = (pointer + torch.arange(count, device=pointer.device)) % size
    for queue, rows in gathered:
        queue.index_copy_(0, places, rows.to(queue.dtype))
    pointer.copy_((pointer + count) % size)
