"""SlimCLR on MoCo v3."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.distributed import gather, rank
from slimclr_hub.methods.heads import SlimmableProjector
from slimclr_hub.methods.losses import full_precision
from slimclr_hub.methods.momentum import EMA
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.registry import register_method
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Positive


@register_method('mocov3', momentum=0.99, momentum_schedule='cosine', sync_bn=True, negatives_in_batch=True)
class MoCoV3(nn.Module):
    """Slimmable contrastive learning with the batch itself as negatives: the paper's sections 3 and 4.1.

    Each view is query and key by turns; queries pass a predictor. Negatives are the keys of the other images of the
    batch over all processes. Chen et al. 2021, https://arxiv.org/abs/2104.02057, is the method at a single width.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        dim: Dimension of the embedding.
        hidden_dim: Hidden features of projector and predictor at width 1.0.
        temperature: tau_1.
        distillation_temperature: tau_2, of kd.
        options: Settings of `Objective`.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        dim: Count = 256,
        hidden_dim: Count = 4096,
        temperature: Positive = 1.0,
        distillation_temperature: Positive = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, distillation_temperature=distillation_temperature, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        self.backbone = backbone
        self.head = SlimmableProjector(backbone.full_features, hidden_dim, dim, self.widths, overlap=backbone.overlap)
        self.predictor = SlimmableProjector(
            dim, hidden_dim, dim, self.widths, slim_in=False, last_norm=False, overlap=backbone.overlap
        )
        self.key_backbone = backbone.extract(self.widths[0]).requires_grad_(False)
        self.key_head = self.head.extract(self.widths[0]).requires_grad_(False)
        pairs = (self.key_backbone, self.backbone), (self.key_head, self.head)
        self.ema = EMA(pairs, self.widths[0])

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
    ) -> Losses:
        """One step: losses of `widths` on a pair of views, with the momentum encoder moved.

        Args:
            views: Two views, [B, C, H, W] each.
            widths: Widths to train in this step, the full one among them.
            momentum: Momentum of the key encoder; None to leave it, as after the first microbatch of a step.
            labels: Not used.

        Returns:
            As `Objective` returns, summed over both directions; `info_nce`, `accuracy` and `kl` are means.
        """
        widths = check_widths(widths)
        with sliced_once([self.backbone, self.head, self.predictor], widths):
            queries = [self.encode_queries(view, widths) for view in views]
        with torch.no_grad():
            if momentum is not None:
                self.update_key_encoder(momentum)
            encoded = [full_precision(self.key_head(self.key_backbone(view))) for view in views]
            keys = [gather(F.normalize(key, dim=1)) for key in encoded]
        return _both(*(self._direction(query, key) for query, key in zip(queries, reversed(keys), strict=True)))

    def encode_queries(self, view: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        """[B, C, H, W] -> for each width [B, dim], of unit length."""
        features = self.backbone.forward_widths(view, widths)
        projected = {w: self.predictor(self.head(features[w], w), w) for w in widths}
        return {w: F.normalize(full_precision(query), dim=1) for w, query in projected.items()}

    def update_key_encoder(self, momentum: float) -> None:
        """Move the key encoder's parameters, not its buffers, towards the full width of the query encoder."""
        self.ema.update(momentum)

    def _direction(self, queries: dict[float, torch.Tensor], keys: torch.Tensor) -> Losses:
        batch = len(queries[self.widths[0]])
        own = torch.arange(batch, device=keys.device) + rank() * batch
        with torch.autocast(keys.device.type, enabled=False):
            logits = {w: query @ keys.T / self.temperature for w, query in queries.items()}
            return self.objective(logits, own, scale=2 * self.temperature)


def _both(first: Losses, second: Losses) -> Losses:
    return {
        name: first[name] + second[name] if name.startswith('loss') else (first[name] + second[name]) / 2
        for name in first
    }
