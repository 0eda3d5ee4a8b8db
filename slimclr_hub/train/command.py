"""Configuration from a recipe file and the command line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from slimclr_hub.errors import InputError
from slimclr_hub.runs.command_line import early, make_parser, parse
from slimclr_hub.settings import RECIPE, flatten
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.method_config import MethodConfig

AUTO = Path('auto')
"""As `--resume auto`: the newest run of this recipe, or a new one."""

_FREE_ON_RESUME = (
    'data.root',
    'data.num_workers',
    'data.download',
    'data.max_corrupt',
    'knn.',
    'probe.',
    'diagnostics.',
    'run.',
)
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
    folder = early(argv, '--resume')
    if folder is not None and Path(folder) != AUTO:
        recorded = Path(folder) / RECIPE
        if not recorded.is_file():
            raise InputError(f'--resume {folder}: not the folder of a run, it has no {RECIPE}')
        command = _parse([f'--config={recorded}', *argv])
        check_unchanged(load_recipe(recorded), command)
        return command
    if early(argv, '--config') is None:
        argv = [f'--config={default}', *argv]
    return _parse(argv)


def load_recipe(path: Path) -> PretrainConfig:
    """The configuration in a file, as `--config` reads it."""
    return _parse([f'--config={path}']).config


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


def _parse(argv: Sequence[str]) -> Command:
    parser = make_parser(
        PretrainConfig, 'pretrain.py', '[--config FILE] [--resume FOLDER]', 'Pre-train a slimmable network.'
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
    # A MethodConfig fills itself in with the values of its method, which are not those of another one.
    parser.set_defaults({f'method.{field.name}': field.default for field in fields(MethodConfig)})
    built = parse(parser, argv)
    config = PretrainConfig(**{name: built[name] for name in PretrainConfig.__dataclass_fields__})
    return Command(config, built.resume, built.allow_changes)
