"""Supervised slimmable training, the paper's baseline."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods.losses import DISTILLATIONS, check_loss_weights, full_precision
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.registry import register_method
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Positive, bounded, one_of


@register_method('supervised', views=1, slow_start_epochs=0.0, classifier='slimmable')
class Supervised(nn.Module):
    """Slimmable training from labels: the sum of the widths' cross-entropies, over one classifier that they share.

    So far Yu et al. 2019, https://arxiv.org/abs/1812.08928. With `distillation` narrower widths learn from labels and
    from the full one's outputs, half each: the in-place distillation of Yu & Huang 2019,
    https://arxiv.org/abs/1903.05134.

    Args:
        backbone: Network with a classifier, whose widths are trained; `head='slimmable'` is that of the paper.
        distillation: As of `Objective`.
        distillation_temperature: tau_2, of kd.
        loss_weights: Loss weights, as of `Objective`.
        options: Further ones of `Objective`.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        distillation: Annotated[str, bounded(one_of, DISTILLATIONS)] = 'none',
        distillation_temperature: Positive = 1.0,
        loss_weights: Annotated[str | tuple[float, ...], check_loss_weights] = 'none',
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(
            backbone.widths,
            'cross_entropy',
            distillation=distillation,
            distillation_temperature=distillation_temperature,
            loss_weights=loss_weights,
            **options,
        )
        self.widths = backbone.widths
        self.backbone = backbone

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None = None,
        labels: torch.Tensor | None = None,
    ) -> Losses:
        """One step: losses of `widths`, the full one among them, on images [B, C, H, W] with classes `labels` [B].

        Labels may also be shares [B, classes], as mixing and smoothing make them. The images are the first of `views`;
        others are ignored. `momentum` is not used.

        Returns:
            As `Objective` returns, with `cross_entropy` in the place of `info_nce`.

        Raises:
            InputError: There are no labels.
        """
        if labels is None:
            raise InputError('supervised training needs labels; they are the last argument')
        outputs = self.backbone.forward_widths(views[0], check_widths(widths))
        logits = {w: full_precision(output) for w, output in outputs.items()}
        return self.objective(logits, labels)
