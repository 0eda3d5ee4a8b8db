"""A run's folder: recipe, metrics and checkpoints, each written whole or not at all.

runs/NAME/recipe.yaml           the configuration
          metrics.jsonl         one JSON object a line: training every few steps, evaluation by epoch
          diagnostics/          gradients and weights over training, where `diagnostics:` asks for them
          checkpoints/step-N/   the state after step N, to go on from
          config.json, model.safetensors, README.md, ...   the result
"""

from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError
from slimclr_hub.files import append_json_line, write_json_lines, write_text
from slimclr_hub.runs.command_line import dump
from slimclr_hub.runs.result import METRICS, read_metrics
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import changes, load_recipe
from slimclr_hub.train.config import PretrainConfig


class RunFolder:
    """The existing folder of one run, which the main process writes."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self._accelerator = accelerator
        self._metrics = path / METRICS
        if not path.is_dir():
            raise InputError(
                f'{path} is not there on process {accelerator.process_index}; let run.output be on a file system that '
                'all machines share'
            )

    @classmethod
    def create(cls, config: PretrainConfig, accelerator: Accelerator) -> 'RunFolder':
        """Make the folder of a new run and write its recipe; an InputError if the folder `run.name` exists."""

        def make() -> Path:
            try:
                path = _make_folder(config)
                write_text(path / RECIPE, dump(config))
            except (InputError, OSError) as error:
                raise InputError(f'run.output {config.run.output}, run.name {config.run.name}: {error}') from error
            return path

        return cls(from_main_process(make), accelerator)

    def keep_recipe(self, config: PretrainConfig, step: int) -> None:
        """Let the recipe be `config` from `step` on; the one that trained until then stays beside it."""
        if self._accelerator.is_main_process and load_recipe(self.path / RECIPE) != config:
            until = self.path / f'recipe-until-step-{step}.yaml'
            if not until.exists():  # or no step has been taken since
                write_text(until, (self.path / RECIPE).read_text(encoding='utf-8'))
            write_text(self.path / RECIPE, dump(config))
        self._accelerator.wait_for_everyone()

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; `record` has its optimizer step under `step`."""
        if self._accelerator.is_main_process:
            append_json_line(self._metrics, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; an InputError if one is something else."""
        return read_metrics(self._metrics)

    def drop_metrics_after(self, step: int, evaluation_too: bool = False) -> None:
        """Forget lines after `step`, which a resumed run writes again.

        With `evaluation_too`, forget an evaluation at `step` as well.
        """
        if self._accelerator.is_main_process and (records := self.read_metrics()):
            write_json_lines(
                self._metrics,
                (
                    record
                    for record in records
                    if record['step'] < step
                    or (record['step'] == step and not (evaluation_too and record['kind'] != 'train'))
                ),
            )

    def put_metrics_aside(self) -> Path | None:
        """Move the metrics of a run that begins anew to a free name, and return that; None where there are none."""
        if not self._accelerator.is_main_process or not self.read_metrics():
            return None
        names = (self.path / f'metrics-before-restart-{number}.jsonl' for number in count(1))
        aside = next(name for name in names if not name.exists())
        return self._metrics.rename(aside)


def find_run(config: PretrainConfig, accelerator: Accelerator) -> Path | None:
    """Folder that `--resume auto` continues, found by the main process: run.name's, or the newest of this recipe."""
    return from_main_process(lambda: _find_run(config))


def _find_run(config: PretrainConfig) -> Path | None:
    output = Path(config.run.output)
    if config.run.name is not None:
        path = output / config.run.name
        return path if (path / RECIPE).is_file() else None
    runs = [path.parent for path in output.glob(f'*/{RECIPE}') if _is_of(path, config)]
    return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()), default=None)


def _is_of(recipe: Path, config: PretrainConfig) -> bool:
    try:
        return not changes(load_recipe(recipe), config)
    except InputError:  # of another version, or by another hand
        return False


def _make_folder(config: PretrainConfig) -> Path:
    output = Path(config.run.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.run.name is not None:
        path = output / config.run.name
        try:
            path.mkdir()
        except FileExistsError as error:
            if not path.is_dir() or any(path.iterdir()):  # an empty one was left by a process that was killed
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
