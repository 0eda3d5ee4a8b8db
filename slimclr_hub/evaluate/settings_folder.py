"""The folder of a job's results, found again by its settings: the same command goes on, other settings begin anew."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.network import changes
from slimclr_hub.files import write_text
from slimclr_hub.runs.lock import folder_lock
from slimclr_hub.settings import relevant

SETTINGS = 'settings.json'


def find_folder(settings: Mapping[str, Any], default: Path, output: str | None, job: str) -> Path:
    """Find the folder of these settings, or make one.

    Args:
        settings: The settings that decide the result, and under `weights` a hash of the network.
        default: The folder where `output` is None; `default-2` and so on where it has results of other settings.
        output: The folder that was asked for.
        job: Name of the job, for messages.

    Raises:
        InputError: `output` has something else in it.
    """
    first = Path(output or default)
    folder = first
    for number in count(2):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings, indent=2) + '\n')
            break
        differing = _changes(folder, settings, job)
        if not differing:
            break
        if output is not None:
            raise InputError(
                f'run.output {folder} has {"; ".join(differing)}; give another run.output, or these values'
            )
        folder = first.with_name(f'{first.name}-{number}')
    return folder


@contextmanager
def working_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of a job's results; an InputError that leaves nothing but its settings removes it."""
    try:
        with folder_lock(folder, accelerator):
            yield
    except InputError:
        if accelerator.is_main_process and {path.name for path in folder.iterdir()} == {SETTINGS}:
            shutil.rmtree(folder)
        raise


def _changes(folder: Path, settings: Mapping[str, Any], job: str) -> list[str]:
    try:
        recorded = relevant(json.loads((folder / SETTINGS).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return [f'no {job}, but other files']
    if recorded.get('run.precision') is None:  # one of before it was recorded where accelerate chose it
        recorded.pop('run.precision', None)
    return changes(recorded, settings)
