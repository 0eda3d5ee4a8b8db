"""Queues of embeddings of earlier images, oldest first out."""

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.distributed import gather
from slimclr_hub.errors import InputError


class QueueMethod(nn.Module):
    """Base of methods that compare images with earlier ones; queues are buffers, so that checkpoints keep them.

    Attributes:
        queue: Embeddings [K, D] of earlier images, of unit length.
        queue_pointer: Place of the oldest row, a scalar.
        earlier: What the queues held when the step began, by their names: they move on before the backward needs it,
            and before the next microbatch does.
    """

    queue: torch.Tensor
    queue_pointer: torch.Tensor

    def make_queues(self, size: int, **dims: int) -> None:
        """Make queues [size, dim], in random directions, by their names; row i of all of them is of one image."""
        for name, dim in dims.items():
            self.register_buffer(name, F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))
        self.earlier = {name: self.get_buffer(name) for name in dims}

    def hold_queues(self) -> None:
        """Note what the queues hold, before the first microbatch of a step."""
        names, self.earlier = [*self.earlier], {}  # what the step before has held makes room first
        self.earlier = {name: self.get_buffer(name).clone() for name in names}

    @torch.no_grad()
    def enqueue(self, **rows: torch.Tensor) -> None:
        """Replace the oldest rows of the queues of these names by rows [B, D] of all processes, in place.

        Queues of no rows stay as they are.

        Raises:
            InputError: K is not a multiple of the rows of all processes.
        """
        queues = [self.get_buffer(name) for name in rows]
        if not len(queues[0]):
            return
        gathered = [gather(new) for new in rows.values()]
        size, count = len(queues[0]), len(gathered[0])
        if size % count:
            raise InputError(f'queue_size {size} is not a multiple of the batch of {count} over all processes')
        # By index rather than by slice, so that the pointer never has to travel to the host.
        places = (self.queue_pointer + torch.arange(count, device=self.queue_pointer.device)) % size
        for queue, new in zip(queues, gathered, strict=True):
            queue.index_copy_(0, places, new.to(queue.dtype))
        self.queue_pointer.copy_((self.queue_pointer + count) % size)


def centred(queue: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [B, D], then the queue [K, D], without the mean of the queue, of unit length again."""
    mean = queue.mean(0)
    return [F.normalize(each - mean, dim=1) for each in (*rows, queue)]
