"""Contrastive and distillation losses, as pure functions of tensors, and the weights of the losses of the widths.

Shape suffixes: B images of the batch, K negatives, D dimensions of the embedding, C candidates (1 + K, the positive
first).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError
from slimclr_hub.settings import one_of


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 in the place of a shorter type."""
    return x if x.dtype == torch.float64 else x.float()


def without_column(x_BC: torch.Tensor, column_B: torch.Tensor) -> torch.Tensor:
    """Each row without one of its columns: [B, C] -> [B, C - 1].

    By index rather than by mask, whose number of entries would have to travel to the host.
    """
    rest = torch.arange(x_BC.shape[1] - 1, device=x_BC.device)
    return x_BC.gather(1, rest + (rest >= column_B[:, None]))


def similarities(query_BD: torch.Tensor, key_BD: torch.Tensor | None, others_KD: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of each query to its key and to every other; all inputs of unit length.

    In float32 under autocast too: half precision would round a similarity of 0.9 by more than training moves it.
    The result is [B, 1 + K], the positive in column 0. Without `key_BD`, as `others_KD` holds all keys, it is [B, K].
    """
    with torch.autocast(query_BD.device.type, enabled=False):
        query_BD = full_precision(query_BD)
        similarity_BK = query_BD @ full_precision(others_KD).T
        if key_BD is None:
            return similarity_BK
        positive_B1 = torch.einsum('bd,bd->b', query_BD, full_precision(key_BD))[:, None]
        return torch.cat([positive_B1, similarity_BK], dim=1)


def similarities_by_width(
    queries: Mapping[float, torch.Tensor], key_BD: torch.Tensor | None, others_KD: torch.Tensor
) -> dict[float, torch.Tensor]:
    """`similarities` of the queries of each width, whose key is the same.

    All widths in one product: the others are many, and read once instead of once for each.
    """
    keys = None if key_BD is None else key_BD.repeat(len(queries), 1)
    similarity = similarities(torch.cat(list(queries.values())), keys, others_KD)
    return dict(zip(queries, similarity.split(len(similarity) // len(queries)), strict=True))


def info_nce(similarity_BC: torch.Tensor, temperature: float, target_B: torch.Tensor | None = None) -> torch.Tensor:
    """InfoNCE, the paper's Eq. (1), averaged over the batch: -log softmax(similarity / temperature) at the positive.

    `target_B` is the column of each row's positive, 0 by default. The temperature is tau_1.
    """
    if target_B is None:
        target_B = torch.zeros(len(similarity_BC), dtype=torch.long, device=similarity_BC.device)
    return F.cross_entropy(similarity_BC / temperature, target_B)


def kd(student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float, squared: bool = True) -> torch.Tensor:
    """Cross-entropy of the softened student under the softened teacher, the paper's Eqs. (4) and (5).

    Its gradient is that of the Kullback-Leibler divergence (`kl_divergence`), above which it lies by the teacher's
    entropy.

    Args:
        student_BC: Similarities of a sub-network.
        teacher_BC: Similarities of the full network; detach them.
        temperature: tau_2.
        squared: Multiply by tau_2 squared, as Hinton et al. 2015 and the reference code do; the paper leaves it out.
    """
    loss = -(F.softmax(teacher_BC / temperature, 1) * F.log_softmax(student_BC / temperature, 1)).sum(1).mean()
    return loss * temperature**2 if squared else loss


def kl_divergence(student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of the softened student from the softened teacher, in nats; for the logs."""
    return F.kl_div(
        F.log_softmax(student_BC / temperature, 1),
        F.log_softmax(teacher_BC / temperature, 1),
        reduction='batchmean',
        log_target=True,
    )


def accuracy(logits_BC: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Share of rows whose target is larger than everything else.

    A tie is a miss: a network that has collapsed, for which everything is equally similar, scores zero. The largest
    index-first maximum would be the positive in column 0, and score one.
    """
    return ((logits_BC >= logits_BC.gather(1, target_B[:, None])).sum(1) == 1).float().mean()


def mse(student_BC: torch.Tensor, teacher_BC: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the similarities."""
    return F.mse_loss(student_BC, teacher_BC)


def squared_distance(student_BD: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distance of embeddings, averaged over the batch: 2 - 2 cos, as they have unit length."""
    return (full_precision(student_BD) - full_precision(teacher_BD)).square().sum(1).mean()


def dkd(
    student_BC: torch.Tensor,
    teacher_BC: torch.Tensor,
    target_B: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, https://arxiv.org/abs/2203.08679).

    `alpha` times the divergence over {target, any other} plus `beta` times that among the others.
    """
    student_BC, teacher_BC = student_BC / temperature, teacher_BC / temperature
    is_target_BC = F.one_hot(target_B, student_BC.shape[1]).bool()

    def binary(logits_BC: torch.Tensor) -> torch.Tensor:
        others_B1 = logits_BC.masked_fill(is_target_BC, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([logits_BC.gather(1, target_B[:, None]), others_B1], dim=1)

    target_part = kl_divergence(binary(student_BC), binary(teacher_BC), 1.0)
    other_part = kl_divergence(without_column(student_BC, target_B), without_column(teacher_BC, target_B), 1.0)
    return (alpha * target_part + beta * other_part) * temperature**2


def atkd(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, multiplier: float = 2.0, temperature: float = 4.0
) -> torch.Tensor:
    """Distillation at temperatures that follow each row's spread (Guo 2022, ATKD).

    Rows are standardised and divided by `multiplier`, which equals a temperature of `multiplier` standard deviations;
    `temperature` enters as the squared factor alone.
    """
    size = student_BC.shape[1:]
    student_BC, teacher_BC = F.layer_norm(student_BC, size), F.layer_norm(teacher_BC, size)
    return kl_divergence(student_BC, teacher_BC, multiplier) * temperature**2


Distillation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(student_BC, teacher_BC, target_B) -> scalar; the target is the column of the positive."""

DISTILLATIONS: dict[str, Distillation | None] = {
    'kd': lambda student, teacher, _: kd(student, teacher, temperature=5.0),
    'mse': lambda student, teacher, _: mse(student, teacher),
    'dkd': dkd,
    'atkd': lambda student, teacher, _: atkd(student, teacher),
    'none': None,
}
"""Name -> how sub-networks learn from the full one."""


def register_distillation(name: str) -> Callable[[Distillation], Distillation]:
    """Register a function (student_BC, teacher_BC, target_B) -> scalar as the distillation `name`.

    Raises:
        InputError: There is a distillation of that name.
    """

    def register(distillation: Distillation) -> Distillation:
        if name in DISTILLATIONS:
            raise InputError(f'there is a distillation {name!r} already; register yours under another name')
        DISTILLATIONS[name] = distillation
        return distillation

    return register


def make_distillation(name: str, temperature: float, squared: bool = True) -> Distillation | None:
    """The distillation `name`; `temperature` and `squared` are those of `kd`, the others have their own."""
    if name == 'kd':
        return lambda student, teacher, _: kd(student, teacher, temperature, squared)
    return DISTILLATIONS[name]


# Loss weights: the paper's section 3.2, and (1) to (4) of section 4.4


def full_plus_sum(widths: Sequence[float]) -> list[float]:
    """(1), Eq. (6): one each, and for the full network the sum of the other widths besides."""
    return [1.0 + sum(widths[1:]), *[1.0] * (len(widths) - 1)]


def full_plus_max(widths: Sequence[float]) -> list[float]:
    """(2): one each, and for the full network the largest of the other widths besides."""
    return [1.0 + max(widths[1:], default=0.0), *[1.0] * (len(widths) - 1)]


def proportional(widths: Sequence[float]) -> list[float]:
    """(3): in proportion to the width, n in total."""
    return [len(widths) * width / sum(widths) for width in widths]


def cumulative(widths: Sequence[float]) -> list[float]:
    """(4): in proportion to one plus the sum of all smaller widths, n in total.

    The paper's formula lets the sum begin at the width itself; its printed values, and the reference code, do not.
    """
    raw = [1.0 + sum(widths[i + 1 :]) for i in range(len(widths))]
    return [len(widths) * value / sum(raw) for value in raw]


def none(widths: Sequence[float]) -> list[float]:
    """One each."""
    return [1.0] * len(widths)


SCHEMES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    scheme.__name__: scheme for scheme in (full_plus_sum, full_plus_max, proportional, cumulative, none)
}


def loss_weights(scheme: str | Sequence[float], widths: Sequence[float]) -> list[float]:
    """Weight of the loss of each width, in descending order; `scheme` is the name of one, or the weights themselves.

    Raises:
        InputError: The scheme does not exist, or the number of weights is not that of the widths.
    """
    check_loss_weights('loss_weights', scheme, widths)
    return SCHEMES[scheme](widths) if isinstance(scheme, str) else [float(weight) for weight in scheme]


def check_loss_weights(name: str, scheme: str | Sequence[float], widths: Sequence[float] | None = None) -> None:
    """Raise an InputError unless there is such a scheme or, of numbers, 0 or more for each of `widths` if given."""
    if isinstance(scheme, str):
        one_of(name, scheme, SCHEMES)
    elif min(scheme, default=0) < 0:
        raise InputError(f'{name} {list(scheme)} holds one below 0; give 0 or more')
    elif widths is not None and len(scheme) != len(widths):
        raise InputError(f'{name} {list(scheme)} are {len(scheme)} numbers for {len(widths)} widths {list(widths)}')
