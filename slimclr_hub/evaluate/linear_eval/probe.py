"""The linear probe (paper, section 4.1): a layer for each width or one for all, at several learning rates at once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.data.seeding import drawing
from slimclr_hub.evaluate.baselines import Encoder
from slimclr_hub.evaluate.linear_eval.config import SweepConfig
from slimclr_hub.methods.losses import full_precision
from slimclr_hub.models.layers import SlimmableLinear, SwitchableLinear
from slimclr_hub.models.widths import width_key
from slimclr_hub.runs.schedule import warmup_cosine

Head = SwitchableLinear | SlimmableLinear
Scaling = Mapping[float, tuple[torch.Tensor, torch.Tensor]]
"""Width -> (shift [D], scale [D]); a feature x enters the probe as (x - shift) * scale."""


def make_head(backbone: Encoder, kind: str, num_classes: int, seed: int) -> Head:
    """A new head of a kind, `switchable` or `slimmable`, for a network, which is left without one.

    As the network itself would make it: N(0, 0.01) for the weights, zero for the biases.
    """
    with drawing(seed):
        backbone.reset_classifier(num_classes, head=kind)
    head = backbone.fc
    assert isinstance(head, SwitchableLinear | SlimmableLinear)
    backbone.reset_classifier(0)
    return head


class ProbeSweep(nn.Module):
    """Copies of `head` that are trained side by side, one for each learning rate.

    The full width learns from the labels; narrower ones half from them and half from the full width's detached outputs
    by cross-entropy at tau_2 = 1, where distillation is on; widths are summed (paper, sections 3.2 and 4.1). `widths`
    are in descending order.
    """

    def __init__(self, head: Head, widths: Sequence[float], copies: int, distillation: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(copies))
        self.widths = tuple(widths)
        self.distillation = distillation

    def forward(self, features: Mapping[float, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of features [B, D] by width, in float32 whatever autocast says, and classes [B].

        Returns:
            `loss`, the sum over the copies, to be differentiated; and `loss/i` of each copy, detached.
        """
        with torch.autocast(labels.device.type, enabled=False):
            inputs = {width: full_precision(features[width]) for width in self.widths}
            logits = {w: torch.stack([head(x, w) for head in self.heads]) for w, x in inputs.items()}
            losses = self._losses(logits, labels)
        return {'loss': losses.sum(), **{f'loss/{i}': loss for i, loss in enumerate(losses.detach())}}

    def _losses(self, logits: Mapping[float, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        # `methods.objective.Objective` without weights, for all copies at once and without its logs: layers as small as
        # these spend their time on calls, not on numbers. Logits are [copies, B, classes], the result is [copies].
        target = labels.expand(len(self.heads), -1)[..., None]
        teacher: torch.Tensor | None = None
        total = torch.zeros((), device=labels.device)
        for student in logits.values():
            log_probability = F.log_softmax(student, dim=-1)
            loss = -log_probability.gather(-1, target).squeeze(-1)
            if teacher is None:
                teacher = log_probability.detach().exp()
            elif self.distillation:
                loss = (loss - (teacher * log_probability).sum(-1)) / 2
            total = total + loss.mean(-1)
        return total


def make_optimizer(sweep: ProbeSweep, config: SweepConfig) -> torch.optim.SGD:
    """Plain SGD with a group of parameters for each learning rate."""
    groups: list[dict[str, Any]] = [
        {'params': list(head.parameters()), 'lr': lr, 'peak': lr}
        for head, lr in zip(sweep.heads, config.rates, strict=True)
    ]
    return torch.optim.SGD(groups, lr=config.rates[0], momentum=config.momentum, weight_decay=config.weight_decay)


def lr_factor(config: SweepConfig, step: int, steps_per_epoch: int) -> float:
    """Factor of learning rates at a step (paper, section 4.1): a half cosine, or a tenth at each milestone."""
    if config.schedule == 'cosine':
        return warmup_cosine(step, config.epochs * steps_per_epoch, 0, 1.0)
    return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in config.milestone_epochs)


def standardisation(head: Head, features: Mapping[float, torch.Tensor]) -> Scaling:
    """Shift and scale that bring features of training images to unit variance, such that `folded` can undo them.

    For a linear layer of each width they also subtract the mean. A layer that all widths share needs one scale for all:
    the root of the mean variance over the widths that have the feature. Features are [N, D] by width.
    """
    variances = {width: x.var(0, correction=0) for width, x in features.items()}
    if isinstance(head, SwitchableLinear):
        return {width: (x.mean(0), _inverse_root(variances[width])) for width, x in features.items()}
    spans = {width: head.spans(width)[1] for width in features}
    any_width = next(iter(variances.values()))
    total, count = any_width.new_zeros(head.in_features), any_width.new_zeros(head.in_features)
    for width, (start, stop) in spans.items():
        total[start:stop] += variances[width]
        count[start:stop] += 1
    scale = _inverse_root(total / count.clamp(min=1))
    return {width: (torch.zeros_like(scale[slice(*span)]), scale[slice(*span)]) for width, span in spans.items()}


def _inverse_root(variance: torch.Tensor) -> torch.Tensor:
    # A constant feature would be divided by zero; it carries no information.
    return torch.where(variance > 0, variance.rsqrt(), torch.zeros_like(variance))


@torch.no_grad()
def folded(head: Head, scaling: Scaling | None) -> Head:
    """Fold a standardisation into a copy of a head, which then takes features as the network gives them."""
    head = copy.deepcopy(head)
    if scaling is None:
        return head
    if isinstance(head, SlimmableLinear):
        whole = head.weight.new_zeros(head.in_features)
        for width, (_, scale) in scaling.items():
            whole[slice(*head.spans(width)[1])] = scale
        head.weight.mul_(whole)
        return head
    for width, (shift, scale) in scaling.items():
        linear: Any = head[width_key(width)]
        linear.weight.mul_(scale)
        linear.bias.sub_(linear.weight @ shift)
    return head


@torch.no_grad()
def accuracies(
    head: Callable[[torch.Tensor, float], torch.Tensor],
    features: Mapping[float, torch.Tensor],
    labels: torch.Tensor,
    k: int,
    chunk: int = 8192,
) -> dict[float, float]:
    """Top-k accuracy in percent by width, of features [N, D], which `head(x, width)` makes logits of, and classes [N].

    Logits that are not finite count as wrong. `chunk` images at a time bound the memory by chunk x classes.
    """
    counts = []
    for width, x in features.items():
        hits = torch.zeros((), dtype=torch.int64, device=labels.device)
        for part, truth in zip(x.split(chunk), labels.split(chunk), strict=True):
            logits = head(part, width)
            found = (logits.topk(k, dim=1).indices == truth[:, None]).any(1)
            hits += (found & logits.isfinite().all(1)).sum()
        counts.append(hits)
    # One transfer for all widths waits for the device once.
    return {width: 100 * hit / len(labels) for width, hit in zip(features, torch.stack(counts).tolist(), strict=True)}
