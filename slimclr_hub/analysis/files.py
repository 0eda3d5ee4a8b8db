"""Where data and figures of analyses lie, and that those of other settings are not replaced."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Names of runs, with the folder above where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f'{folder.resolve().parent.name}-{name}'
        for folder, name in zip(folders, names, strict=True)
    ]


def stem_of(kind: str, folders: Sequence[Path], output: str | None) -> Path:
    """Where files of an analysis of runs lie, without suffix: by default in the folder of the first run."""
    labels = labels_of(folders)
    folder = Path(output) if output is not None else folders[0] / 'analysis'
    return folder / '+'.join([kind, *(labels if output is not None else labels[1:])])


def data_file(stem: Path) -> Path:
    """The JSON file of a stem, in which a dot, as in `alone-0.5`, begins no suffix."""
    return stem.with_name(f'{stem.name}.json')


def check_settings(file: Path, settings: dict[str, Any]) -> Any:
    """What a file holds already, if it is of the same settings.

    Raises:
        InputError: It is of others.
    """
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        before = content['settings']
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file} is not the data of an analysis ({error!r}); remove it, or give --output') from error
    asked = json.loads(json.dumps(settings))
    if before != asked:
        changed = [key for key in {**before, **asked} if before.get(key) != asked.get(key)]
        listed = ', '.join(f'{key} {textwrap.shorten(str(before.get(key)), 60)}' for key in changed)
        raise InputError(f'{file} is by other settings ({listed}); give another --output, or remove it')
    return content
