"""One job with several seeds, and the mean and spread of its accuracies."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any, TypeVar

from slimclr_hub.runs.result import Result
from slimclr_hub.runs.tables import TextTable

C = TypeVar('C')


def repetitions(config: C) -> list[C]:
    """A configuration with `seeds`, once for each: they draw views, new weights and the choice of training images.

    Seeds count from `run.seed` and `data.choice_seed` on. Where `run.output` is given, each has a folder in it.
    """
    given: Any = config
    if given.seeds == 1:
        return [config]
    found = []
    for number in range(given.seeds):
        seed = given.run.seed + number
        output = given.run.output and f'{given.run.output}/seed-{seed}'
        data = replace(given.data, choice_seed=given.data.choice_seed + number)
        found.append(replace(given, data=data, run=replace(given.run, seed=seed, output=output), seeds=1))
    return found


def print_spread(results: Sequence[Result]) -> None:
    """Print mean and standard deviation of the accuracies of each width over repetitions; nothing of a single one."""
    if len(results) < 2:
        return
    rows = []
    for width in results[0].top1:
        values = [result.top1[width] for result in results]
        rows.append([f'{width:g}', f'{mean(values):.1f} ± {stdev(values):.1f}', *(f'{value:.1f}' for value in values)])
    seeds = [f'seed {result.settings["run"]["seed"]}' for result in results]
    note = f'Mean and standard deviation of {len(results)} repetitions; each draws images, views and new weights anew.'
    TextTable('top-1 accuracy (%) by width', ['width', 'top-1', *seeds], rows, [note], names=0).print()
