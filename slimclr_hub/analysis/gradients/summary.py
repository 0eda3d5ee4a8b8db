"""Gradients over training in numbers: ratios of norms, and how much directions have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import torch
import torch.nn.functional as F

from slimclr_hub.analysis.gradients.data import RunGradients
from slimclr_hub.analysis.pca import Components, principal_components


@dataclass(frozen=True)
class Phase:
    """A run before its slow-start point, or after it, or all of one that has none.

    Args:
        name: `all`, or `before S` and `after S`.
        norms: Steps at which norms are known.
        all_ratio: Mean over them of the norm of all gradients over that of the smallest width's slice (Fig. 3).
        rest_ratio: Mean of that of the rest over that of the smallest width's slice (Fig. 3).
        gradients: Steps at which the last layer's gradient is known.
        length: Mean norm of the last layer's gradient.
        consecutive: Mean cosine of each and the next.
        pairwise: Mean cosine of all pairs: 1 where all have one direction, 0 where they have none in common.
        explained: Share of the squared length of these gradients, each of unit length, along their first principal
            component, and along the second.
    """

    name: str
    norms: int
    all_ratio: float
    rest_ratio: float
    gradients: int
    length: float
    consecutive: float
    pairwise: float
    explained: tuple[float, float]


def phases(run: RunGradients) -> list[Phase]:
    """The phases of a run that have at least one step."""
    names = ('all',) if run.slow_start is None else ('before S', 'after S')
    found = []
    for name in names:
        chosen = [
            record for record in run.norms if name == 'all' or run.starts_slowly(record.step) == (name == names[0])
        ]
        rows = [
            row
            for step, row in zip(run.steps.tolist(), run.gradients, strict=True)
            if name == 'all' or run.starts_slowly(step) == (name == names[0])
        ]
        gradients = torch.stack(rows) if rows else run.gradients[:0]
        consecutive, pairwise = mean_cosines(gradients)
        found.append(
            Phase(
                name=name,
                norms=len(chosen),
                all_ratio=_mean([record.all_ratio for record in chosen]),
                rest_ratio=_mean([record.rest_ratio for record in chosen]),
                gradients=len(rows),
                length=_mean(gradients.norm(dim=1).tolist()),
                consecutive=consecutive,
                pairwise=pairwise,
                explained=_explained(gradients),
            )
        )
    return [phase for phase in found if phase.norms or phase.gradients]


def components(run: RunGradients, unit_length: bool = False) -> Components:
    """First two principal components of a run's gradients (paper, Fig. 4), about the origin, which is no gradient.

    Args:
        run: With gradients.
        unit_length: Take each gradient at unit length, so that a step counts as much as any other however large its
            gradient is, and a projection is as long as the share of the direction that the plane shows. Without, as the
            paper has it, large gradients decide on the plane, and projections tell sizes as well as directions.
    """
    rows = run.gradients.double()
    rows = F.normalize(rows, dim=1) if unit_length else rows
    return principal_components(rows, 2, rows.new_zeros(rows.shape[1]))


def mean_cosines(gradients: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of consecutive rows of [N, D], and of all pairs; nan where there are fewer than two."""
    if len(gradients) < 2:
        return float('nan'), float('nan')
    rows = F.normalize(gradients.double(), dim=1)
    cosines = rows @ rows.T
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    return cosines.diagonal(1).mean().item(), cosines[pairs].mean().item()


def _explained(gradients: torch.Tensor) -> tuple[float, float]:
    if len(gradients) < 2:
        return float('nan'), float('nan')
    rows = F.normalize(gradients.double(), dim=1)
    first, second = principal_components(rows, 2, rows.new_zeros(rows.shape[1])).ratios.tolist()
    return first, second


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value)]
    return fmean(finite) if finite else float('nan')
