"""The light hook of training: what `diagnostics:` in a recipe asks for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.diagnostics.config import DiagnosticsConfig
from slimclr_hub.train.diagnostics.norms import last_linear, layer_slices, mean_norms
from slimclr_hub.train.diagnostics.records import NormRecord, Records

_CHUNK = 64 * 2**20  # bytes of gradients that wait for the next checkpoint at most


class GradientObserver:
    """Records gradient norms, gradients of the last layer, and weights.

    Norms wait on the device until the next line of the log, gradients in memory until the next checkpoint. Under DDP
    gradients are the means over processes, and the main process alone records; statistics of batch normalisation in a
    snapshot are its own. A recorded step costs one pass over the gradients (norms), a copy of the last layer's, or a
    file of weights; any other step costs a comparison.

    Args:
        config: What to record.
        method: The method to observe.
        smallest: Width whose share of the gradient is measured.
        records: Where it is kept.
    """

    def __init__(self, config: DiagnosticsConfig, method: nn.Module, smallest: float, records: Records) -> None:
        self._config = config
        self._smallest = smallest
        self._records = records
        self._layers = layer_slices(method, smallest) if config.every else []
        self._last = last_linear(method) if config.gradients else None
        self._norms: list[tuple[int, int, torch.Tensor]] = []
        self._steps: list[int] = []
        self._gradients: list[torch.Tensor] = []

    def __call__(self, method: nn.Module, step: int, widths: Sequence[float]) -> None:
        """As `slimclr_hub.train.trainer.Observer`."""
        config = self._config
        if config.every and step % config.every == 0:
            self._norms.append((step, len(widths), mean_norms(self._layers)))
        if self._last is not None and step % config.gradients == 0:
            assert self._last.grad is not None
            self._steps.append(step)
            # A copy: what the optimizer does to a gradient is its own affair.
            self._gradients.append(self._last.grad.detach().flatten().clone())
        if config.snapshots and step % config.snapshots == 0:
            self._records.add_weights(step, trained_tensors(method))

    def write(self, everything: bool) -> list[tuple[int, dict[str, float]]]:
        """As `slimclr_hub.train.trainer.Observer`."""
        found = []
        if self._norms:
            values = torch.stack([norms for *_, norms in self._norms]).tolist()
            for (step, count, _), (smallest, total, rest) in zip(self._norms, values, strict=True):
                found.append(NormRecord(step, self._smallest, smallest, total, rest, count))
            self._records.add_norms(found)
            self._norms.clear()
        if self._gradients:
            self._gradients = [gradient.cpu() for gradient in self._gradients]
            if everything or sum(gradient.nbytes for gradient in self._gradients) > _CHUNK:
                self._records.add_gradients(self._steps, torch.stack(self._gradients))
                self._steps.clear()
                self._gradients.clear()
        return [
            (
                record.step,
                {
                    'gradient_smallest': record.smallest,
                    'gradient_all': record.all,
                    'gradient_rest': record.rest,
                    'ratio_all': record.all_ratio,
                    'ratio_rest': record.rest_ratio,
                },
            )
            for record in found
        ]


def observe(config: PretrainConfig, method: nn.Module, folder: Path, step: int) -> GradientObserver | None:
    """The observer that `diagnostics:` asks for; records from `step` on, which an earlier process left, are dropped.

    Raises:
        InputError: There is nothing to observe, or the smallest width is too small.
    """
    records = Records(folder)
    records.drop_from(step)
    if not config.diagnostics.on:
        return None
    smallest = config.diagnostics.smallest_of(config.model.widths, config.model.overlap)
    return GradientObserver(config.diagnostics, method, smallest, records)


def trained_tensors(method: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the parts of a method that train, by its names, in float32 on the host: no momentum encoder."""
    return {
        f'{part}.{name}': (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous().clone()
        for part, child in method.named_children()
        if any(parameter.requires_grad for parameter in child.parameters())
        for name, tensor in child.state_dict().items()
    }
