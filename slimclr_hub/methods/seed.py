"""SEED: students that compare an image with a queue as their teacher does."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from slimclr_hub.methods.heads import SlimmableMLP, embed
from slimclr_hub.methods.losses import DISTILLATIONS, similarities, similarities_by_width
from slimclr_hub.methods.objective import Losses, Objective
from slimclr_hub.methods.queue import QueueMethod, centred
from slimclr_hub.methods.registry import register_method
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import Count, Positive, bounded, one_of


@register_method('seed', views=1, slow_start_epochs=0.0, teacher=True)
class SEED(QueueMethod):
    """Self-supervised distillation of one teacher into every width (Fang et al. 2021, https://arxiv.org/abs/2101.04731).

    Teacher and student compare one view with candidates: the teacher's own embedding of it, and a queue of the
    teacher's embeddings of earlier images. The loss is the cross-entropy of the student's softmax under the teacher's.
    The teacher looks once for all widths.

    The paper keeps the teacher's projection head. Without one (`Teacher`) the teacher's pooled features are the
    embedding, which share a large mean that leaves little to tell images apart by: `centre` takes it off. The student's
    head maps to as many dimensions. A teacher never changes, so all widths train from the first step, and learn from
    the teacher rather than from the full width, unless `slow_start_epochs` and `distillation` say otherwise.

    Args:
        backbone: Network without a classifier, whose widths are trained.
        teacher: The teacher.
        hidden_dim: Hidden features of the MLP head at width 1.0; as many as the backbone has unless given.
        queue_size: Embeddings in the queue, K; a multiple of the batch over all processes.
        temperature: tau_s, of the student.
        teacher_temperature: tau_t. The paper has 0.01, the authors' code 1e-4. At 1e-4 the target is one-hot at the
            teacher's own embedding, whose similarity is 1, unless the queue holds one more similar than 0.999, and
            the loss is InfoNCE; 0.01, the default here, lets the nearest images of the queue count.
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
        hidden_dim: Count | None = None,
        queue_size: Count = 65536,
        temperature: Positive = 0.2,
        teacher_temperature: Positive = 0.01,
        centre: bool = False,
        distillation: Annotated[str, bounded(one_of, DISTILLATIONS)] = 'none',
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = Objective(backbone.widths, 'cross_entropy', distillation=distillation, **options)
        self.widths = backbone.widths
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.centre = centre
        features = backbone.full_features
        self.backbone = backbone
        self.teacher = teacher
        hidden = features if hidden_dim is None else hidden_dim
        self.head = SlimmableMLP(features, hidden, teacher.dim, widths=self.widths, overlap=backbone.overlap)
        self.make_queues(queue_size, queue=teacher.dim)

    def forward(
        self,
        views: Sequence[torch.Tensor],
        widths: Sequence[float],
        momentum: float | None,
        labels: torch.Tensor | None = None,
        cached: Sequence[torch.Tensor] = (),
    ) -> Losses:
        """One step: losses of `widths` on one view, with the queue advanced.

        Args:
            views: The view [B, C, H, W]; further ones are not used.
            widths: Widths to train in this step, the full one among them.
            momentum: None after the first microbatch of a step, whose queue the others then look at; else not used.
            labels: Not used.
            cached: The teacher's features [B, F] of the images, if it is not to look at the view.

        Returns:
            As `Objective` returns; `accuracy` is the share of images whose student finds the candidate that its teacher
            finds most similar, which is the first.
        """
        widths = check_widths(widths)
        students = embed(self.backbone, self.head, views[0], widths)
        teacher = self.teacher(views[0], *cached)
        if momentum is not None:
            self.hold_queues()
        earlier = self.earlier['queue']
        own, earlier = centred(earlier, teacher) if self.centre else (teacher, earlier)
        target = F.softmax(similarities(own, own, earlier) / self.teacher_temperature, dim=1)
        output = self.objective(similarities_by_width(students, own, earlier), target, self.temperature)
        self.enqueue(queue=teacher)
        return output
