"""Configuration from a recipe file and the command line."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from slimclr_hub.errors import InputError
from slimclr_hub.train.config import PretrainConfig

RECIPE = 'recipe.yaml'
"""File in a run's folder that holds its configuration."""

_FREE_ON_RESUME = ('data.root', 'data.num_workers', 'data.download', 'knn.', 'run.')
_FIXED_ON_RESUME = ('run.seed', 'run.precision', 'run.channels_last')


@dataclass(frozen=True)
class Command:
    """What the command line asks for: a run by a configuration, or the continuation of one in a folder."""

    config: PretrainConfig
    resume: Path | None = None


def parse_pretrain(default: Path, argv: Sequence[str] | None = None) -> Command:
    """Read the command line; the recipe `default` applies where it names none, and a run's own where it resumes one.

    Raises:
        InputError: A key or value is wrong, a file or run is not there, or a run is resumed with other values than it
            was started with.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    folder = _early(argv, '--resume')
    if folder is not None:
        recorded = Path(folder) / RECIPE
        if not recorded.is_file():
            raise InputError(f'--resume {folder}: not the folder of a run, it has no {RECIPE}')
        command = _parse([f'--config={recorded}', *argv])
        _check_unchanged(load_recipe(recorded), command.config)
        return command
    if _early(argv, '--config') is None:
        argv = [f'--config={default}', *argv]
    return _parse(argv)


def load_recipe(path: Path) -> PretrainConfig:
    """The configuration in a file, as `--config` reads it."""
    return _parse([f'--config={path}']).config


def dump_recipe(config: PretrainConfig) -> str:
    """The configuration as YAML that `--config` reads."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def flatten(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as `section.key` -> value."""
    return {
        f'{name}.{key}': value for name, section in _plain(asdict(config)).items() for key, value in section.items()
    }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog='pretrain.py',
        usage='accelerate launch recipes/pretrain.py [--config FILE] [--resume FOLDER] [--section.key VALUE ...]',
        description='Pre-train a slimmable network.',
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument('--config', action='config', help='a recipe, such as one of recipes/configs')
    parser.add_argument('--resume', type=Path | None, default=None, help='folder of a run to go on with')
    parser.add_class_arguments(PretrainConfig, as_group=False)
    return parser


def _parse(argv: Sequence[str]) -> Command:
    parser = _parser()
    try:
        built = parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        message = ' '.join(str(error).split())
        if message.startswith('Problems parsing config'):
            message = f'{_early(argv, "--config")}: {message}'
        raise InputError(message) from error
    return Command(PretrainConfig(**{name: built[name] for name in PretrainConfig.__dataclass_fields__}), built.resume)


def _early(argv: Sequence[str], option: str) -> str | None:
    # Which recipe lies underneath has to be known before the real parser reads the values on top of it.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument(option, dest='value', nargs='?')
    return early.parse_known_args(argv)[0].value


def _check_unchanged(recorded: PretrainConfig, config: PretrainConfig) -> None:
    before, after = flatten(recorded), flatten(config)
    changes = [
        f'{key} {before[key]} -> {after[key]}'
        for key in before
        if before[key] != after[key] and (key in _FIXED_ON_RESUME or not key.startswith(_FREE_ON_RESUME))
    ]
    if changes:
        raise InputError(f'--resume would change the run: {"; ".join(changes)}; drop these or start a new run')


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
