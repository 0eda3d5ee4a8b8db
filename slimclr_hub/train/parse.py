"""Configuration from a recipe file and the command line."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from slimclr_hub.errors import InputError
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.method_config import MethodConfig

RECIPE = 'recipe.yaml'
"""File in a run's folder that holds its configuration."""

AUTO = Path('auto')
"""As `--resume auto`: the newest run of this recipe, or a new one."""

_FREE_ON_RESUME = ('data.root', 'data.num_workers', 'data.download', 'data.max_corrupt', 'knn.', 'probe.', 'run.')
_FIXED_ON_RESUME = ('run.seed', 'run.precision', 'run.channels_last')


@dataclass(frozen=True)
class Command:
    """What the command line asks for: a run by a configuration, or the continuation of one in a folder.

    Args:
        config: The configuration.
        resume: Folder of the run to go on with; `AUTO` for the newest of this configuration, if any.
        allow_changes: Whether a resumed run may have another configuration than it was started with.
    """

    config: PretrainConfig
    resume: Path | None = None
    allow_changes: bool = False


def parse_pretrain(default: Path, argv: Sequence[str] | None = None) -> Command:
    """Read the command line; the recipe `default` applies where it names none, and a run's own where it resumes one.

    Raises:
        InputError: A key or value is wrong, a file or run is not there, or a run is resumed with other values than it
            was started with.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    folder = _early(argv, '--resume')
    if folder is not None and Path(folder) != AUTO:
        recorded = Path(folder) / RECIPE
        if not recorded.is_file():
            raise InputError(f'--resume {folder}: not the folder of a run, it has no {RECIPE}')
        command = _parse([f'--config={recorded}', *argv])
        check_unchanged(load_recipe(recorded), command)
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
    flat: dict[str, Any] = {}
    for name, section in _plain(asdict(config)).items():
        flat |= {f'{name}.{key}': value for key, value in section.items()} if section is not None else {name: None}
    return flat


def changes_of(recorded: PretrainConfig, config: PretrainConfig) -> list[str]:
    """What of a run would be other than it was started with, as `key old -> new`."""
    before, after = flatten(recorded), flatten(config)
    return [
        f'{key} {before.get(key)} -> {after.get(key)}'
        for key in {**before, **after}
        if before.get(key) != after.get(key) and (key in _FIXED_ON_RESUME or not key.startswith(_FREE_ON_RESUME))
    ]


def check_unchanged(recorded: PretrainConfig, command: Command) -> None:
    """Refuse to resume a run with another configuration, unless it is allowed.

    Raises:
        InputError: It is not; the message shows each difference.
    """
    changes = changes_of(recorded, command.config)
    if changes and not command.allow_changes:
        raise InputError(
            f'--resume would change the run: {"; ".join(changes)}; drop these, start a new run, or give '
            '--allow_changes true'
        )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog='pretrain.py',
        usage='accelerate launch recipes/pretrain.py [--config FILE] [--resume FOLDER] [--section.key VALUE ...]',
        description='Pre-train a slimmable network.',
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument('--config', action='config', help='a recipe, such as one of recipes/configs')
    parser.add_argument('--base', type=str | None, default=None, help='in a recipe: the recipe that it derives from')
    parser.add_argument(
        '--resume',
        type=Path | None,
        default=None,
        help='folder of a run to go on with; auto for the newest run of this recipe, or a new one where there is none',
    )
    parser.add_argument(
        '--allow_changes', type=bool, default=False, help='resume although the configuration is another one'
    )
    parser.add_class_arguments(PretrainConfig, as_group=False)
    # A MethodConfig fills itself in with the values of its method, which are not those of another one.
    parser.set_defaults({f'method.{field.name}': field.default for field in fields(MethodConfig)})
    return parser


def _parse(argv: Sequence[str]) -> Command:
    parser = _parser()
    argv = _with_bases(argv)
    try:
        built = parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        message = ' '.join(str(error).split())
        if message.startswith('Problems parsing config'):
            message = f'{_early(argv, "--config")}: {message}'
        raise InputError(message) from error
    config = PretrainConfig(**{name: built[name] for name in PretrainConfig.__dataclass_fields__})
    return Command(config, built.resume, built.allow_changes)


def _with_bases(argv: Sequence[str]) -> list[str]:
    """Let each recipe be read after the one that it derives from."""
    expanded: list[str] = []
    for argument, following in zip(argv, [*argv[1:], ''], strict=True):
        recipe = following if argument == '--config' else argument.removeprefix('--config=')
        if argument.startswith('--config') and recipe:
            expanded += [f'--config={base}' for base in reversed(_bases(Path(recipe)))]
        expanded.append(argument)
    return expanded


def _bases(path: Path) -> list[Path]:
    found: list[Path] = []
    while True:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return found  # the parser says it better
        base = content.get('base') if isinstance(content, dict) else None
        if base is None:
            return found
        origin, path = path, path.parent / str(base)
        if not path.is_file():
            raise InputError(f'{origin}: base {base} is not there; it is a path from the folder of this recipe')
        if path in found or len(found) > 9:
            raise InputError(f'{origin}: base {base} derives from itself; let it derive from another recipe')
        found.append(path)


def _early(argv: Sequence[str], option: str) -> str | None:
    # Which recipe lies underneath has to be known before the real parser reads the values on top of it.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument(option, dest='value', nargs='?')
    return early.parse_known_args(argv)[0].value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
