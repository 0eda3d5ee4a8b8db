"""Batch normalisation by sub-batch: on one process, what several processes have by nature.

A contrastive network can recognise the positive by the statistics that a query shares with its key. MoCo prevents it by
normalising on each process alone and shuffling the keys across them (He et al. 2020, section 3.3). With one process the
batch is normalised in contiguous parts instead, part i being what process i would hold.
"""

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.errors import InputError


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over each of `splits` contiguous parts of the batch; an ordinary one in eval mode.

    The running statistics are the mean over the parts of what each part alone would have, as they are when the buffers
    of several processes are averaged.
    """

    splits = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape.

        Raises:
            InputError: N is not a multiple of the number of parts.
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
        parts = [
            F.batch_norm(part, means[i], variances[i], self.weight, self.bias, True, self.momentum, self.eps)
            for i, part in enumerate(input.chunk(self.splits))
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(parts)


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
