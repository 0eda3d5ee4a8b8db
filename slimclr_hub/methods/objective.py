"""The paper's objective (7): one contrastive loss a width, and what narrower widths learn from the full one."""

from collections.abc import Mapping, Sequence

import torch

from slimclr_hub.errors import InputError
from slimclr_hub.methods.loss_weights import loss_weights
from slimclr_hub.methods.losses import DISTILLATIONS, accuracy, info_nce, kl_divergence, make_distillation

Losses = dict[str, torch.Tensor]


class Objective:
    """lambda_1 L(w1) + sum over i > 1 of lambda_i (L(wi) + D(wi)) / 2, over logits of each width.

    Args:
        widths: All widths, in descending order.
        distillation: `kd`, `mse`, `dkd`, `atkd` or `none`.
        temperature: tau_2 of `kd`.
        squared: Multiply `kd` by tau_2 squared.
        weights: Loss weights: a scheme of the paper, or one number for each width.
        name: What the loss is called in the logs.

    Raises:
        InputError: An option or number that does not exist.
    """

    def __init__(
        self,
        widths: Sequence[float],
        *,
        distillation: str = 'kd',
        temperature: float = 5.0,
        squared: bool = True,
        weights: str | Sequence[float] = 'full_plus_sum',
        name: str = 'info_nce',
    ) -> None:
        if distillation not in DISTILLATIONS:
            raise InputError(f'distillation {distillation!r} is not one of {", ".join(DISTILLATIONS)}')
        loss_weights(weights, tuple(widths))
        self.widths = tuple(widths)
        self.weights = weights
        self.temperature = temperature
        self.name = name
        self._distill = make_distillation(distillation, temperature, squared)

    def __call__(
        self,
        logits: Mapping[float, torch.Tensor],
        target_B: torch.Tensor,
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> Losses:
        """Losses of the widths of this step, the full one first.

        Args:
            logits: Width -> logits [B, C] that distillation compares, in descending order of width.
            target_B: Column of each row's positive, or its class.
            temperature: tau_1, which divides the logits of the contrastive loss alone.
            scale: Factor of the contrastive losses.

        Returns:
            `loss`; for each width w `loss/w` (its weighted part), `info_nce/w` (unscaled), `accuracy/w` (share of rows
            whose target is larger than everything else) and, below the full width, `distillation/w` where there is one
            and `kl/w`. All but `loss` are detached.
        """
        widths = tuple(logits)
        # A list names a weight for each width; while only some are trained, and that is the full one, it counts once.
        weights = self.weights if widths == self.widths or isinstance(self.weights, str) else 'none'
        teacher = logits[widths[0]].detach()
        total, log = torch.zeros((), device=teacher.device), {}
        for width, weight in zip(widths, loss_weights(weights, widths), strict=True):
            contrastive = info_nce(logits[width], temperature, target_B)
            loss = contrastive * scale
            if width != widths[0]:
                log[f'kl/{width:g}'] = kl_divergence(logits[width].detach(), teacher, self.temperature)
                if self._distill is not None:
                    distillation = self._distill(logits[width], teacher, target_B)
                    log[f'distillation/{width:g}'] = distillation.detach()
                    loss = (loss + distillation) / 2
            total = total + weight * loss
            log[f'loss/{width:g}'] = weight * loss.detach()
            log[f'{self.name}/{width:g}'] = contrastive.detach()
            log[f'accuracy/{width:g}'] = accuracy(logits[width].detach(), target_B)
        return {'loss': total, **log}
