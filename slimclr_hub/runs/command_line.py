"""Configuration dataclasses from YAML files and the command line, with a line of its own for each mistake."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace

from slimclr_hub.errors import DataError, DivergedError, InputError, PreemptedError
from slimclr_hub.settings import plain

_DEEPEST = 9  # recipes that derive from each other


def make_parser(config: type, script: str, options: str, description: str) -> ArgumentParser:
    """A parser for `--config FILE`, `--base` in such files, and every key of a dataclass.

    Args:
        config: A dataclass whose fields become `--field`, or `--field.key` where they are dataclasses.
        script: Name of the script in recipes/.
        options: What its usage shows besides.
        description: What it does.
    """
    parser = ArgumentParser(
        prog=script,
        usage=f'accelerate launch recipes/{script} {options} [--section.key VALUE ...]',
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument('--config', action='config', help='a recipe, such as one of recipes/configs')
    parser.add_argument('--base', type=str | None, default=None, help='in a recipe: the recipe that it derives from')
    parser.add_class_arguments(config, as_group=False)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Read a command line, each recipe after the one that it derives from, and build the dataclasses in it.

    Raises:
        InputError: A key or value is wrong, or a file is not there.
    """
    argv = _with_bases(argv)
    try:
        return parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        message = ' '.join(str(error).split())
        if message.startswith('Problems parsing config'):
            message = f'{early(argv, "--config")}: {message}'
        raise InputError(message) from error


def early(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option, without reading the others.

    Which recipe lies underneath has to be known before the real parser reads the values on top of it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest='value', nargs='?')
    return parser.parse_known_args(argv)[0].value


def dump(config: Any) -> str:
    """A configuration as YAML that `--config` reads."""
    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)


def run_script(work: Callable[[], None]) -> None:
    """Run what a script is for; what a user can put right ends in one line and exit status 2, without a traceback.

    Work that was asked to stop, and has kept its state, ends with 75, or 130 from the keyboard.
    """
    try:
        work()
    except (InputError, DataError, DivergedError, PreemptedError) as error:
        state = PartialState()
        # All processes meet the same mistake or signal, but each reads its own images.
        if state.is_main_process or isinstance(error, DataError):
            print(f'error: {error}', file=sys.stderr)
        if not isinstance(error, DataError):
            state.destroy_process_group()
        sys.exit(error.status if isinstance(error, PreemptedError) else 2)


def _with_bases(argv: Sequence[str]) -> list[str]:
    expanded: list[str] = []
    for argument, following in pairwise([*argv, '']):
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
        if path in found or len(found) > _DEEPEST:
            raise InputError(f'{origin}: base {base} derives from itself; let it derive from another recipe')
        found.append(path)
