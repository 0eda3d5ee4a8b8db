"""Shared parts of the analyses: description of a command, its runs, and its files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimclr_hub.analysis.replay import recipe_of
from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.settings import Incidental, differences


@dataclass(frozen=True)
class Analysis:
    """An analysis command.

    Args:
        config: Frozen dataclass of its options, each `--key value` on the command line.
        work: Runs the analysis on its arguments, with its options; prints a table and the paths of its files.
        arguments: Its arguments, as the usage shows them.
        about: One sentence for its help.
        defaults: Returns defaults of options for the command line, so that they may depend on the first argument.
    """

    config: type
    work: Callable[[Sequence[str], Any], None]
    arguments: str
    about: str
    defaults: Callable[[Sequence[str]], Mapping[str, Any]] = lambda argv: {}


@dataclass(frozen=True)
class OutputOption(Incidental):
    """Option for the folder of an analysis.

    Args:
        output: Folder of figures and data; `analysis` in the folder of the first run by default.
    """

    output: str | None = None


def run_folders(runs: Sequence[str]) -> list[Path]:
    """Return the full paths of runs; refuse what is not the folder of a run, and one that is given twice."""
    folders = [Path(run).resolve() for run in runs]
    for folder in folders:
        recipe_of(folder)
    if len({*folders}) < len(folders):
        raise InputError(f'a run is given twice: {" ".join(runs)}; drop one')
    return folders


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Return the names of runs, with the parent folder's name in front if two runs share theirs."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else f'{folder.parent.name}-{name}'
        for folder, name in zip(folders, names, strict=True)
    ]


def output_stem(kind: str, folders: Sequence[Path], output: str | None) -> Path:
    """Path without suffix for the files of an analysis of runs: in `output`, or in the first run's own folder."""
    labels = labels_of(folders)
    folder = Path(output) if output is not None else folders[0] / 'analysis'
    return folder / '+'.join([kind, *(labels if output is not None else labels[1:])])


def read_data(stem: Path, settings: Mapping[str, Any]) -> Any:
    """Read the results that an earlier call with the same settings wrote to `stem`.json; None if there is no file.

    Raises:
        InputError: The file holds results of other settings, or something else.
    """
    file = _data_file(stem)
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        changes = differences(content['settings'], settings)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file} is not the data of an analysis ({error!r}); remove it, or give --output') from error
    if changes:
        raise InputError(f'{file} has results of other settings ({"; ".join(changes)}); give --output, or remove it')
    return content


def write_data(stem: Path, settings: Mapping[str, Any], **results: Any) -> None:
    """Write results and their settings to `stem`.json; the folder is made if needed."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text(_data_file(stem), json.dumps({'settings': settings, **results}, indent=1) + '\n')


def _data_file(stem: Path) -> Path:
    return stem.with_name(f'{stem.name}.json')  # not with_suffix: names such as `alone-0.5` contain dots
