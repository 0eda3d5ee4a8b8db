"""Configurations from recipes, which are YAML files, and from the command line; one line for each mistake.

Recipes are merged first, each after the one that its `base` names, so that the command line always wins.
"""

import argparse
import errno
import importlib.util
import json
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace

from slimclr_hub.errors import DataError, DivergedError, InputError, PreemptedError, StorageError, shorten
from slimclr_hub.files import file_hash
from slimclr_hub.settings import RECIPE, read_yaml, to_dict
from slimclr_hub.text import print_anything, printable

C = TypeVar('C')

_MAX_BASES = 9
_FAST = 'the fast path is always on'
_RENAMED = {'method.weights': 'method.loss_weights', 'speed.compile': 'run.compile'}
_REMOVED = {
    'speed.shared': _FAST,
    'speed.lerp': _FAST,
    'speed.fused': _FAST,
    'speed.keep_memory': _FAST,
    'data.transfer': _FAST,
    'data.read_ahead': _FAST,
}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ELOOP, errno.ESTALE}
_imported: dict[str, str] = {}
_noted: set[Path] = set()


def make_parser(
    config: type, script: str, options: str, description: str, sections: Mapping[str, type] | None = None
) -> ArgumentParser:
    """A parser for `--config FILE`, `--import FILE`, and every key of a dataclass.

    Args:
        config: A dataclass whose fields become `--field`, or `--field.key` where they are dataclasses.
        script: Name of the script in recipes/.
        options: Options that its usage shows.
        description: Purpose of the script.
        sections: Dataclasses to parse fields by whose own type is no dataclass.
    """
    parser = ArgumentParser(
        prog=script,
        usage=f'accelerate launch recipes/{script} {options} [--section.key VALUE ...]',
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument('--config', action='config', help='a recipe, such as one of recipes/configs')
    parser.add_argument('--import', help='a Python file that registers a method, a distillation or a network')
    parser.add_class_arguments(config, as_group=False, skip=set(sections or ()))
    for name, section in (sections or {}).items():
        parser.add_class_arguments(section, name)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Read recipes and command line, run the files to import, and build the dataclasses of a parser.

    Raises:
        InputError: A key or value is wrong, or a file is not there.
    """
    recipe, rest = read_recipes(argv)
    imports = recipe.pop('imports', {})
    if any(action.dest == 'imports' for action in parser._actions):
        recipe['imports'] = imports
    for key, value in recipe.items():
        if key in (parser.groups or {}) and not isinstance(value, dict):
            raise InputError(
                f'{", ".join(_values(argv, "--config")[0])}: {key} is {value!r}; it has keys, as {key}.KEY'
            )
    try:
        rest = [*_with_lists(parser, rest)]
        values = parser.parse_args([f'--config={json.dumps(recipe)}', *rest] if recipe else rest)
        _check_nulls(parser, values)
        return parser.instantiate(values)
    except argparse.ArgumentError as error:
        files = ', '.join(_values(argv, '--config')[0])
        message = ' '.join(str(error).split())
        if message.startswith('Problems parsing config') and files:
            message = f'{files}: {message}'
        raise InputError(_shortened(message)) from error


def config_of(kind: type[C], built: Namespace, **other: Any) -> C:
    """The dataclass whose fields a parser of `make_parser` has built; `other` are those that it has not."""
    names = [field.name for field in fields(kind) if field.name not in other]  # type: ignore[arg-type]
    return kind(**{name: built[name] for name in names}, **other)


def _check_nulls(parser: ArgumentParser, values: Namespace) -> None:
    # Of jsonargparse any value may be null, as one is in YAML that is forgotten.
    hints = {action.dest: getattr(action, '_typehint', None) for action in parser._actions}
    nulls = [
        key for key, hint in hints.items() if hint and type(None) not in get_args(hint) and values.get(key) is None
    ]
    if nulls:
        raise InputError(f'{shorten(nulls)}: null is no value; give one, or leave the key out')


def _shortened(message: str) -> str:
    # It has the value or key, of any length, in the middle.
    return message if len(message) < 1500 else f'{message[:900]} ... {message[-300:]}'


def read_recipes(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Merge the recipes that a command line names, and run the files that they and `--import` name.

    Returns:
        The merged recipe, with the hash of each imported file under `imports`, and the rest of the command line.

    Raises:
        InputError: A file is not there, is no recipe, has an unknown base, or differs from the one recorded.
    """
    files, rest = _values(argv, '--config')
    asked, rest = _values(rest, '--import')
    for option in rest:
        _check_current({option.removeprefix('--').partition('=')[0]: None}, 'the command line')
    merged: dict[str, Any] = {}
    for file in files:
        for path in (*reversed(_bases(Path(file))), Path(file)):
            for key, value in read_recipe(path).items():
                both = isinstance(value, dict) and isinstance(merged.get(key), dict)
                merged[key] = {**merged[key], **value} if both else value
    merged.pop('base', None)
    names = {Path(file).name for file in asked}
    imports = {**merged.pop('imports', {}), **_imports_of_network(rest, names)}
    imports = {file: digest for file, digest in imports.items() if Path(file).name not in names}
    imports |= {str(Path(file).absolute()): None for file in asked}
    imports = {file: _import_file(Path(file), digest) for file, digest in imports.items()}
    return {**merged, **({'imports': imports} if imports else {})}, rest


def read_recipe(path: Path) -> dict[str, Any]:
    """Content of one recipe without its base.

    A recipe that a run recorded may have keys of earlier versions: they are renamed or dropped, and a note says so.

    Raises:
        InputError: The file is not a recipe, or one written by hand has keys of earlier versions.
    """
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise InputError(f'{path} is not a recipe: it has no keys')
    files = content.get('imports', {})
    if not isinstance(files, list | dict) or not all(isinstance(file, str) for file in files):
        raise InputError(f'{path}: imports is {reprlib.repr(files)}; give a list of Python files')
    if isinstance(files, list):
        content['imports'] = {str((path.parent / file).absolute()): None for file in files}
    keys = {
        f'{section}.{key}': value
        for section, values in content.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    if path.name == RECIPE or path.name.startswith('recipe-until-step-'):
        return _updated(content, keys, path)
    _check_current(keys, str(path))
    return content


def early(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option, without reading the others."""
    return next(reversed(_values(argv, option)[0]), None)


def dump(config: Any) -> str:
    """A configuration as YAML that `--config` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def run_script(work: Callable[[], None]) -> None:
    """Run the work of a script; an error that a user can put right ends in one line and exit status 2.

    Work that was asked to stop, and has kept its state, ends with 75, or 130 from the keyboard; work that found no room
    to write ends with 75, too.
    """
    print_anything()
    try:
        work()
    except (InputError, DataError, DivergedError, PreemptedError) as error:
        state = PartialState()
        # All processes meet the same mistake or signal, but each reads its own images and writes its own files.
        alone = isinstance(error, DataError | StorageError)
        if state.is_main_process or alone:
            print(f'error: {printable(error)}', file=sys.stderr)
        if not alone:
            state.destroy_process_group()
        sys.exit(error.status if isinstance(error, PreemptedError) else 2)
    except OSError as error:
        if error.errno not in _NO_ROOM | _OF_THE_DISK:
            raise
        print(f'error: {printable(error)}', file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL if error.errno in _NO_ROOM else 2)


def _values(argv: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Values of an option, and the arguments without them."""
    values, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == option:
            value = next(arguments, None)
            if value is None or value.startswith('--'):
                raise InputError(f'{option} has no value; give one after it')
            values.append(value)
        elif argument.startswith(f'{option}='):
            values.append(argument.partition('=')[2])
        else:
            rest.append(argument)
    return values, rest


def _bases(path: Path) -> list[Path]:
    found: list[Path] = []
    while (base := read_recipe(path).get('base')) is not None:
        origin, path = path, path.parent / str(base)
        if not path.is_file():
            raise InputError(f'{origin}: base {base} is not there; it is a path from the folder of this recipe')
        if path in found or len(found) > _MAX_BASES:
            raise InputError(f'{origin}: base {base} derives from itself; let it derive from another recipe')
        found.append(path)
    return found


def _check_current(keys: Mapping[str, Any], origin: str) -> None:
    problems = [f'{key} is now {_RENAMED[key]}' for key in keys if key in _RENAMED]
    problems += [f'{key} is gone, as {_REMOVED[key]}; drop it' for key in keys if key in _REMOVED]
    if problems:
        raise InputError(f'{origin}: {"; ".join(problems)}')


def _updated(content: dict[str, Any], keys: Mapping[str, Any], path: Path) -> dict[str, Any]:
    dropped = [key for key in keys if key in _REMOVED]
    for key in (*dropped, *(key for key in keys if key in _RENAMED)):
        section, _, name = key.partition('.')
        value = content[section].pop(name)
        if key in _RENAMED:
            section, _, name = _RENAMED[key].partition('.')
            content.setdefault(section, {}).setdefault(name, value)
    if 'speed' in content and not content['speed']:
        del content['speed']
    if dropped and path not in _noted and os.environ.get('RANK', '0') == '0':
        _noted.add(path)
        print(printable(f'Note: {path} was written by an earlier version; dropped: {", ".join(dropped)}'))
    return content


def names_to_import(argv: Sequence[str]) -> set[str]:
    """Names of the files that `--import` names."""
    return {Path(file).name for file in _values(argv, '--import')[0]}


def check_recorded(recipe: Path, known: Collection[str] = ()) -> dict[str, str]:
    """Files that a run has recorded, besides those whose names are `known`.

    Raises:
        InputError: One lies in the run's own folder, or has no hash or no full path, by which a folder from elsewhere
            would have its code run here.
    """
    recorded = read_recipe(recipe).get('imports', {})
    found = {file: digest for file, digest in recorded.items() if Path(file).name not in known}
    for file, digest in found.items():
        path = Path(file)
        inside = path.resolve().is_relative_to(recipe.parent.resolve())
        known_elsewhere = path.is_absolute() and not inside
        if not isinstance(digest, str) or not (known_elsewhere or _imported.get(path.name) == digest):
            raise InputError(f'{recipe} asks to run {file}, which came with it; give --import FILE if you trust it')
    return found


def _imports_of_network(argv: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Files that the run named by `--network` has recorded."""
    network = early(argv, '--network')
    recipe = Path(network.removeprefix('local-dir:')) / RECIPE if network else None
    return check_recorded(recipe, known) if recipe is not None and recipe.is_file() else {}


def _import_file(path: Path, digest: str | None) -> str:
    """Run a Python file once in this process, if it has the hash `digest` or that is None, and return its hash."""
    if not path.is_file():
        raise InputError(f'{path} is to be imported and is not there; give its place by --import FILE')
    found = file_hash(path)
    if digest not in (None, found):
        raise InputError(
            f'{path} has changed since the recipe was recorded; restore it, or take it as it is by --import {path}'
        )
    if _imported.setdefault(path.name, found) != found:
        raise InputError(f'{path}: another file of this name has been imported; rename one')
    name = f'slimclr_imported_{path.stem}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f'{path} is not a Python file; --import takes a file that ends in .py')
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f'{path} cannot be imported: {type(error).__name__}: {error}') from error
    return found


def _with_lists(parser: ArgumentParser, argv: Sequence[str]) -> Iterator[str]:
    """Arguments with brackets around values like `0.5,0.25` of options that take several numbers."""
    option = ''
    for argument in argv:
        name, equals, value = argument.partition('=') if argument.startswith('--') else (option, '', argument)
        action = parser._option_string_actions.get(name)
        if value and _takes_several(getattr(action, '_typehint', None), value) and value[0] not in '[({':
            value = f'[{value}]'
        yield f'{name}{equals}{value}' if argument.startswith('--') else value
        option = argument if argument.startswith('--') and not equals else ''


def _takes_several(hint: Any, value: str) -> bool:
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    several = any(get_origin(each) in (tuple, list) for each in hints)
    only = all(get_origin(each) in (tuple, list) or each is type(None) for each in hints)
    return several and (',' in value or (only and value not in ('null', '')))
