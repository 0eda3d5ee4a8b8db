"""BINGO: images that a teacher finds similar are brought together."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from slimclr_hub.distributed import shared
from slimclr_hub.methods.heads import SlimmableMLP, embed
from slimclr_hub.methods.losses import DISTILLATIONS, full_precision, info_nce, similarities_by_width
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.queue import QueueMethod, centred
from slimclr_hub.methods.registry import register_method
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Fraction, Positive, at_least, bounded, one_of


@register_method('bingo', views_cached=1, slow_start_epochs=0.0, teacher=True, neighbours=5)
class BINGO(QueueMethod):
    """Bag of instances aggregation (Xu et al. 2022, https://arxiv.org/abs/2107.01691), at every width.

    Each image x comes with one of its nearest neighbours x+ among the training images, as the teacher sees them. The
    keys k and k+ are the teacher's embeddings of a view of each, and a queue of its keys of earlier images holds the
    negatives. Students embed another view of each, q and q+, and a CutMix of the two, m. With InfoNCE l(query; key),
    a = `cross_weight`, and m's share s of q, the loss is the mean of

        (1 - a) l(q; k) + a l(q; k+),    (1 - a) l(q+; k+) + a l(q+; k),    s l(m; k) + (1 - s) l(m; k+).

    Without the second and the third term, and at a = 0, that is MoCo v2 with the teacher as its key encoder.

    The paper keeps the teacher's projection head; without one (`Teacher`) its pooled features are the embedding. The
    student's head maps to as many dimensions. `centre` is ours, as in `SEED`. No width waits for slow start or learns
    from the full width, unless `slow_start_epochs` and `distillation` say so.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        teacher: The teacher.
        hidden_dim: Hidden features of the MLP head at width 1.0, of which narrower widths have their share; the paper
            has 2048 for each student.
        queue_size: Keys in the queue, K, of the images rather than of their neighbours; a multiple of the batch over
            all processes.
        temperature: tau of InfoNCE.
        cross_weight: a.
        cross_after: Epochs in which a is 0.
        cutmix: With the third term.
        centre: Subtract the mean of the queue from the teacher's embeddings, and bring them to unit length again.
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
        queue_size: Count = 65536,
        temperature: Positive = 0.2,
        cross_weight: Fraction = 0.5,
        cross_after: Annotated[int, bounded(at_least, 0)] = 10,
        cutmix: bool = True,
        centre: bool = False,
        distillation: Annotated[str, bounded(one_of, DISTILLATIONS)] = 'none',
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, distillation=distillation, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        self.cross_weight = cross_weight
        self.cross_after = cross_after
        self.cutmix = cutmix
        self.centre = centre
        self.epoch = 0
        self.backbone = backbone
        self.teacher = teacher
        features = backbone.full_features
        self.head = SlimmableMLP(features, hidden_dim, teacher.dim, widths=self.widths, overlap=backbone.overlap)
        self.make_queues(queue_size, queue=teacher.dim)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch of the next steps, from 0 on."""
        self.epoch = epoch

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
        cached: Sequence[torch.Tensor] = (),
    ) -> Losses:
        """One step: losses of `widths` on images and neighbours, with the queue advanced.

        Args:
            views: Query view and key view of the images, then of their neighbours, [B, C, H, W] each; with `cached`
                the query views alone.
            widths: Widths to train in this step, the full one among them.
            momentum: None after the first microbatch of a step, whose queue the others then look at; else not used.
            labels: Not used.
            cached: The teacher's features [B, F] of images and neighbours, if it is not to look at key views.

        Returns:
            As `Objective` returns: `info_nce` and `accuracy` are of queries and their own keys, `teacher` is the part
            of the loss that crosses over to the other image.
        """
        widths = check_widths(widths)
        if cached:
            query, its_query = views
            own, its = (self.teacher(query, features) for features in cached)
        else:
            query, key, its_query, its_key = views
            own, its = self.teacher(key), self.teacher(its_key)
        if momentum is not None:
            self.hold_queues()
        negatives = self.earlier['queue']
        keys, its_keys, negatives = centred(negatives, own, its) if self.centre else (own, its, negatives)
        students = [query, its_query]
        if self.cutmix:
            mixed, share = cutmix(query, its_query)
            students.append(mixed)
        with sliced_once([self.backbone, self.head], widths):
            embedded = [embed(self.backbone, self.head, view, widths) for view in students]
        terms, pairs = len(students), 2 * len(own)
        queries = {w: torch.cat([each[w] for each in embedded]) for w in widths}
        logits = similarities_by_width(queries, torch.cat([keys, its_keys, keys][:terms]), negatives)
        crossed = torch.cat([its_keys, keys])
        a = self.cross_weight if self.epoch >= self.cross_after else 0.0
        taught = {}
        for w in widths:
            of, others = queries[w], logits[w][:, 1:]
            # l(q; k+) needs no logits of its own: its negatives are those of l(q; k).
            further = 2 * a * self._contrast(of[:pairs], crossed, others[:pairs])
            if self.cutmix:
                of_own = info_nce(logits[w][pairs:], self.temperature)
                of_its = self._contrast(of[pairs:], its_keys, others[pairs:])
                further = further + share * of_own + (1 - share) * of_its
            taught[w] = further / terms
        of_pairs = {w: each[:pairs] for w, each in logits.items()}
        target = torch.zeros(pairs, dtype=torch.long, device=own.device)
        output = self.objective(of_pairs, target, self.temperature, scale=2 * (1 - a) / terms, taught=taught)
        self.enqueue(queue=own)
        return output

    def _contrast(self, query: torch.Tensor, key: torch.Tensor, others_BK: torch.Tensor) -> torch.Tensor:
        """InfoNCE, averaged, of queries and keys [B, D] among negatives whose similarities are known."""
        positive = (full_precision(query) * full_precision(key)).sum(1) / self.temperature
        return F.softplus((others_BK / self.temperature).logsumexp(1) - positive).mean()


def cutmix(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a box of `other` into `one`, both [B, C, H, W] (Yun et al. 2019); also return the share that stays `one`.

    The box, one for all images of all processes, has sides of sqrt(1 - u) of the image's and its centre anywhere; u is
    uniform in [0, 1]. It is drawn on the device, which is not synchronised.
    """
    u, *centre = shared(torch.rand(3, device=one.device))
    half = (1 - u).sqrt() / 2
    rows, columns = (
        (((torch.arange(n, device=one.device) + 0.5) / n - middle).abs() < half)
        for n, middle in zip(one.shape[-2:], centre, strict=True)
    )
    box = rows[:, None] & columns
    return torch.where(box, other, one), 1 - box.float().mean()
