"""DisCo: MoCo v2 whose embeddings lie where the teacher's do."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch

from slimclr_hub.methods.losses import squared_distance
from slimclr_hub.methods.mocov2 import MoCoV2
from slimclr_hub.methods.objective import Losses
from slimclr_hub.methods.registry import register_method
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Positive, at_least, bounded


@register_method('disco', momentum=0.999, teacher=True)
class DisCo(MoCoV2):
    """Distilled contrastive learning (Gao et al. 2022, https://arxiv.org/abs/2104.09124), at every width.

    Each width has the contrastive loss of SlimCLR on MoCo v2, and learns the teacher's embedding of both views by the
    squared distance to it. In objective (7) the sum of both takes the place of L, so that narrower widths learn from
    the full one, too, unless `distillation` is none; a single width is the paper's DisCo.

    The paper keeps the teacher's projection head; without one (`Teacher`) its pooled features are the embedding. The
    student's head maps to as many dimensions. The authors' trainer puts the teacher into train mode with the student;
    here it stays in eval mode.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        teacher: The teacher.
        hidden_dim: Hidden features of the MLP head at width 1.0, of which narrower widths have their share; the paper
            enlarges them to 2048 for each student.
        queue_size: Keys kept as negatives, K; a multiple of the batch over all processes. With 0 the negatives are the
            keys of the other images of the batch over all processes.
        temperature: tau_1 of InfoNCE.
        teacher_weight: Factor of the squared distances, averaged over the images. The authors' code sums them over the
            32 images of each GPU, which is a factor of 32 on the mean; a mean does not depend on the processes.
        bn_splits: Parts of the batch that are normalised apart on each process.
        shuffle_keys: Permute keys over processes and parts before they are encoded.
        options: Settings of `Objective`.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        teacher: Teacher,
        *,
        hidden_dim: Count = 2048,
        queue_size: Annotated[int, bounded(at_least, 0)] = 65536,
        temperature: Positive = 0.2,
        teacher_weight: Annotated[float, bounded(at_least, 0)] = 32.0,
        bn_splits: Count = 1,
        shuffle_keys: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            dim=teacher.dim,
            hidden_dim=hidden_dim,
            queue_size=queue_size,
            temperature=temperature,
            bn_splits=bn_splits,
            shuffle_keys=shuffle_keys,
            **options,
        )
        self.teacher = teacher
        self.teacher_weight = teacher_weight

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
        cached: Sequence[torch.Tensor] = (),
    ) -> Losses:
        """One step on a pair of views; arguments and result are `MoCoV2.forward`'s, with `teacher/w` besides.

        `cached` are the teacher's features [B, F] of the images, if it is not to look at the views.
        """
        widths = check_widths(widths)
        query_view, key_view = views
        with sliced_once([self.backbone, self.head], widths):
            queries, others = self.embed(query_view, widths), self.embed(key_view, widths)
        keys = self.next_keys(key_view, momentum)
        of_query, of_key = (self.teacher(view, *cached) for view in views)
        taught = {
            w: self.teacher_weight * (squared_distance(queries[w], of_query) + squared_distance(others[w], of_key))
            for w in widths
        }
        logits, positives = self._candidates(queries, keys)
        output = self.objective(logits, positives, self.temperature, taught=taught)
        self.enqueue(queue=keys)
        return output
