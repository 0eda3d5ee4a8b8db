"""The command line of pre-training: a new run by a recipe, or the continuation of one in its folder."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring

from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.objective import Objective
from slimclr_hub.methods.registry import Training, settings_of
from slimclr_hub.runs.command_line import (
    check_recorded,
    config_of,
    early,
    make_parser,
    names_to_import,
    parse,
    read_recipes,
)
from slimclr_hub.settings import RECIPE, differences
from slimclr_hub.train.config import MethodConfig, PretrainConfig

AUTO = Path('auto')
"""As `--resume auto`: the newest run of this recipe, or a new one."""

_LAUNCHER_PRECISION = 'ACCELERATE_MIXED_PRECISION'


@dataclass(frozen=True)
class Command:
    """A run by a configuration, or the continuation of one in a folder.

    Args:
        config: The configuration.
        resume: Folder of the run to go on with; `AUTO` for the newest of this configuration, if any.
        allow_changes: True if a resumed run may have another configuration than it was started with.
    """

    config: PretrainConfig
    resume: Path | None = None
    allow_changes: bool = False


def parse_pretrain(default: Path, argv: Sequence[str] | None = None) -> Command:
    """Read the command line; the recipe `default` applies where it names none, and a run's own where it resumes one.

    Raises:
        InputError: A key or value is wrong, a file or run is missing, or a resumed run would get other values.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    folder = early(argv, '--resume')
    if folder is not None and Path(folder) != AUTO:
        recorded = Path(folder) / RECIPE
        if not recorded.is_file():
            raise InputError(f'--resume {folder}: not the folder of a run, it has no {RECIPE}')
        check_recorded(recorded, names_to_import(argv))
        command = _parse([f'--config={recorded}', *argv])
        check_unchanged(load_recipe(recorded), command)
        _check_launcher(command)
        return command
    if early(argv, '--config') is None:
        argv = [f'--config={default}', *argv]
    return _parse(argv)


def load_recipe(path: Path) -> PretrainConfig:
    """The configuration that a run has recorded; an InputError if it would run code that came with it."""
    check_recorded(path)
    return _parse([f'--config={path}']).config


def changes(recorded: PretrainConfig, config: PretrainConfig) -> list[str]:
    """Differences that make a run another one, as `key old -> new`.

    Recipes of earlier versions do not tell the precision where accelerate chose it; any is taken for theirs.
    """
    if recorded.run.precision is None:
        recorded = replace(recorded, run=replace(recorded.run, precision=config.run.precision))
    by_name = [
        replace(each, imports={Path(file).name: digest for file, digest in each.imports.items()})
        for each in (recorded, config)
    ]
    return differences(*by_name)


def check_unchanged(recorded: PretrainConfig, command: Command) -> None:
    """Raise an InputError with each difference if a run would resume with other values, unless that is allowed."""
    found = changes(recorded, command.config)
    if found and not command.allow_changes:
        raise InputError(
            f'--resume would change the run: {"; ".join(found)}; drop these, start a new run, or give '
            '--allow_changes true'
        )


def _check_launcher(command: Command) -> None:
    """Refuse a precision of the launcher that a resumed run would not take."""
    precision, told = command.config.run.precision, os.environ.get(_LAUNCHER_PRECISION, 'no')
    if precision is not None and told not in ('no', precision):
        raise InputError(
            f'--resume would change the run: run.precision {precision} -> {told}, of accelerate launch '
            f'--mixed_precision; drop that, or give --run.precision {told} --allow_changes true'
        )


def _parse(argv: Sequence[str]) -> Command:
    read_recipes(argv)  # files to import may register methods, which the parser has to know
    parser = make_parser(
        PretrainConfig,
        'pretrain.py',
        '[--config FILE] [--resume FOLDER] [--import FILE]',
        'Pre-train a slimmable network.',
        {'method': _method_section()},
    )
    parser.add_argument(
        '--resume',
        type=Path | None,
        default=None,
        help='folder of a run to go on with; auto for the newest run of this recipe, or a new one where there is none',
    )
    parser.add_argument(
        '--allow_changes', type=bool, default=False, help='resume although the configuration is another one'
    )
    built = parse(parser, argv)
    config = config_of(PretrainConfig, built, method=MethodConfig(**vars(built.method)))
    return Command(config, built.resume, built.allow_changes)


def _method_section() -> type:
    """A dataclass with the settings of all methods, each None by default, for the parser and its help."""
    types: dict[str, Any] = {}
    words: dict[str, str] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        described = {
            each.arg_name: ' '.join((each.description or '').split())
            for documented in (Training, Objective, method)
            for each in parse_docstring(documented.__doc__ or '').params
        }
        for key, setting in settings_of(name).items():
            types.setdefault(key, setting.type)
            words.setdefault(key, described.get(key, setting.help))
            defaults.setdefault(key, {})[name] = 'to be given' if setting.required else setting.default
    lines = [f'    name: {", ".join(METHODS)}.']
    for key, values in defaults.items():
        shown = ', '.join(f'{name} {"null" if value is None else value}' for name, value in values.items())
        lines.append(f'    {key}: {words[key].rstrip(".")}: {shown}.')
    section = make_dataclass(
        'MethodSection', [('name', str, 'mocov2'), *((key, hint | None, None) for key, hint in types.items())]
    )
    section.__doc__ = '\n'.join(['Settings of the method.', '', 'Args:', *lines])
    return section
