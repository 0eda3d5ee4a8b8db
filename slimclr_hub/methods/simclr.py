"""SlimCLR on SimCLR."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.distributed import gather_with_gradient, rank
from slimclr_hub.methods.heads import SlimmableProjector
from slimclr_hub.methods.losses import full_precision, without_column
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.registry import register_method
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Positive


@register_method('simclr', sync_bn=True, negatives_in_batch=True)
class SimCLR(nn.Module):
    """Slimmable contrastive learning in which every other view of the batch is a negative.

    Chen et al. 2020, https://arxiv.org/abs/2002.05709, is the method at a single width; the objective over widths is
    the paper's (7). There is no momentum encoder. The head is that of the authors' code: linear, switchable BN, ReLU,
    linear without bias, switchable BN.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        dim: Dimension of the embedding.
        hidden_dim: Hidden features of the head at width 1.0; as many as the backbone has unless given.
        temperature: tau_1.
        options: Settings of `Objective`.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        dim: Count = 128,
        hidden_dim: Count | None = None,
        temperature: Positive = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        features = backbone.full_features
        self.backbone = backbone
        hidden = features if hidden_dim is None else hidden_dim
        self.head = SlimmableProjector(
            features, hidden, dim, self.widths, bias=True, last_affine=True, overlap=backbone.overlap
        )

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None = None,
        labels: torch.Tensor | None = None,
    ) -> Losses:
        """One step: losses of `widths`, the full one among them, on two views [B, C, H, W], as `Objective` returns.

        `momentum` and `labels` are not used.
        """
        widths = check_widths(widths)
        images = torch.cat(list(views))
        logits = {w: self.similarities(embedding) for w, embedding in self.embed(images, widths).items()}
        return self.objective(logits, self._targets(len(views[0]), images.device), self.temperature)

    def embed(self, images: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        """[2B, C, H, W] -> for each width [2B, dim], of unit length."""
        with sliced_once([self.backbone, self.head], widths):
            features = self.backbone.forward_widths(images, widths)
            return {w: F.normalize(full_precision(self.head(features[w], w)), dim=1) for w in widths}

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosine similarities of each view to all views of all processes but itself: [2B, D] -> [2B, 2BP - 1]."""
        with torch.autocast(embeddings.device.type, enabled=False):
            everything = gather_with_gradient(embeddings)
            similarity = embeddings @ everything.T
        itself = torch.arange(len(embeddings), device=embeddings.device) + rank() * len(embeddings)
        return without_column(similarity, itself)

    def _targets(self, batch: int, device: torch.device) -> torch.Tensor:
        # The other view of image i is i + B for the first views and i - B for the second; the row itself is left out.
        row = torch.arange(2 * batch, device=device)
        column = torch.where(row < batch, row + batch - 1, row - batch)
        return column + rank() * 2 * batch
