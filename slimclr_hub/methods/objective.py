"""The paper's objective (7): one contrastive loss a width, and what narrower widths learn from the full one."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch

from slimclr_hub.methods.losses import (
    DISTILLATIONS,
    accuracy,
    check_loss_weights,
    info_nce,
    kl_divergence,
    loss_weights,
    make_distillation,
)
from slimclr_hub.settings import Positive, bounded, one_of

Losses = dict[str, torch.Tensor]

# What the logs call the loss of one width -> its words.
LOSSES = {'info_nce': 'InfoNCE loss', 'cross_entropy': 'cross-entropy'}


class Objective:
    """lambda_1 L(w1) + sum over i > 1 of lambda_i (L(wi) + D(wi)) / 2, over logits of each width.

    Args:
        widths: All widths, in descending order.
        name: Name of the loss in the logs, one of `LOSSES`.
        distillation: How sub-networks learn from the full one: kd, mse, dkd, atkd, none, or a registered one.
        distillation_temperature: tau_2, of kd.
        distillation_squared: Multiply kd by tau_2 squared, as the reference code does.
        loss_weights: Loss weights: full_plus_sum, full_plus_max, proportional, cumulative, none, or a number for each
            width.

    Attributes:
        candidates: Candidates C among which the rows of the last step had to find their own, 0 before the first; the
            contrastive loss at chance is ln C.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        widths: Sequence[float],
        name: str = 'info_nce',
        *,
        distillation: Annotated[str, bounded(one_of, DISTILLATIONS)] = 'kd',
        distillation_temperature: Positive = 5.0,
        distillation_squared: bool = True,
        loss_weights: Annotated[str | tuple[float, ...], check_loss_weights] = 'full_plus_sum',
    ) -> None:
        one_of('distillation', distillation, DISTILLATIONS)
        check_loss_weights('loss_weights', loss_weights, widths)
        self.widths = tuple(widths)
        self.weights = loss_weights
        self.temperature = distillation_temperature
        self.name = name
        self.candidates = 0
        self._distill = make_distillation(distillation, distillation_temperature, distillation_squared)

    def __call__(
        self,
        logits: Mapping[float, torch.Tensor],
        target_B: torch.Tensor,
        temperature: float = 1.0,
        scale: float = 1.0,
        taught: Mapping[float, torch.Tensor] | None = None,
    ) -> Losses:
        """Losses of the widths of this step, the full one first.

        Args:
            logits: Width -> logits [B, C] that distillation compares, in descending order of width.
            target_B: Column of each row's positive, or its class; or the shares [B, C] of all classes in its label.
            temperature: tau_1, which divides the logits of the contrastive loss alone.
            scale: Factor of the contrastive losses.
            taught: Width -> a further loss, by a teacher, which is added to the contrastive one.

        Returns:
            `loss`; for each width w `loss/w` (its weighted part), `info_nce/w` (unscaled), `accuracy/w` (share of rows
            whose target is larger than everything else), `teacher/w` (of `taught`) and, below the full width,
            `distillation/w` where there is one and `kl/w`. All but `loss` are detached.
        """
        widths = tuple(logits)
        self.candidates = logits[widths[0]].shape[1]
        # A list names a weight for each width; while only some are trained, and that is the full one, it counts once.
        weights = self.weights if widths == self.widths or isinstance(self.weights, str) else 'none'
        teacher = logits[widths[0]].detach()
        highest = target_B.argmax(1) if target_B.ndim == 2 else target_B
        total, log = torch.zeros((), device=teacher.device), {}
        for width, weight in zip(widths, loss_weights(weights, widths), strict=True):
            contrastive = info_nce(logits[width], temperature, target_B)
            loss = contrastive * scale
            if taught is not None:
                log[f'teacher/{width:g}'] = taught[width].detach()
                loss = loss + taught[width]
            if width != widths[0]:
                log[f'kl/{width:g}'] = kl_divergence(logits[width].detach(), teacher, self.temperature)
                if self._distill is not None:
                    distillation = self._distill(logits[width], teacher, highest)
                    log[f'distillation/{width:g}'] = distillation.detach()
                    loss = (loss + distillation) / 2
            total = total + weight * loss
            log[f'loss/{width:g}'] = weight * loss.detach()
            log[f'{self.name}/{width:g}'] = contrastive.detach()
            log[f'accuracy/{width:g}'] = accuracy(logits[width].detach(), highest)
        return {'loss': total, **log}
