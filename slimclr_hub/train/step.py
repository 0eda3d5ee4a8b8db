"""Forward and backward of one optimizer step, as trainer, replays and benchmarks take it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from slimclr_hub.data.batches import Batch

Losses = dict[str, torch.Tensor]


def forward_backward(
    method: Any,
    microbatches: Sequence[Batch],
    widths: Sequence[float],
    momentum: float | None,
    backward: Callable[[torch.Tensor], Any] | None = torch.Tensor.backward,
    *,
    channels_last: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Losses]:
    """Add the gradients of the mean loss of the microbatches of one optimizer step to those of the parameters.

    Args:
        method: The method, or what accelerate made of it.
        microbatches: Batches that are processed one after the other.
        widths: Widths to train.
        momentum: Momentum of the key encoder, which moves before the first microbatch alone.
        backward: Computes gradients from a loss divided by the number of microbatches; None for the forward alone.
        channels_last: Bring images into the channels-last memory layout.
        autocast: Context of each forward.
        no_sync: Context of each microbatch but the last, under which DDP does not reduce gradients.

    Returns:
        Detached output of the method on each microbatch.
    """
    outputs: list[Losses] = []
    for i, batch in enumerate(microbatches):
        views = list(batch.views)
        if channels_last:
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        with nullcontext() if i == len(microbatches) - 1 else no_sync():
            with autocast():
                known = {'cached': batch.features} if batch.features else {}
                output = method(views, widths, momentum if i == 0 else None, batch.labels, **known)
            if backward is not None:
                backward(output['loss'] / len(microbatches))
        outputs.append({name: value.detach() for name, value in output.items()})
    return outputs


class FiniteLoss:
    """Tells whether the losses of a step are finite before the optimizer moves.

    The forward ends long before the backward, so the host reads the loss while the device is busy with the backward: it
    waits for an event instead of synchronising.
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
        """True if all losses since the last call are finite."""
        if self._event is not None:
            self._event.synchronize()
        finite = all(bool(loss.isfinite()) for loss in self._losses)
        self._losses.clear()
        return finite
