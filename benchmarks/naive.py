"""Baseline of training_step.py: slimmable MoCo v2 with the structure of the authors' code, written from a description.

Width is an attribute of every layer, set by a walk over all modules before each width's own pass; every forward slices
its weight anew; batch normalisation is a list with one module per width; memory is contiguous; each step allocates the
momentum encoder anew, `k = m k + (1 - m) q`; the position in the queue is read on the host. It computes what `MoCoV2`
computes (tests/test_benchmarks.py).
"""

import copy
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.methods.losses import loss_weights


class WidthConv2d(nn.Conv2d):
    """Convolution that reads its width from itself."""

    width = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = int(self.out_channels * self.width)
        return self._conv_forward(x, self.weight[:outputs, : x.shape[1]], None)


class WidthLinear(nn.Linear):
    """Linear layer that reads its width from itself."""

    width = 1.0
    slim_out = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = int(self.out_features * self.width) if self.slim_out else self.out_features
        return F.linear(x, self.weight[:outputs, : x.shape[1]], self.bias[:outputs])


class WidthBatchNorm2d(nn.Module):
    """One batch normalisation per width; reads its width from itself."""

    width = 1.0

    def __init__(self, features: int, widths: Sequence[float]) -> None:
        super().__init__()
        self.indices = {width: i for i, width in enumerate(widths)}
        self.norms = nn.ModuleList([nn.BatchNorm2d(int(features * width)) for width in widths])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[self.indices[self.width]](x)


def set_width(module: nn.Module, width: float) -> None:
    for layer in module.modules():
        if isinstance(layer, WidthConv2d | WidthLinear | WidthBatchNorm2d):
            layer.width = width


def make_encoder(widths: Sequence[float], dim: int = 128) -> nn.Sequential:
    """timm's ResNet-50 with these layers, and an MLP head."""
    backbone = timm.create_model('resnet50', num_classes=0)
    for name, module in list(backbone.named_modules()):
        parent = backbone.get_submodule(name.rpartition('.')[0])
        if isinstance(module, nn.Conv2d):
            module.__class__ = WidthConv2d
        elif isinstance(module, nn.BatchNorm2d):
            setattr(parent, name.rpartition('.')[2], WidthBatchNorm2d(module.num_features, widths))
    last = WidthLinear(2048, dim)
    last.slim_out = False
    return nn.Sequential(backbone, WidthLinear(2048, 2048), nn.ReLU(inplace=True), last)


class NaiveMoCoV2(nn.Module):
    """Objective (7) of the paper, by a loop over widths.

    Args:
        widths: In descending order.
        queue_size: Keys kept as negatives.
    """

    queue: torch.Tensor
    queue_pointer: torch.Tensor

    def __init__(self, widths: Sequence[float], queue_size: int, dim: int = 128) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.encoder = make_encoder(widths, dim)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer('queue', F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer('queue_pointer', torch.zeros(1, dtype=torch.long))

    def forward(
        self, views: Sequence[torch.Tensor], momentum: float, temperature: float = 0.2, distillation: float = 5.0
    ) -> torch.Tensor:
        query_view, key_view = views
        queries = []
        for width in self.widths:
            set_width(self.encoder, width)
            queries.append(F.normalize(self.encoder(query_view), dim=1))
        with torch.no_grad():
            for key, source in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
                key.data = key.data * momentum + source.data * (1 - momentum)
            keys = F.normalize(self.key_encoder(key_view), dim=1)
        total: Any = 0.0
        teacher: torch.Tensor | None = None
        for query, weight in zip(queries, loss_weights('full_plus_sum', self.widths), strict=True):
            positive = torch.einsum('nc,nc->n', [query, keys])[:, None]
            negative = torch.einsum('nc,ck->nk', [query, self.queue.clone().detach()])
            similarity = torch.cat([positive, negative], dim=1).float()
            labels = torch.zeros(len(similarity), dtype=torch.long, device=similarity.device)
            loss = F.cross_entropy(similarity / temperature, labels)
            if teacher is None:
                teacher = similarity.detach()
            else:
                soft = F.softmax(teacher / distillation, dim=1)
                learned = -(soft * F.log_softmax(similarity / distillation, dim=1)).sum(1).mean()
                loss = (loss + learned * distillation**2) / 2
            total = total + weight * loss
        position = int(self.queue_pointer)
        self.queue[:, position : position + len(keys)] = keys.T
        self.queue_pointer[0] = (position + len(keys)) % self.queue.shape[1]
        return total
