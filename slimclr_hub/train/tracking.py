"""The tracker that the user chose, through accelerate."""

import json
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.settings import flatten
from slimclr_hub.text import first_line
from slimclr_hub.train.config import TrackerConfig

_IDENTITY = 'tracker.json'


def start_tracker(config: Any, tracking: TrackerConfig, accelerator: Accelerator, folder: Path, step: int) -> None:
    """Start the run at the tracker, or go on with it where this folder has begun one.

    `config` is the configuration that the tracker records, and `accelerator` was made with `log_with`. File-based
    trackers write to `folder`. Values after `step` are logged again.

    Raises:
        InputError: The tracker's client fails, or `tracker.json` holds something else.
    """
    tracker = tracking.tracker
    if tracker == 'none':
        return
    folders = accelerator.project_configuration
    folders.project_dir = folders.logging_dir = str(folder)
    values = {key: str(value) for key, value in flatten(config).items()}
    options = {tracker: _options(tracker, folder, step, accelerator)}
    try:
        accelerator.init_trackers(tracking.project, config=values, init_kwargs=options)
    except Exception as error:  # of any client, such as one that is not logged in
        raise InputError(f'run.tracker {tracker} does not begin a run: {first_line(error)}') from error


def _options(tracker: str, folder: Path, step: int, accelerator: Accelerator) -> dict[str, Any]:
    if tracker == 'tensorboard':
        # Points that an interrupted run logged after its last checkpoint would otherwise be drawn a second time.
        return {'purge_step': step + 1} if step else {}
    if tracker == 'wandb':
        return {'name': folder.name, 'id': identity(folder, accelerator), 'resume': 'allow'}
    if tracker == 'trackio':
        return {'name': folder.name, 'resume': 'allow'}
    return {}


def identity(folder: Path, accelerator: Accelerator) -> str:
    """Name of the run in a folder at its tracker, made by the main process where there is none; others have none.

    Raises:
        InputError: `tracker.json` in the folder holds something else.
    """
    path = folder / _IDENTITY
    if accelerator.is_main_process and not path.exists():
        write_text(path, json.dumps({'id': uuid.uuid4().hex}))
    try:
        return str(json.loads(path.read_bytes())['id']) if path.exists() else ''
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} does not name a run of a tracker ({first_line(error)}); move it away to begin one there'
        ) from error
