"""Every width of a detector in one training iteration."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn

from slimclr_hub.detection.mmdetection.names import width_name
from slimclr_hub.models.slimmable_resnet import WidthSwitch


class Slimmable(Protocol):
    """What training and evaluation by width need of a detector."""

    training_widths: bool

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that it holds."""

    def set_width(self, width: float) -> WidthSwitch:
        """Switch the active width."""

    def parse_losses(self, losses: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As in mmengine."""

    def data_preprocessor(self, data: Any, training: bool) -> dict[str, Any]:
        """As in mmengine."""


def train_widths(
    model: nn.Module, detector: Slimmable, data: Any, optim_wrapper: OptimWrapper
) -> dict[str, torch.Tensor]:
    """One training iteration: the losses of all widths summed, one clip, one step.

    Images are prepared once. The widths run one after the other, each forward followed by its backward, so that
    activations of one width alone are in memory. Under DDP only the last, the widest, reduces gradients, whose means
    over the processes are then exact for every parameter: those that it does not use itself, the normalisations of
    other widths, were marked as used by the passes before.

    Zhao et al., section 4.3, after Yu et al. 2019 (https://arxiv.org/abs/1812.08928), algorithm 1.

    Args:
        model: What to run: the detector, or DDP around it.
        detector: The detector itself.
        data: A batch as the data loader gives it.
        optim_wrapper: The optimizer; its accumulation counts iterations, not widths.

    Returns:
        `loss`, summed over widths, and for each width `width_0.50/loss` and its parts.
    """
    data = detector.data_preprocessor(data, True)
    *narrow, widest = sorted(detector.widths)
    logs = {}
    with _training(detector):
        for width in narrow:
            with detector.set_width(width):
                with getattr(model, 'no_sync', nullcontext)(), optim_wrapper.optim_context(model):
                    loss, logs[width] = detector.parse_losses(model(**data, mode='loss'))
                count = optim_wrapper.inner_count
                optim_wrapper.backward(optim_wrapper.scale_loss(loss))
                # Gradient accumulation counts calls of backward, and there is one for each width.
                optim_wrapper._inner_count = count
        with detector.set_width(widest):
            with optim_wrapper.optim_context(model):
                loss, logs[widest] = detector.parse_losses(model(**data, mode='loss'))
            optim_wrapper.update_params(loss)
    total = torch.stack([log['loss'].detach() for log in logs.values()]).sum()
    widths = (widest, *reversed(narrow))
    return {'loss': total, **{f'{width_name(w)}/{key}': logs[w][key].detach() for w in widths for key in logs[w]}}


def unwrapped(model: nn.Module) -> Any:
    """A detector out of DDP."""
    return model.module if is_model_wrapper(model) else model


@contextmanager
def _training(detector: Slimmable) -> Iterator[None]:
    detector.training_widths = True
    try:
        yield
    finally:
        detector.training_widths = False
