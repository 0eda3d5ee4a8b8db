"""What every process has to know of all before an optimizer step, without keeping the device waiting."""

from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Whether something holds on any process.

    The answer goes over the hosts, by gloo, so a device that has work queued goes on with it.

    Args:
        processes: Number of processes; the process group of several is initialised.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = dist.new_group(backend='gloo') if processes > 1 else None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is true on any process; every process asks at the same time."""
        if self._group is None:
            return flags
        shared = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return tuple(map(bool, shared.tolist()))


class FiniteLoss:
    """Whether the losses of a step are finite, known before the optimizer moves.

    The forward ends long before the backward, so the host reads the loss of a device that is busy with the backward: it
    waits for an event, not for the device to run dry.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._event: torch.cuda.Event | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Note the loss of a forward that has been queued; its backward is queued next."""
        loss = loss.detach()
        if loss.is_cuda:
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            host.copy_(loss, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            loss = host
        self._losses.append(loss)

    def holds(self) -> bool:
        """Whether all losses since the last answer are finite."""
        if self._event is not None:
            self._event.synchronize()
        finite = all(bool(loss.isfinite()) for loss in self._losses)
        self._losses.clear()
        return finite
