"""Analyses of finished or running training: what `recipes/analyze.py` runs, one sub-command each."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimclr_hub.analysis.replay import recipe_of
from slimclr_hub.errors import InputError
from slimclr_hub.runs.command_line import make_parser, parse, run_script

_SCRIPT = 'analyze.py'


@dataclass(frozen=True)
class Analysis:
    """An analysis of runs.

    Args:
        config: Frozen dataclass of its options, which become `--key value`.
        work: Does it, for what stands after its name and the options; prints its table, and where its figure lies.
        what: What comes after its name, as the usage shows it.
        about: What it does, in a sentence.
        defaults: Defaults of options, for the arguments after its name.
    """

    config: type
    work: Callable[[Sequence[str], Any], None]
    what: str
    about: str
    defaults: Callable[[Sequence[str]], Mapping[str, Any]] = lambda argv: {}


def _gradients() -> Analysis:
    from slimclr_hub.analysis.gradients.command import GRADIENTS

    return GRADIENTS


def _trajectory() -> Analysis:
    from slimclr_hub.analysis.landscape.trajectory_command import TRAJECTORY

    return TRAJECTORY


def _surface() -> Analysis:
    from slimclr_hub.analysis.landscape.surface_command import SURFACE

    return SURFACE


def _condition() -> Analysis:
    from slimclr_hub.analysis.condition_command import CONDITION

    return CONDITION


# Each is imported when it is asked for.
_ANALYSES: dict[str, tuple[str, Callable[[], Analysis]]] = {
    'gradients': ('gradient imbalance (Fig. 3) and gradient direction divergence (Fig. 4)', _gradients),
    'trajectory': ('optimization trajectory, and its offsets from the end (Fig. 5)', _trajectory),
    'surface': ('error surface, with the trajectory (Fig. 5)', _surface),
    'condition': ('the linear-probe condition (Appendix A, Eq. 23)', _condition),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and do the analysis that it names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_script(lambda: _analyse(arguments))


def _analyse(argv: list[str]) -> None:
    listed = '\n'.join(f'  {name:<10} {about}' for name, (about, _) in _ANALYSES.items())
    if argv[:1] in (['-h'], ['--help']):
        print(
            f'usage: accelerate launch recipes/{_SCRIPT} ANALYSIS ... [--key VALUE ...]\n\n{listed}\n\n'
            f'{_SCRIPT} ANALYSIS --help explains its options.'
        )
        return
    if not argv or argv[0] not in _ANALYSES:
        given = f'{argv[0]!r} is not an analysis' if argv else 'no analysis is named'
        raise InputError(f'{given}; the first argument is one of {", ".join(_ANALYSES)}')
    name, *rest = argv
    if not rest:
        raise InputError(f'{name} of what? Give the folder of a run: {_SCRIPT} {name} runs/NAME')
    analysis = _ANALYSES[name][1]()
    parser = make_parser(analysis.config, f'{_SCRIPT} {name}', analysis.what, analysis.about)
    parser.add_argument('subjects', nargs='+', type=str, help=analysis.what)
    parser.set_defaults(dict(analysis.defaults(rest)))
    built = parse(parser, rest)
    options = {key: built[key] for key in analysis.config.__dataclass_fields__}  # type: ignore[attr-defined]
    analysis.work(built.subjects, analysis.config(**options))


def folders_of(runs: Sequence[str]) -> list[Path]:
    """The folders of runs.

    Raises:
        InputError: One is not the folder of a run, or its recipe cannot be read, or it is given twice.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        recipe_of(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f'a run is given twice: {" ".join(runs)}; drop one')
    return folders


def on_one_process() -> None:
    """Refuse several processes, which an analysis has no use for.

    Raises:
        InputError: There are several.
    """
    if (processes := int(os.environ.get('WORLD_SIZE', '1'))) > 1:
        raise InputError(f'{processes} processes were launched, and this analysis runs on one; give --num_processes 1')
