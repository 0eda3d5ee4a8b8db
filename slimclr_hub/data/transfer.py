"""Batches on their way from the workers to the training device."""

from collections.abc import Iterable

import torch
from torchvision.transforms import v2

TRANSFERS = ('uint8', 'float32')


class ToDevice:
    """Copies to a device, for which the host does not wait.

    On the stream that computes, a copy would begin only after all that is queued there, such as the backward of the
    step before. So on CUDA copies have a stream of their own, and what is queued after them waits for them alone.

    Args:
        device: Where tensors go.
        beside: Whether copies run beside what the device computes; otherwise they are queued behind it.
    """

    def __init__(self, device: torch.device, beside: bool = True) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if beside and device.type == 'cuda' else None

    def __call__(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors on the device, ready for what is queued from here on; those that are there are left as they are.

        Copies of what is not in pinned memory do make the host wait.
        """
        if self.stream is None:
            return self._copies(tensors)
        with torch.cuda.stream(self.stream):
            placed = self._copies(tensors)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in placed:
            # Their memory is of the stream of copies, which would write the next batch to it once they are dropped.
            tensor.record_stream(current)
        return placed

    def _copies(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


class Normalisation:
    """The end of `make_view`, for a batch at a time and where that lies.

    Operations and their order are those of torchvision's `ToDtype(scale=True)` and `Normalize`, so that results are
    equal bit for bit. `Normalize` itself would copy mean and std to the device for each batch, and wait.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        device: Where batches are.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 [b, C, H, W] -> float32 [b, C, H, W]."""
        return v2.functional.to_dtype(views, torch.float32, scale=True).sub_(self.mean).div_(self.std)
