"""Gradients of a run over its training: those that it recorded, else those of its checkpoints' next steps."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from slimclr_hub.analysis.replay import Replay, checkpoint_steps, recipe_of
from slimclr_hub.errors import InputError
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.diagnostics.norms import last_linear, layer_slices, mean_norms
from slimclr_hub.train.diagnostics.records import NormRecord, Records

LEAST = 3
"""Gradients of the last layer from which two principal components say something."""


@dataclass(frozen=True)
class RunGradients:
    """Gradients of one run.

    Args:
        name: Name of the run.
        config: Its configuration.
        steps_per_epoch: Optimizer steps in an epoch.
        norms: Norms, in order of steps.
        norms_from: `records` of the run, or its `checkpoints`.
        steps: [N], steps of `gradients`, in order.
        gradients: [N, D], those of the last linear layer.
        gradients_from: As `norms_from`.
        notes: What a reader must know, a sentence each.
    """

    name: str
    config: PretrainConfig
    steps_per_epoch: int
    norms: list[NormRecord]
    norms_from: str
    steps: torch.Tensor
    gradients: torch.Tensor
    gradients_from: str
    notes: tuple[str, ...] = ()

    @property
    def slow_start(self) -> float | None:
        """Epoch at which narrower widths begin; none where the run has no such point."""
        config = self.config
        begins = 0 < config.slow_start < config.optim.epochs and len(config.model.widths) > 1
        return config.slow_start if begins else None

    def starts_slowly(self, step: int) -> bool:
        """Whether the step after `step` is before the slow-start point."""
        return self.slow_start is not None and step < self.slow_start * self.steps_per_epoch


def gradients_of(
    folder: Path, *, smallest: float | None = None, batches: int = 1, from_checkpoints: bool = False
) -> RunGradients:
    """Gradients of a run, by its own records where it has them.

    Args:
        folder: Folder of the run.
        smallest: Width whose share is measured at checkpoints; what the run's `diagnostics.smallest` says unless given.
        batches: Batches to average the gradient of a checkpoint over.
        from_checkpoints: Do not use records.

    Raises:
        InputError: There are neither records nor checkpoints enough, or the checkpoints do not fit the run.
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
    recorded_norms, recorded_gradients = bool(norms), len(steps) >= LEAST
    notes: tuple[str, ...] = ()
    if not (recorded_norms and recorded_gradients):
        _check_checkpoints(folder)
        diagnostics = replace(config.diagnostics, smallest=smallest or config.diagnostics.smallest)
        width = diagnostics.smallest_of(config.model.widths, config.model.overlap)
        measured = _replayed(Replay(folder), width, batches)
        norms = norms or measured.norms
        if not recorded_gradients:
            steps, gradients = measured.steps, measured.gradients
        notes = measured.notes
    return RunGradients(
        name=folder.name,
        config=config,
        steps_per_epoch=_steps_per_epoch(folder),
        norms=norms,
        norms_from='records' if recorded_norms else 'checkpoints',
        steps=steps,
        gradients=gradients,
        gradients_from='records' if recorded_gradients else 'checkpoints',
        notes=notes,
    )


@dataclass(frozen=True)
class _Measured:
    norms: list[NormRecord]
    steps: torch.Tensor
    gradients: torch.Tensor
    notes: tuple[str, ...]


def _replayed(replay: Replay, smallest: float, batches: int) -> _Measured:
    layers, last = layer_slices(replay.method, smallest), last_linear(replay.method)
    norms, gradients, notes = [], [], []
    for step in tqdm(replay.steps, desc=f'{replay.folder.name}: checkpoints', unit='checkpoint', dynamic_ncols=True):
        replay.load(step)
        replay.losses(replay.next_steps(batches), backward=True)
        within, total, rest = mean_norms(layers).tolist()
        norms.append(NormRecord(step, smallest, within, total, rest, len(replay.schedule.widths_at(step))))
        assert last.grad is not None
        gradients.append(last.grad.flatten().cpu())
        notes += [note for note in replay.notes if note not in notes]
    return _Measured(norms, torch.tensor(replay.steps), torch.stack(gradients), tuple(notes))


def _check_checkpoints(folder: Path) -> None:
    if (count := len(checkpoint_steps(folder))) < LEAST:
        raise InputError(
            f'{folder} has recorded too few gradients, and has {count} checkpoints; train with --diagnostics.every 10 '
            f'--diagnostics.gradients 10, or keep {LEAST} checkpoints or more by run.keep_checkpoints'
        )


def _steps_per_epoch(folder: Path) -> int:
    """As a checkpoint of the run says, which does not ask for the images."""
    for path in (folder / 'checkpoints').glob('step-????????/state.json'):
        return json.loads(path.read_text())['steps_per_epoch']
    return Replay(folder).schedule.steps_per_epoch
