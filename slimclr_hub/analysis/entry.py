"""Entry point of `slimclr-hub analyze` and recipes/analyze.py, with one sub-command per analysis."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimclr_hub.analysis.base import Analysis

# Module of this room, with an `ANALYSIS` -> summary. Only the module that is asked for is imported.
_SUMMARIES = {
    'gradients': 'gradient imbalance (Fig. 3) and gradient direction divergence (Fig. 4)',
    'trajectory': 'optimization trajectory, and its offsets from the end (Fig. 5)',
    'surface': 'error surface, with the trajectory (Fig. 5)',
    'condition': 'the linear-probe condition (Appendix A, Eq. 23)',
}


def main(argv: Sequence[str] | None = None, prog: str = 'slimclr-hub analyze') -> None:
    """Run the analysis that the command line names, on one process; help and messages call the program `prog`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (['-h'], ['--help']):
        listed = '\n'.join(f'  {name:<10} {summary}' for name, summary in _SUMMARIES.items())
        print(
            f'usage: {prog} ANALYSIS ... [--key VALUE ...]\n\nAnalyses of the paper, for runs that have ended or still '
            f'train:\n\n{listed}\n\n{prog} ANALYSIS --help explains the options of one.'
        )
        return
    from slimclr_hub.runs.command_line import run_script

    run_script(lambda: _analyse(arguments, prog))


def _analyse(argv: list[str], prog: str) -> None:
    from slimclr_hub.errors import InputError
    from slimclr_hub.runs.command_line import config_of, make_parser, parse

    if not argv or argv[0] not in _SUMMARIES:
        given = f'{argv[0]!r} is not an analysis' if argv else 'no analysis is named'
        raise InputError(f'{given}; the first argument is one of {", ".join(_SUMMARIES)}')
    name, *rest = argv
    analysis: Analysis = import_module(f'slimclr_hub.analysis.{name}').ANALYSIS
    if not rest:
        raise InputError(f'{name} of what? Give the folder of a run: {prog} {name} runs/NAME')
    parser = make_parser(analysis.config, f'{prog} {name}', analysis.arguments, analysis.about)
    parser.usage = f'{prog} {name} {analysis.arguments} [--key VALUE ...]'
    parser.add_argument('networks', nargs='+', type=str, help='folders of runs, or a network')
    parser.set_defaults(dict(analysis.defaults(rest)))
    built = parse(parser, rest)
    if (processes := int(os.environ.get('WORLD_SIZE', '1'))) > 1:
        raise InputError(f'{processes} processes were launched, and an analysis runs on one; run {prog} by itself')
    analysis.work(built.networks, config_of(analysis.config, built))
