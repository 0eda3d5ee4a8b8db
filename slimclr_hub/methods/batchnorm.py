"""Batch normalisation over a part of the batch of one process, or over the batch of all processes.

A contrastive network can recognise the positive by the statistics that a query shares with its key. MoCo prevents it by
normalising on each process alone and shuffling the keys across them (He et al. 2020, section 3.3). With one process the
batch is normalised in contiguous splits instead, split i being what process i would hold.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.distributed import world_size
from slimclr_hub.errors import InputError
from slimclr_hub.methods.losses import full_precision


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over each of `splits` contiguous splits of the batch; an ordinary one in eval mode.

    The running statistics are the mean over the splits of what each alone would have, as they are when the buffers
    of several processes are averaged.
    """

    splits = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape.

        Raises:
            InputError: N is not a multiple of the number of splits.
        """
        if not self.training or self.splits == 1:
            return super().forward(input)
        if len(input) % self.splits:
            raise InputError(f'a batch of {len(input)} does not divide into {self.splits} BN splits')
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        means = self.running_mean.repeat(self.splits, 1)
        variances = self.running_var.repeat(self.splits, 1)
        outputs = [
            F.batch_norm(split, means[i], variances[i], self.weight, self.bias, True, self.momentum, self.eps)
            for i, split in enumerate(input.chunk(self.splits))
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(outputs)


def split_batchnorm(module: nn.Module, splits: int) -> None:
    """Turn every `BatchNorm2d` in `module` into a `SplitBatchNorm2d`, in place; names and tensors stay.

    Raises:
        InputError: `splits` is below 1.
    """
    if splits < 1:
        raise InputError(f'bn_splits {splits} is below 1')
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SplitBatchNorm2d
            layer.splits = splits  # type: ignore[assignment]


class _GatheredBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` by differentiable sums over processes, as PyTorch has no CPU kernel for it."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass  # a batch norm of any dimension became this one, and has checked

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(input.ndim)]
        x = full_precision(input)  # as every batch normalisation accumulates under autocast
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
        dist.all_reduce(count)
        mean = _total(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _total(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._move_statistics(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _move_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        self.running_mean += factor * (mean - self.running_mean)
        self.running_var += factor * (variance - self.running_var)


def _total(x: torch.Tensor) -> torch.Tensor:
    return distributed.all_reduce(x)


def sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch normalisation in `module` one over all processes; names and tensors stay.

    On an accelerator `device` it is PyTorch's SyncBatchNorm, on the CPU sums over processes. Call this before DDP; it
    returns `module` itself unless that is a batch normalisation.
    """
    if device.type != 'cpu':
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = _GatheredBatchNorm
    return module
