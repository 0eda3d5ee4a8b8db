"""CompRess: students that compare an image with their own queue as their teacher does with its own."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.methods.losses import DISTILLATIONS, similarities
from slimclr_hub.methods.momentum import EMA
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.queue import QueueMethod
from slimclr_hub.methods.registry import register_method
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.slicing import sliced_once
from slimclr_hub.models.widths import check_widths, width_key
from slimclr_hub.settings import Count, Positive, bounded, one_of


@register_method('compress', views=1, momentum=0.999, slow_start_epochs=0.0, teacher=True)
class CompRess(QueueMethod):
    """Compression by similarities (Abbasi Koohpayegani et al. 2020, https://arxiv.org/abs/2010.14713), at every width.

    The teacher compares a view with a queue of its features of earlier images, each width with a queue of its own
    features of the same images in the same order ("2q"): so their dimensions may differ, and there is no head. The loss
    is the cross-entropy of the student's softmax under the teacher's, whose gradient is that of the paper's
    Kullback-Leibler divergence; it lies above that by the teacher's entropy.

    A width's features are put into its queue by a momentum copy of that width in train mode, as the authors' main
    script has it; with `momentum` 0 they are the student's own, as in its variant. The view itself is not among the
    candidates. No width waits for slow start or learns from the full width, unless `slow_start_epochs` and
    `distillation` say so.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        teacher: The teacher.
        queue_size: Images in the queues, K; a multiple of the batch over all processes. In float32 they take 4 K bytes
            for each feature of the teacher and of each width, once more for a copy in each step: 2.4 GiB for a
            ResNet-50 and a ResNet-18 at width 1.0, 3.2 GiB at four widths.
        temperature: tau, of teacher and student.
        options: Settings of `Objective`.

    Raises:
        InputError: A value does not exist or is out of range.
    """

    def __init__(
        self,
        backbone: SlimmableResNet,
        teacher: Teacher,
        *,
        queue_size: Count = 128000,
        temperature: Positive = 0.04,
        distillation: Annotated[str, bounded(one_of, DISTILLATIONS)] = 'none',
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, 'cross_entropy', distillation=distillation, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        self.backbone = backbone
        self.teacher = teacher
        copies = {w: backbone.extract(w).requires_grad_(False) for w in self.widths}
        self.key_backbones = nn.ModuleDict({width_key(w): copy for w, copy in copies.items()})
        self.emas = [EMA([(copy, backbone)], w) for w, copy in copies.items()]
        # Width -> its queue, whose rows are of the same images as those of `queue`.
        self.queues = {w: f'queue_{width_key(w)}' for w in self.widths}
        own = {self.queues[w]: copy.num_features for w, copy in copies.items()}
        self.make_queues(queue_size, queue=teacher.dim, **own)

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
        cached: Sequence[torch.Tensor] = (),
    ) -> Losses:
        """One step: losses of `widths` on one view, with the momentum copies moved and all queues advanced.

        Args:
            views: The view [B, C, H, W]; further ones are not used.
            widths: Widths to train in this step, the full one among them.
            momentum: Momentum of the copies; None after the first microbatch of a step: they and the candidates then
                stay as they were.
            labels: Not used.
            cached: The teacher's features [B, F] of the images, if it is not to look at the view.

        Returns:
            As `Objective` returns; `accuracy` is the share of images whose student finds the image of the queue that
            its teacher finds most similar.
        """
        widths = check_widths(widths)
        with sliced_once([self.backbone], widths):
            features = self.backbone.forward_widths(views[0], widths)
        teacher, keys = self.teacher(views[0], *cached), self.next_keys(views[0], momentum)
        target = F.softmax(similarities(teacher, None, self.earlier['queue']) / self.temperature, dim=1)
        earlier = {w: self.earlier[self.queues[w]] for w in widths}
        logits = {w: similarities(F.normalize(features[w], dim=1), None, earlier[w]) for w in widths}
        output = self.objective(logits, target, self.temperature)
        self.enqueue(queue=teacher, **{self.queues[w]: keys[w] for w in self.widths})
        return output

    @torch.no_grad()
    def next_keys(self, view: torch.Tensor, momentum: float | None) -> dict[float, torch.Tensor]:
        """Features of each width, of unit length, after its copy has moved; notes the candidates of this step."""
        if momentum is not None:
            for ema in self.emas:
                ema.update(momentum)
            self.hold_queues()
        return {w: F.normalize(self.key_backbones[width_key(w)](view), dim=1) for w in self.widths}
