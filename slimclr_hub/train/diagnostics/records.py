"""What a run leaves of its gradients and weights, in files that a resumed run goes on with.

runs/NAME/diagnostics/gradients.jsonl               norms: one JSON object for each recorded step
                      last-layer-STEP.safetensors   gradients of the last linear layer, from STEP on
                      weights-STEP.safetensors      trained weights after STEP steps

A record under `step` is of the weights after so many steps, and of the gradients by which the next one moved them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text, written_whole

FOLDER = 'diagnostics'
_NORMS = 'gradients.jsonl'
_LAST_LAYER = 'last-layer-????????.safetensors'
_WEIGHTS = 'weights-????????.safetensors'


@dataclass(frozen=True)
class NormRecord:
    """Gradient norms of one step, averaged over layers (paper, Fig. 3).

    Args:
        step: Steps taken before.
        width: The smallest width.
        smallest: Within the slices of that width.
        all: Of all.
        rest: Outside these slices.
        widths: How many widths the step trained.
    """

    step: int
    width: float
    smallest: float
    all: float
    rest: float
    widths: int

    @property
    def all_ratio(self) -> float:
        """All over smallest."""
        return self.all / self.smallest if self.smallest else float('nan')

    @property
    def rest_ratio(self) -> float:
        """Rest over smallest."""
        return self.rest / self.smallest if self.smallest else float('nan')


class Records:
    """The records of one run.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def add_norms(self, records: Sequence[NormRecord]) -> None:
        """Append norms."""
        if records:
            self.folder.mkdir(exist_ok=True)
            with (self.folder / _NORMS).open('a') as file:
                file.writelines(json.dumps(asdict(record)) + '\n' for record in records)

    def norms(self) -> list[NormRecord]:
        """All norms, in order of steps.

        Raises:
            InputError: The file holds something else.
        """
        path = self.folder / _NORMS
        try:
            return [NormRecord(**values) for values in self._lines()]
        except TypeError as error:
            raise InputError(f'{path} does not hold gradient norms ({error}); move it away') from error

    def add_gradients(self, steps: Sequence[int], gradients: torch.Tensor) -> None:
        """Write gradients [N, D] of the last layer after `steps`."""
        tensors = {'steps': torch.tensor(steps), 'gradients': gradients}
        self._save(f'last-layer-{steps[0]:08d}.safetensors', tensors)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps [N] and gradients of the last layer [N, D], in order of steps; N is 0 where there are none."""
        chunks = [load_file(path) for path in sorted(self.folder.glob(_LAST_LAYER))]
        if not chunks:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, 0)
        return torch.cat([chunk['steps'] for chunk in chunks]), torch.cat([chunk['gradients'] for chunk in chunks])

    def add_weights(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the trained weights after `step`."""
        self._save(f'weights-{step:08d}.safetensors', tensors)

    def drop_from(self, step: int) -> None:
        """Forget records of `step` and later, which a run that goes on from there makes again."""
        if not self.folder.is_dir():
            return
        if (self.folder / _NORMS).exists():
            kept = [json.dumps(record) + '\n' for record in self._lines() if record['step'] < step]
            write_text(self.folder / _NORMS, ''.join(kept))
        for path in self.folder.glob(_LAST_LAYER):
            chunk = load_file(path)
            kept_steps = chunk['steps'] < step
            if not kept_steps.any():
                path.unlink()
            elif not kept_steps.all():
                self._save(path.name, {name: tensor[kept_steps] for name, tensor in chunk.items()})
        for path in self.folder.glob(_WEIGHTS):
            if int(path.stem.removeprefix('weights-')) >= step:
                path.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / _NORMS
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a kill cut off
                continue
        return found

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        with written_whole(self.folder) as partial:
            save_file(dict(tensors), partial / name)
