"""SlimCLR on MoCo v2."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from slimclr_hub.distributed import gather, local_part, rank, shared_permutation, world_size
from slimclr_hub.errors import InputError
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.methods.heads import SlimmableLinearHead, SlimmableMLP, embed
from slimclr_hub.methods.losses import similarities_by_width
from slimclr_hub.methods.momentum import EMA
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.queue import QueueMethod
from slimclr_hub.methods.registry import register_method
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Positive, at_least, bounded, one_of

HEADS = ('mlp', 'linear')


@register_method('mocov2', momentum=0.999)
class MoCoV2(QueueMethod):
    """Slimmable contrastive learning over a queue of keys: the paper's section 3, figure 2 (a), objective (7).

    Every width of the network and of its MLP head embeds the query; the momentum encoder, a dense network of the full
    width, embeds the key. Chen et al. 2020, https://arxiv.org/abs/2003.04297, is the method at a single width.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        dim: Dimension of the embedding.
        head: `mlp`, or `linear`, MoCo v1's single layer, which goes with a temperature of 0.07 or 0.1.
        hidden_dim: Hidden features of the MLP head at width 1.0; as many as the backbone has unless given.
        queue_size: Keys kept as negatives, K; a multiple of the batch over all processes. With 0 the negatives are the
            keys of the other images of the batch over all processes.
        temperature: tau_1 of InfoNCE.
        bn_splits: Parts of the batch that are normalised apart on each process.
        shuffle_keys: Permute keys over processes and parts before they are encoded.
        options: Settings of `Objective`.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        dim: Count = 128,
        head: Annotated[str, bounded(one_of, HEADS)] = 'mlp',
        hidden_dim: Count | None = None,
        queue_size: Annotated[int, bounded(at_least, 0)] = 65536,
        temperature: Positive = 0.2,
        bn_splits: Count = 1,
        shuffle_keys: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        self.bn_splits = bn_splits
        self.shuffle_keys = shuffle_keys

        full = self.widths[0]
        features = backbone.full_features
        self.backbone = backbone
        one_of('head', head, HEADS)
        self.head: SlimmableMLP | SlimmableLinearHead
        if head == 'mlp':
            hidden = features if hidden_dim is None else hidden_dim
            self.head = SlimmableMLP(features, hidden, dim, widths=self.widths, overlap=backbone.overlap)
        elif hidden_dim is None:
            self.head = SlimmableLinearHead(features, dim, self.widths, overlap=backbone.overlap)
        else:
            raise InputError(f'hidden_dim {hidden_dim} is not for head linear, which has no hidden layer; drop it')
        self.key_backbone = backbone.extract(full).requires_grad_(False)
        self.key_head = self.head.extract(full).requires_grad_(False)
        pairs = (self.key_backbone, self.backbone), (self.key_head, self.head)
        self.ema = EMA(pairs, full)
        split_batchnorm(self.backbone, bn_splits)
        split_batchnorm(self.key_backbone, bn_splits)
        self.make_queues(queue_size, queue=dim)

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
    ) -> Losses:
        """One step: losses of `widths` on a pair of views, with the momentum encoder moved and the queue advanced.

        Args:
            views: Query view and key view, [B, C, H, W] each.
            widths: Widths to train in this step, the full one among them.
            momentum: Momentum of the key encoder; None after the first microbatch of a step: the key encoder and the
                negatives then stay as they were, and the queue takes the keys of every microbatch.
            labels: Not used.

        Returns:
            As `Objective` returns.
        """
        widths = check_widths(widths)
        query_view, key_view = views
        queries = self.embed(query_view, widths)
        keys = self.next_keys(key_view, momentum)
        logits, positives = self._candidates(queries, keys)
        output = self.objective(logits, positives, self.temperature)
        self.enqueue(queue=keys)
        return output

    def embed(self, view: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        """Embed queries at each width: [B, C, H, W] -> [B, dim], of unit length."""
        return embed(self.backbone, self.head, view, widths)

    @torch.no_grad()
    def next_keys(self, view: torch.Tensor, momentum: float | None) -> torch.Tensor:
        """Embed keys after the momentum encoder has moved, and hold on to the negatives of this step."""
        if momentum is not None:
            self.update_key_encoder(momentum)
            self.hold_queues()
        return self.encode_keys(view)

    def _candidates(
        self, queries: dict[float, torch.Tensor], keys: torch.Tensor
    ) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
        batch, device = len(keys), keys.device
        if len(self.queue):
            target = torch.zeros(batch, dtype=torch.long, device=device)
            return similarities_by_width(queries, keys, self.earlier['queue']), target
        target = torch.arange(batch, device=device) + rank() * batch
        return similarities_by_width(queries, None, gather(keys)), target

    def update_key_encoder(self, momentum: float) -> None:
        """Move the key encoder's parameters, not its buffers, towards the full width of the query encoder."""
        self.ema.update(momentum)

    def encode_keys(self, view: torch.Tensor) -> torch.Tensor:
        """Embed keys normalised among other images than their queries are: [B, C, H, W] -> [B, dim], of unit length.

        The batch of all processes is permuted before it is encoded, in parts, and the embeddings are put back.
        """
        if world_size() * self.bn_splits == 1 or not self.shuffle_keys:
            return F.normalize(self.key_head(self.key_backbone(view)), dim=1)
        everything = gather(view)
        order = shared_permutation(len(everything), view.device)
        keys = F.normalize(self.key_head(self.key_backbone(local_part(everything[order]))), dim=1)
        return local_part(gather(keys)[order.argsort()])
