"""A run's folder: recipe, metrics and checkpoints, each written whole or not at all.

runs/NAME/recipe.yaml           the configuration
          metrics.jsonl         one JSON object a line: training every few steps, evaluation by epoch
          checkpoints/epoch-N/  the state after epoch N, to go on from
          config.json, model.safetensors, README.md, ...   the result
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slimclr_hub.errors import InputError
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.parse import RECIPE, dump_recipe

_STATE = 'state.json'


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder, which exists.
        accelerator: Its main process writes.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self._accelerator = accelerator
        self._metrics = path / 'metrics.jsonl'
        self._checkpoints = path / 'checkpoints'

    @classmethod
    def create(cls, config: PretrainConfig, accelerator: Accelerator) -> 'RunFolder':
        """Make the folder of a new run and write its recipe.

        Raises:
            InputError: `run.name` is given and a folder of that name is there already.
        """
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                chosen[0] = _make_folder(config)
                write_text(chosen[0] / RECIPE, dump_recipe(config))
            except (InputError, OSError) as error:
                chosen[0] = InputError(f'run.output {config.run.output}, run.name {config.run.name}: {error}')
        return cls(_agree(chosen, accelerator), accelerator)

    # Metrics

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; `record` has its optimizer step under `step`."""
        if self._accelerator.is_main_process:
            with self._metrics.open('a') as file:
                file.write(json.dumps(record) + '\n')

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of later steps, which a resumed run writes again."""
        if self._accelerator.is_main_process and self._metrics.exists():
            kept = []
            for line in self._metrics.read_text().splitlines():
                try:
                    if json.loads(line)['step'] <= step:
                        kept.append(line + '\n')
                except json.JSONDecodeError:  # the line that a kill cut off
                    continue
            write_text(self._metrics, ''.join(kept))

    # Checkpoints

    def save_checkpoint(self, epoch: int, step: int, keep: int) -> None:
        """Write the state of all processes after `epoch`, then remove all but the last `keep` checkpoints."""
        final = self._checkpoints / f'epoch-{epoch:04d}'
        partial = self._checkpoints / f'{final.name}.partial'
        if self._accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            write_text(partial / _STATE, json.dumps({'epoch': epoch, 'step': step}))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            for old in self._complete()[:-keep]:
                shutil.rmtree(old)
        self._accelerator.wait_for_everyone()

    def load_checkpoint(self) -> tuple[int, int]:
        """Load the newest complete checkpoint into what the accelerator prepared.

        Returns:
            The epoch and the optimizer step after which it was written; (0, 0) where there is none yet.
        """
        complete = self._complete()
        if not complete:
            return 0, 0
        self._accelerator.load_state(str(complete[-1]))
        state = json.loads((complete[-1] / _STATE).read_text())
        return state['epoch'], state['step']

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._checkpoints.glob(f'epoch-????/{_STATE}'))


def write_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, never a part."""
    partial = path.with_name(f'{path.name}.partial')
    with partial.open('w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _make_folder(config: PretrainConfig) -> Path:
    output = Path(config.run.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.run.name is not None:
        path = output / config.run.name
        try:
            path.mkdir()
        except FileExistsError as error:
            raise InputError(
                f'{path} is there already; go on with it by --resume {path}, or give another run.name'
            ) from error
        return path
    data = config.data.name.strip('/').replace('/', '-')
    stem = f'{config.method.name}_{config.model.name}_{data}_{config.optim.epochs}e'
    number = 1
    while True:
        path = output / (stem if number == 1 else f'{stem}-{number}')
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _agree(chosen: list[Any], accelerator: Accelerator) -> Path:
    result = broadcast_object_list(chosen)[0]
    if isinstance(result, Exception):
        raise result
    return result
