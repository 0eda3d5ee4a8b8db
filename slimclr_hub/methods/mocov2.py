"""SlimCLR on MoCo v2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods.heads import SlimmableMLP
from slimclr_hub.methods.losses import similarities
from slimclr_hub.methods.momentum import follow, pair_parameters
from slimclr_hub.methods.objective import Objective
from slimclr_hub.methods.processes import gather, local_part, shared_permutation, world_size
from slimclr_hub.methods.split_batchnorm import split_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_widths, width_key


class MoCoV2(nn.Module):
    """Slimmable contrastive learning over a queue of keys: the paper's section 3, figure 2 (a), objective (7).

    Every width of the network and of its MLP head embeds the query; the momentum encoder, a dense network of the full
    width, embeds the key. Chen et al. 2020, https://arxiv.org/abs/2003.04297, is the method at a single width.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        dim: Dimension of the embedding.
        hidden_dim: Hidden features of the MLP head at width 1.0; as many as the backbone has unless given.
        queue_size: Keys kept as negatives, K; a multiple of the batch over all processes.
        temperature: tau_1 of InfoNCE.
        distillation: `kd`, `mse`, `dkd`, `atkd` or `none`: how sub-networks learn from the full one.
        distillation_temperature: tau_2.
        distillation_squared: Multiply `kd` by tau_2 squared, as the reference code does.
        weights: Loss weights: a scheme of the paper, or one number for each width.
        bn_splits: Parts of the batch that are normalised apart on each process.

    Raises:
        InputError: An option or number that does not exist.
    """

    queue: torch.Tensor
    queue_pointer: torch.Tensor

    def __init__(
        self,
        backbone: SlimmableResNet,
        *,
        dim: int = 128,
        hidden_dim: int | None = None,
        queue_size: int = 65536,
        temperature: float = 0.2,
        distillation: str = 'kd',
        distillation_temperature: float = 5.0,
        distillation_squared: bool = True,
        weights: str | Sequence[float] = 'full_plus_sum',
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        self.objective = Objective(
            backbone.widths,
            distillation=distillation,
            temperature=distillation_temperature,
            squared=distillation_squared,
            weights=weights,
        )
        self.widths = backbone.widths
        self.temperature = temperature
        self.bn_splits = bn_splits

        full = self.widths[0]
        features = backbone.full_features
        self.backbone = backbone
        self.head = SlimmableMLP(features, features if hidden_dim is None else hidden_dim, dim, max_width=full)
        self.key_backbone = backbone.extract(full).requires_grad_(False)
        self.key_head = self.head.extract(full).requires_grad_(False)
        split_batchnorm(self.backbone, bn_splits)
        split_batchnorm(self.key_backbone, bn_splits)
        self.register_buffer('queue', F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))

    def forward(
        self, views: Sequence[torch.Tensor], widths: Sequence[float], momentum: float
    ) -> dict[str, torch.Tensor]:
        """One step: losses of `widths` on a pair of views, with the momentum encoder moved and the queue advanced.

        Args:
            views: Query view and key view, [B, C, H, W] each.
            widths: Widths to train in this step, the full one among them.
            momentum: Momentum of the key encoder.

        Returns:
            `loss`, the objective; for each width w `loss/w` (its weighted part), `info_nce/w`, `accuracy/w` (share of
            queries nearest to their key) and, below the full width, `kl/w`. All but `loss` are detached.
        """
        widths = check_widths(widths)
        query_view, key_view = views
        queries = {w: F.normalize(self.head(self.backbone.forward_at(query_view, w), w), dim=1) for w in widths}
        with torch.no_grad():
            self.update_key_encoder(momentum)
            keys = self.encode_keys(key_view)
        negatives = self.queue.clone()  # the queue moves on before the backward needs these
        candidates = {w: similarities(query, keys, negatives) for w, query in queries.items()}
        first = torch.zeros(len(keys), dtype=torch.long, device=keys.device)  # where the positive is
        output = self.objective(candidates, first, self.temperature)
        self.enqueue(keys)
        return output

    def update_key_encoder(self, momentum: float) -> None:
        """Move the key encoder's parameters, not its buffers, towards the full width of the query encoder."""
        key = width_key(self.widths[0])
        for follower, leader in (self.key_backbone, self.backbone), (self.key_head, self.head):
            follow(*pair_parameters(follower, leader, key), momentum)

    def encode_keys(self, view: torch.Tensor) -> torch.Tensor:
        """Embed keys normalised among other images than their queries are: [B, C, H, W] -> [B, dim], of unit length.

        The batch of all processes is permuted before it is encoded, in parts, and the embeddings are put back.
        """
        if world_size() * self.bn_splits == 1:
            return F.normalize(self.key_head(self.key_backbone(view)), dim=1)
        everything = gather(view)
        order = shared_permutation(len(everything), view.device)
        keys = F.normalize(self.key_head(self.key_backbone(local_part(everything[order]))), dim=1)
        return local_part(gather(keys)[order.argsort()])

    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys of the queue by those of all processes; [B, dim] on each."""
        keys = gather(keys)
        size = len(self.queue)
        if size % len(keys):
            raise InputError(f'queue_size {size} is not a multiple of the batch of {len(keys)} over all processes')
        # By index rather than by slice, so that the pointer never has to travel to the host.
        places = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % size)
