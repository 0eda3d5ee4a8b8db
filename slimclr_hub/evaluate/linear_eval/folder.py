"""The folder of a linear evaluation: a new one, one to go on with, or one that is finished already.

FOLDER/settings.json        the configuration, and a hash of the network's weights
       checkpoints/         while it runs
       probe.safetensors    the linear layers, for features as the network gives them
       metrics.jsonl        one line an epoch: loss and accuracies of every learning rate
       accuracy.png, .pdf   the figure
       result.json          the accuracies; its presence makes it finished
"""

import json
import os
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig
from slimclr_hub.evaluate.result import RESULT
from slimclr_hub.evaluate.subject import default_output
from slimclr_hub.files import write_text
from slimclr_hub.settings import plain

SETTINGS = 'settings.json'
# What may differ between two calls that belong to one result.
_FREE = ('network', 'save_to')
_FREE_OF = {'run': ('output',), 'features': ('cache',)}


def choose_folder(config: LinearEvalConfig, weights: str, accelerator: Accelerator) -> Path:
    """The folder of these settings, found or made by the main process.

    Args:
        config: The configuration.
        weights: Hash of the network's weights.
        accelerator: The processes; all of them ask together.

    Raises:
        InputError: `run.output` has a result of other settings, or cannot be written to.
    """
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            chosen[0] = _choose(config, weights)
        except (InputError, OSError) as error:
            chosen[0] = InputError(str(error))
    result = broadcast_object_list(chosen)[0]
    if isinstance(result, Exception):
        raise result
    return result


def is_finished(folder: Path) -> bool:
    """Whether the evaluation in a folder has its result."""
    return (folder / RESULT).is_file()


def check_save_to(config: LinearEvalConfig) -> None:
    """Find out before any work whether the network can be written to `save_to`.

    Raises:
        InputError: It is not an empty folder, or lies where nothing can be written.
    """
    if config.save_to is None:
        return
    folder = Path(config.save_to)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f'save_to {folder} is there already; give the name of a new folder, or remove it')
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f'save_to {folder}: {parent} is not a folder that can be written to; give another one')


def _choose(config: LinearEvalConfig, weights: str) -> Path:
    settings = {**_binding(config), 'weights': weights}
    first = Path(config.run.output) if config.run.output is not None else default_output(config.network, 'linear_eval')
    for number in count(1):
        folder = first if number == 1 else first.with_name(f'{first.name}-{number}')
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings, indent=2) + '\n')
            return folder
        changes = _changes(folder, settings)
        if not changes:
            return folder
        if config.run.output is not None:
            raise InputError(f'run.output {folder} has {"; ".join(changes)}; give another run.output, or these values')
    raise AssertionError


def _changes(folder: Path, settings: dict[str, Any]) -> list[str]:
    try:
        recorded = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        return ['no linear evaluation, but other files']
    before, after = _flat(recorded), _flat(settings)
    return [
        'been made of other weights' if key == 'weights' else f'{key} {before.get(key)}, not {after.get(key)}'
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _binding(config: LinearEvalConfig) -> dict[str, Any]:
    content = plain(asdict(config))
    for key in _FREE:
        del content[key]
    for section, keys in _FREE_OF.items():
        for key in keys:
            del content[section][key]
    data = config.data
    content['data'] = {**data.fingerprint(), 'batch_size': data.batch_size, 'shuffle_buffer': data.shuffle_buffer}
    content['optim']['lr'] = list(config.optim.rates)
    return content


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= {f'{name}.{key}': item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
