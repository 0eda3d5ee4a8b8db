"""Supervised slimmable training, the paper's baseline."""

from collections.abc import Sequence

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods.losses import full_precision
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_widths


class Supervised(nn.Module):
    """Slimmable training from labels with in-place distillation (Yu & Huang 2019, https://arxiv.org/abs/1903.05134).

    The full width learns from the labels, narrower ones from labels and from the full one's outputs, half each.

    Args:
        backbone: Network with a classifier, whose widths are trained.
        distillation: `kd`, `mse`, `dkd`, `atkd` or `none`.
        distillation_temperature: tau_2.
        distillation_squared: Multiply `kd` by tau_2 squared.
        weights: Loss weights: a scheme of the paper, or one number for each width.
        shared: Make the slices of weights once a step, and let one first convolution serve all widths; equal but for
            rounding.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        distillation: str = 'kd',
        distillation_temperature: float = 1.0,
        distillation_squared: bool = True,
        weights: str | Sequence[float] = 'none',
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.objective = Objective(
            backbone.widths,
            distillation=distillation,
            temperature=distillation_temperature,
            squared=distillation_squared,
            weights=weights,
            name='cross_entropy',
        )
        self.widths = backbone.widths
        self.shared = shared
        self.backbone = backbone

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None = None,
        labels: torch.Tensor | None = None,
    ) -> Losses:
        """One step: losses of `widths` on labelled images.

        Args:
            views: One batch of images [B, C, H, W]; more are ignored.
            widths: Widths to train in this step, the full one among them.
            momentum: Not used; nothing follows.
            labels: Classes [B].

        Returns:
            As `Objective` returns, with `cross_entropy` in the place of `info_nce`.

        Raises:
            InputError: There are no labels.
        """
        if labels is None:
            raise InputError('supervised training needs labels; they are the last argument')
        outputs = self.backbone.forward_widths(views[0], check_widths(widths), shared=self.shared)
        logits = {w: full_precision(output) for w, output in outputs.items()}
        return self.objective(logits, labels)
