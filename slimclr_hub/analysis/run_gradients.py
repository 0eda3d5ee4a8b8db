"""Gradients of a run over its training: as recorded, or recomputed from its checkpoints, and their summary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from slimclr_hub.analysis.pca import Components, principal_components
from slimclr_hub.analysis.replay import Replay, checkpoint_steps, recipe_of, slow_start_end
from slimclr_hub.errors import InputError
from slimclr_hub.train.diagnostics import NormRecord, Records, last_linear, layer_slices, mean_norms

MIN_GRADIENTS = 3
"""Gradients of the last layer that two principal components need at least."""


@dataclass(frozen=True)
class RunGradients:
    """Gradients of one run over its training.

    Args:
        name: Name of the run.
        slow_start: Epoch at which narrower widths begin to train; None for a run without slow start.
        steps_per_epoch: Optimizer steps in an epoch.
        norms: Gradient norms, in order of steps.
        norms_from: `records` of the run, or its `checkpoints`.
        steps: [N], steps of `gradients`, in order.
        gradients: [N, D], gradients of the last linear layer.
        gradients_from: As `norms_from`.
        notes: Sentences for the reader.
    """

    name: str
    slow_start: float | None
    steps_per_epoch: int
    norms: list[NormRecord]
    norms_from: str
    steps: torch.Tensor
    gradients: torch.Tensor
    gradients_from: str
    notes: tuple[str, ...] = ()

    def in_slow_start(self, step: int) -> bool:
        """True if the step after `step` trains the full width alone."""
        return self.slow_start is not None and step < self.slow_start * self.steps_per_epoch


def gradients_of(
    folder: Path, *, smallest: float | None = None, batches: int = 1, from_checkpoints: bool = False
) -> RunGradients:
    """Read the gradients that a run recorded; compute those of its checkpoints' next steps if it recorded none.

    Args:
        folder: Folder of the run.
        smallest: Width whose share is measured; the run's `diagnostics.smallest` by default.
        batches: Batches over which the gradient of a checkpoint is averaged.
        from_checkpoints: Ignore records.

    Raises:
        InputError: There are too few records and checkpoints, or the checkpoints do not fit the run.
    """
    config = recipe_of(folder)
    records = Records(folder)
    norms = [] if from_checkpoints else records.norms()
    steps, gradients = (torch.zeros(0), torch.zeros(0, 0)) if from_checkpoints else records.gradients()
    if norms and smallest is not None and any(record.width != smallest for record in norms):
        raise InputError(
            f'{folder} has recorded the share of width {norms[0].width:g}, not of {smallest:g}; drop --smallest, or '
            'give --from_checkpoints true'
        )
    recorded_norms, recorded_gradients = bool(norms), len(steps) >= MIN_GRADIENTS
    notes: tuple[str, ...] = ()
    if not (recorded_norms and recorded_gradients):
        if (count := len(checkpoint_steps(folder))) < MIN_GRADIENTS:
            raise InputError(
                f'{folder} has recorded too few gradients, and has {count} checkpoints; train with --diagnostics.every '
                f'10 --diagnostics.gradients 10, or keep {MIN_GRADIENTS} checkpoints or more by run.keep_checkpoints'
            )
        diagnostics = replace(config.diagnostics, smallest=smallest or config.diagnostics.smallest)
        width = diagnostics.smallest_of(config.model.widths, config.model.overlap)
        replayed, *others, notes = _replay_gradients(Replay(folder), width, batches)
        norms = norms or replayed
        if not recorded_gradients:
            steps, gradients = others
    return RunGradients(
        name=folder.name,
        slow_start=slow_start_end(config),
        steps_per_epoch=_steps_per_epoch(folder),
        norms=norms,
        norms_from='records' if recorded_norms else 'checkpoints',
        steps=steps,
        gradients=gradients,
        gradients_from='records' if recorded_gradients else 'checkpoints',
        notes=notes,
    )


def _replay_gradients(
    replay: Replay, smallest: float, batches: int
) -> tuple[list[NormRecord], torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Norms, steps [N], gradients of the last layer [N, D] and notes of all checkpoints."""
    layers, last = layer_slices(replay.method, smallest), last_linear(replay.method)
    norms, gradients = [], []
    notes: dict[str, None] = {}
    for step in tqdm(replay.steps, desc=f'{replay.folder.name}: checkpoints', unit='checkpoint', dynamic_ncols=True):
        replay.load(step)
        replay.losses(replay.next_steps(batches), backward=True)
        within, total, rest = mean_norms(layers).tolist()
        norms.append(NormRecord(step, smallest, within, total, rest, len(replay.schedule.widths_at(step))))
        assert last.grad is not None
        gradients.append(last.grad.flatten().cpu())
        notes |= dict.fromkeys(replay.notes)
    return norms, torch.tensor(replay.steps), torch.stack(gradients), tuple(notes)


def _steps_per_epoch(folder: Path) -> int:
    # A checkpoint tells it without the images.
    for path in (folder / 'checkpoints').glob('step-????????/state.json'):
        return json.loads(path.read_text())['steps_per_epoch']
    return Replay(folder).schedule.steps_per_epoch


@dataclass(frozen=True)
class Phase:
    """Means over a run's slow start, over the epochs after it, or over all epochs of a run without slow start.

    Args:
        name: `all`, or `before S` and `after S`.
        norms: Steps with gradient norms.
        all_ratio: Norm of the whole gradient over that of the smallest width's slice (Fig. 3).
        rest_ratio: Norm of the rest over that of the smallest width's slice (Fig. 3).
        gradients: Steps with a gradient of the last layer.
        length: Norm of the last layer's gradient.
        consecutive: Cosine of one gradient and the next.
        pairwise: Cosine of all pairs: 1 if all have one direction, 0 if they have none in common.
        explained: Share of the squared length of these gradients, each of unit length, along their first and second
            principal component.
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
    """Summarise the phases of a run that have at least one step."""
    names = ('all',) if run.slow_start is None else ('before S', 'after S')
    found = []
    for name in names:

        def chosen(step: int, name: str = name) -> bool:
            return name == 'all' or run.in_slow_start(step) == (name == 'before S')

        records = [record for record in run.norms if chosen(record.step)]
        gradients = run.gradients[torch.tensor([chosen(step) for step in run.steps.tolist()], dtype=torch.bool)]
        consecutive, pairwise = mean_cosines(gradients)
        found.append(
            Phase(
                name=name,
                norms=len(records),
                all_ratio=_mean([record.all_ratio for record in records]),
                rest_ratio=_mean([record.rest_ratio for record in records]),
                gradients=len(gradients),
                length=_mean(gradients.norm(dim=1).tolist()),
                consecutive=consecutive,
                pairwise=pairwise,
                explained=_explained(gradients),
            )
        )
    return [phase for phase in found if phase.norms or phase.gradients]


def components(gradients: torch.Tensor, unit_length: bool = False) -> Components:
    """First two principal components of gradients [N, D] about the origin (paper, Fig. 4).

    Args:
        gradients: Gradients of the last layer.
        unit_length: Scale each gradient to unit length, so that every step counts alike, and the length of a projection
            is the share of the direction that lies in the plane. Otherwise, as in the paper, large gradients decide on
            the plane, and projections show sizes as well as directions.
    """
    rows = gradients.double()
    return principal_components(F.normalize(rows, dim=1) if unit_length else rows, 2, rows.new_zeros(rows.shape[1]))


def mean_cosines(gradients: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of consecutive rows of [N, D], and of all pairs; nan for fewer than two rows."""
    if len(gradients) < 2:
        return nan, nan
    rows = F.normalize(gradients.double(), dim=1)
    cosines = rows @ rows.T
    pairs = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    return cosines.diagonal(1).mean().item(), cosines[pairs].mean().item()


def _explained(gradients: torch.Tensor) -> tuple[float, float]:
    if len(gradients) < 2:
        return nan, nan
    first, second = components(gradients, unit_length=True).ratios.tolist()
    return first, second


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value)]
    return fmean(finite) if finite else nan
