"""Plain computations that tests hold the fast ones against: loops over numbers, steps without sharing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from slimclr_hub.methods import bingo, compress, disco, heads, mocov3, simclr
from slimclr_hub.methods.momentum import EMA
from slimclr_hub.models import SlimmableResNet
from tests.networks import forward_apart


@contextmanager
def plain_paths() -> Iterator[None]:
    """Methods compute as the authors' code does, and round as it does.

    Each layer cuts its slice in each forward, each width has a first convolution of its own, and the moving average
    rounds both of its products.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in bingo, compress, disco, heads, mocov3, simclr:
            patch.setattr(module, 'sliced_once', lambda modules, widths: nullcontext())
        patch.setattr(SlimmableResNet, 'forward_widths', forward_apart)
        patch.setattr(EMA, 'update', _update)
        yield


@torch.no_grad()
def _update(self: EMA, momentum: float) -> None:
    moves = torch._foreach_mul(self.sources, 1.0 - momentum)
    torch._foreach_mul_(self.averages, momentum)
    torch._foreach_add_(self.averages, list(moves))


def softmax(row, temperature=1.0):
    top = max(row)
    total = sum(math.exp((value - top) / temperature) for value in row)
    return [math.exp((value - top) / temperature) / total for value in row]


def cross_entropy(rows, targets, temperature=1.0):
    """-log softmax(row / temperature) at the target, averaged; InfoNCE where rows are similarities."""
    terms = [-math.log(softmax(row, temperature)[target]) for row, target in zip(rows, targets, strict=True)]
    return sum(terms) / len(terms)


def divergence(p, q):
    """Kullback-Leibler divergence of q from p."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def kd(students, teachers, temperature, squared=True):
    """Cross-entropy of the softened student under the softened teacher, averaged."""
    loss = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        loss -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / len(students)
    return loss * temperature**2 if squared else loss


def objective(logits, targets, weights, tau_1, tau_2, scale=1.0):
    """(7) with `kd`: width -> its weighted loss, of width -> rows of logits, the full width first."""
    parts = {}
    full = next(iter(logits.values()))
    for (width, rows), weight in zip(logits.items(), weights, strict=True):
        loss = cross_entropy(rows, targets, tau_1) * scale
        parts[width] = weight * (loss if rows is full else (loss + kd(rows, full, tau_2)) / 2)
    return parts


def products(queries, keys):
    """Inner products of each query with each key, of tensors [B, D] and [K, D]."""
    queries, keys = queries.tolist(), keys.tolist()
    return [[sum(a * b for a, b in zip(q, k, strict=True)) for k in keys] for q in queries]
