"""Tables of RESULTS.md, as Markdown, from the runs of benchmarks/small_scale.sh: means over seeds, with 95 % intervals.

python benchmarks/small_scale.py FOLDER

With runs that learned from a teacher it also draws FOLDER/teachers.png, accuracy over the cost of training.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import timm

from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import cost
from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure
from slimclr_hub.runs.result import RESULT, load
from slimclr_hub.runs.tables import markdown

# Recipe -> its name in RESULTS.md; each adds one component to the recipe before.
PARTS = {
    'vanilla': 'four widths together',
    'slow': '+ slow start',
    'slow_kd': '+ distillation',
    'slimclr': '+ loss weights: SlimCLR',
}
# Key of a network or probe -> its name in the tables of accuracy.
NETWORKS = {
    **PARTS,
    'alone': 'each width alone',
    'shared': 'slimmable probe on SlimCLR',
    'unstandardised': 'switchable probe, features not standardised',
    'unstandardised, shared': 'slimmable probe, features not standardised',
    'random_weights': 'random weights',
    'pixels': 'raw pixels',
}
# Name, what is compared with what, and the paper's gains of linear accuracy by width.
GAINS = [
    ('four widths together over alone', 'alone', 'vanilla', '-1.6 at 1.0'),
    ('slow start', 'vanilla', 'slow', '1.1, 1.0, 1.2, 0.4'),
    ('distillation', 'slow', 'slow_kd', '0.3, 0.0, 0.1, 0.0'),
    ('loss weights', 'slow_kd', 'slimclr', '0.4, 0.2, -0.1, 0.2'),
    ('distillation and loss weights', 'slow', 'slimclr', '0.7, 0.2, 0.0, 0.2'),
    ('all three', 'vanilla', 'slimclr', '1.8, 1.2, 1.2, 0.6'),
    ('SlimCLR over alone (table 1)', 'alone', 'slimclr', '0.2, 1.2, 3.6, 7.2'),
    ('SlimCLR over raw pixels', 'pixels', 'slimclr', ''),
    ('switchable probe', 'shared', 'slimclr', '0.8, 0.9, 1.7, 1.5'),
    ('switchable probe, not standardised', 'unstandardised, shared', 'unstandardised', ''),
]
# (recipe, phase) -> name. During slow start, slow_kd and slimclr train exactly as slow.
PHASES = {
    ('alone_w100', 'all'): 'width 1.0 alone',
    ('vanilla', 'all'): PARTS['vanilla'],
    ('slow', 'before S'): 'slow start, before S',
    ('slow', 'after S'): 'slow start, after S',
    ('slow_kd', 'after S'): f'{PARTS["slow_kd"]}, after S',
    ('slimclr', 'after S'): f'{PARTS["slimclr"]}, after S',
    ('supervised_w100', 'all'): 'supervised, width 1.0 alone',
    ('supervised', 'all'): 'supervised, four widths',
}
# What is compared with what, seed by seed: name -> two of the above.
CHANGES = {
    'four widths instead of one': (('alone_w100', 'all'), ('vanilla', 'all')),
    'four widths instead of one, with labels': (('supervised_w100', 'all'), ('supervised', 'all')),
    'four widths, without labels instead of with': (('supervised', 'all'), ('vanilla', 'all')),
    'slow start, after S instead of before': (('slow', 'before S'), ('slow', 'after S')),
    'slow start, after S, instead of none': (('vanilla', 'all'), ('slow', 'after S')),
    'distillation, after S': (('slow', 'after S'), ('slow_kd', 'after S')),
    'loss weights, after S': (('slow_kd', 'after S'), ('slimclr', 'after S')),
}
# Recipe -> its name, the recipe of the full width alone, and the excess of the second offset over it in the paper.
TRAJECTORIES = {
    'alone_w100': ('MoCo v2, width 1.0 alone', None, ''),
    'vanilla': ('MoCo v2, four widths together', 'alone_w100', '41.4'),
    'slimclr': ('SlimCLR', 'alone_w100', ''),
    'supervised_w100': ('supervised, width 1.0 alone', None, ''),
    'supervised': ('supervised, four widths', 'supervised_w100', '31.0'),
}
# Recipe -> its name beside those that learn from a teacher, which is width 1.0 trained alone.
TEACHERS = {
    'alone': 'each width alone',
    'slimclr': 'SlimCLR',
    'seed': 'SEED',
    'compress': 'CompRess',
    'disco': 'DisCo with SlimCLR',
    'bingo': 'BINGO',
}
WIDTHS = (1.0, 0.75, 0.5, 0.25)
ALONE = {1.0: 'alone_w100', 0.75: 'alone_w075', 0.5: 'alone_w050', 0.25: 'alone_w025'}
BY_WIDTH = ['1.0', '0.75', '0.5', '0.25']
# Number of seeds -> 97.5 % quantile of Student's t with one degree of freedom less.
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, with half of the 95 % t interval of several values (up to 10)."""
    if not values:
        return ''
    text = f'{mean(values):.{digits}f}'
    return f'{text} ± {T[len(values)] * stdev(values) / sqrt(len(values)):.{digits}f}' if len(values) > 1 else text


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(markdown(headers, rows), end='\n\n')


class Runs:
    """The runs in a folder, named RECIPE-SEED."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds = sorted({int(path.parent.name.rpartition('-')[2]) for path in folder.glob('*-*/metrics.jsonl')})

    def judged(self, *recipes: str) -> 'Runs':
        """The same, of the seeds for which the networks of all these recipes have a linear classifier."""
        runs = Runs(self.folder)
        files = {
            seed: [self.folder / f'{recipe}-{seed}/linear_eval/{RESULT}' for recipe in recipes] for seed in self.seeds
        }
        runs.seeds = [seed for seed, needed in files.items() if all(file.is_file() for file in needed)]
        return runs

    def of(self, recipe: str) -> list[Path]:
        """Folders of the runs by a recipe, in the order of their seeds."""
        return [run for seed in self.seeds if (run := self.folder / f'{recipe}-{seed}').is_dir()]

    def linear(self, recipe: str, head: str = 'switchable') -> dict[float, list[float]]:
        """Width -> top-1 of each seed, by the classifier with that head."""
        found: dict[float, list[float]] = {}
        for run in self.of(recipe):
            for file in sorted(run.glob(f'linear_eval*/{RESULT}')):
                result, *_ = load(file)
                if result.protocol.head == head:
                    for width, value in result.top1.items():
                        found.setdefault(width, []).append(value)
        return found

    def logged(self, recipe: str, key: str, at: int = -1) -> list[float]:
        """A metric in the log of each seed's run: its last value, or with `at` 0 the first."""
        values = []
        for run in self.of(recipe):
            lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
            found = [record[key] for record in map(json.loads, lines) if key in record]
            values += found[at : at + 1 or None]
        return values

    def knn(self, recipe: str, at: int = -1) -> dict[float, list[float]]:
        """Width -> top-1 of each seed by k-NN, at the end of training or before it."""
        return {width: self.logged(recipe, f'knn/{width:g}', at) for width in WIDTHS}

    def analyses(self, file: str) -> list[dict]:
        """Contents of a data file of the analyses for each seed."""
        paths = [self.folder / f'analysis-{seed}' / file for seed in self.seeds]
        return [json.loads(path.read_text(encoding='utf-8')) for path in paths if path.is_file()]


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value - before for value, before in zip(values, base, strict=True)]


def gains(after: Mapping[float, Sequence[float]], before: Mapping[float, Sequence[float]], width: float) -> list[float]:
    """What one has over the other, seed by seed; none if a seed of either was not measured."""
    new, old = after.get(width, ()), before.get(width, ())
    return differences(new, old) if len(new) == len(old) else []


def cells(found: Mapping[float, Sequence[float]]) -> list[str]:
    return [spread(found.get(width, ())) for width in WIDTHS]


def interference(runs: Runs) -> None:
    rows, costs = [], []
    for labels, alone, four in (
        ('without labels', 'alone_w100', 'vanilla'),
        ('with labels', 'supervised_w100', 'supervised'),
    ):
        measures = {
            'linear (%)': (runs.linear(alone)[1.0], runs.linear(four)[1.0]),
            'k-NN (%)': (runs.logged(alone, 'knn/1'), runs.logged(four, 'knn/1')),
            'own classifier (%)': (runs.logged(alone, 'top1/1'), runs.logged(four, 'top1/1')),
            'InfoNCE (nats)': (runs.logged(alone, 'info_nce/1'), runs.logged(four, 'info_nce/1')),
            'effective rank': (runs.logged(alone, 'rank/1'), runs.logged(four, 'rank/1')),
        }
        costs.append(differences(*reversed(measures['linear (%)'])))
        for what, (one, all_four) in measures.items():
            if one:
                digits = 2 if 'nats' in what else 1
                columns = one, all_four, differences(all_four, one)
                rows.append([f'{labels}: {what}', *(spread(values, digits) for values in columns)])
    rows.append(['without less with: linear (points)', '', '', spread(differences(*costs))])
    print_table(['width 1.0', 'alone', 'in four', 'difference'], rows)


def parts(runs: Runs) -> None:
    linear = {recipe: runs.linear(recipe) for recipe in (*PARTS, *ALONE.values(), 'random_weights')}
    linear['shared'] = runs.linear('slimclr', 'slimmable')
    linear['unstandardised'] = runs.linear('unstandardised_switchable')
    linear['unstandardised, shared'] = runs.linear('unstandardised_slimmable', 'slimmable')
    (pixels,) = load(runs.folder / 'raw_pixels' / RESULT)
    linear['pixels'] = {width: list(pixels.top1.values()) for width in WIDTHS}
    knn = {recipe: runs.knn(recipe) for recipe in (*PARTS, *ALONE.values())}
    knn['random_weights'] = runs.knn('slimclr', at=0)
    knn['pixels'] = {width: runs.logged('slimclr', 'raw_pixels/knn') for width in WIDTHS}
    for kind, found in ('linear', linear), ('k-NN', knn):
        found['alone'] = {width: found[recipe].get(width, []) for width, recipe in ALONE.items()}
        rows = [[name, *cells(found[key])] for key, name in NETWORKS.items() if key in found]
        print_table([f'{kind} accuracy (%)', *BY_WIDTH], rows)
        # One fit of raw pixels stands for all seeds.
        every = len(runs.seeds)
        found['pixels'] = {width: (values * every)[:every] for width, values in found['pixels'].items()}
        rows = [
            [name, *cells({width: gains(found[after], found[before], width) for width in WIDTHS}), paper]
            for name, before, after, paper in GAINS
            if before in found and after in found
        ]
        print_table([f'gain, {kind} (points)', *BY_WIDTH, 'paper, linear'], rows)


def gradients(runs: Runs) -> None:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for analysis in runs.analyses('gradients.json'):
        for run in analysis['runs']:
            recipe = run['name'].rpartition('-')[0]
            for phase in run['phases']:
                place = found.setdefault((recipe, phase['name']), {})
                for key in 'all_ratio', 'rest_ratio', 'consecutive', 'length':
                    place.setdefault(key, []).append(phase[key])
    rows = [
        [name, *(spread(values, 2) for values in found[key].values())] for key, name in PHASES.items() if key in found
    ]
    headers = ['all / 0.25', 'rest / 0.25', 'cosine to the next', 'norm, last layer']
    print_table(['mean over layers', *headers], rows)
    rows = [
        [name, *(spread(differences(values, found[before][key]), 2) for key, values in found[after].items())]
        for name, (before, after) in CHANGES.items()
        if before in found and after in found
    ]
    print_table(['change', *headers], rows)


def offsets(runs: Runs) -> None:
    found: dict[str, list[list[float]]] = {}
    for seed in runs.seeds:
        for file in sorted((runs.folder / f'analysis-{seed}').glob('trajectory*.json')):
            trajectories = json.loads(file.read_text(encoding='utf-8'))
            for run, both in zip(trajectories['settings']['runs'], trajectories['trajectories'], strict=True):
                found.setdefault(Path(run).name.rpartition('-')[0], []).append(both['none']['offsets'])
    rows, excess = [], {}
    for recipe, (name, alone, paper) in TRAJECTORIES.items():
        if recipe not in found:
            continue
        lengths = [spread([each[i] for each in found[recipe]], 2) for i in (0, 1)]
        if alone in found:
            pairs = list(zip(found[recipe], found[alone], strict=True))
            excess[recipe] = [[100 * (own[i] / base[i] - 1) for own, base in pairs] for i in (0, 1)]
        rows.append([name, *lengths, *(spread(values, 0) for values in excess.get(recipe, ([], []))), paper])
    for name, less, more, paper in (
        ('SlimCLR less four widths together', 'vanilla', 'slimclr', ''),
        ('four widths, without labels less with', 'supervised', 'vanilla', '10.4'),
    ):
        if less in excess and more in excess:
            changes = [spread(differences(excess[more][i], excess[less][i]), 0) for i in (0, 1)]
            rows.append([name, '', '', *changes, paper])
    headers = ['', '1st component', '2nd component', '1st over alone (%)', '2nd over alone (%)', 'paper, 2nd']
    print_table(headers, rows)


def condition(runs: Runs) -> None:
    found: dict[tuple[str, str], list[dict]] = {}
    for seed in runs.seeds:
        file = runs.folder / f'slimclr-{seed}' / 'analysis' / 'condition.json'
        if file.is_file():
            for split, widths in json.loads(file.read_text(encoding='utf-8'))['condition'].items():
                for width, values in widths.items():
                    found.setdefault((split, width), []).append(values)
    keys = ('mean', 'total', 'right', 'relative', 'own', 'shared')
    rows = [
        [
            f'{split} ({values[0]["images"]:,}), {width}',
            *(spread([each[key] for each in values], 1 if key in keys[4:] else 3) for key in keys),
        ]
        for (split, width), values in found.items()
    ]
    headers = ['images, width', 'mean abs(L - R)', 'total', 'mean abs(R)', 'relative', 'own layer (%)', 'shared (%)']
    print_table(headers, rows)


def collapse(runs: Runs) -> None:
    columns = [(f'{kind}/{width}', digits) for kind, digits in (('info_nce', 2), ('knn', 1)) for width in ('1', '0.25')]
    rows = []
    for rate in '0.03', '0.06':
        without, with_slow = (f'collapse-lr{rate}-slow{slow}' for slow in ('0', '0.5'))
        if not runs.of(without):
            continue
        values = {recipe: [runs.logged(recipe, key) for key, _ in columns] for recipe in (without, with_slow)}
        gains = [differences(new, old) for new, old in zip(values[with_slow], values[without], strict=True)]
        for name, found in (('no', values[without]), ('half an epoch', values[with_slow]), ('difference', gains)):
            cells = [spread(column, digits) for column, (_, digits) in zip(found, columns, strict=True)]
            rows.append([rate, name, str(len(found[0])), *cells])
    headers = ['learning rate', 'slow start', 'n', 'InfoNCE, 1.0', 'InfoNCE, 0.25', 'k-NN, 1.0 (%)', 'k-NN, 0.25 (%)']
    print_table(headers, rows)


def training_costs() -> dict[str, float]:
    """Recipe -> multiply-adds of its training for each image of each epoch, in those of a forward at width 1.0.

    A backward counts as two forwards. What learned from a teacher has the cost of the teacher's own training with it.
    """
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1)
    assert isinstance(model, SlimmableResNet)
    each = {width: cost(model, width, 20)[1] for width in WIDTHS}
    full, all_four = 1.0, sum(each.values()) / each[1.0]
    both = (full + all_four) / 2  # with slow start in half of the epochs
    alone = 3 * full + full  # a query with its backward, and a key
    look = cost(model, 1.0, 28)[1] / each[1.0] / 6  # at the centre crop, once in all epochs
    return {
        'alone': sum(alone * each[width] / each[1.0] for width in WIDTHS),
        'slimclr': 3 * both + full,
        'seed': 3 * all_four + full + alone,
        'compress': 3 * all_four + all_four + full + alone,  # each width has a momentum copy
        'disco': 2 * 3 * both + full + 2 * full + alone,  # both views train and are seen by the teacher
        'bingo': 3 * 3 * all_four + 2 * full + look + alone,  # image, neighbour and their CutMix
    }


def teachers(runs: Runs) -> None:
    costs, rows, more = training_costs(), [], []
    figure, (axis,) = new_figure()
    for number, (recipe, name) in enumerate(TEACHERS.items()):
        of = runs.judged(*(ALONE.values() if recipe == 'alone' else [recipe]))
        if not of.seeds:
            continue
        found = of.linear(recipe)
        if recipe == 'alone':
            found = {width: of.linear(single)[width] for width, single in ALONE.items()}
        rows.append([name, str(len(of.seeds)), *cells(found), f'{costs[recipe]:.1f}'])
        if recipe not in ('alone', 'slimclr'):
            slimclr = of.linear('slimclr')
            over = {width: gains(found, slimclr, width) for width in WIDTHS}
            more.append([f'{name} over SlimCLR', str(len(of.seeds)), *cells(over), ''])
        heights = [mean(found[width]) for width in WIDTHS]
        style = {**line_style(number), 'marker': marker(number), 'linestyle': 'none'}
        axis.plot([costs[recipe]] * len(WIDTHS), heights, label=f'{name}, n = {len(of.seeds)}', **style)
        if recipe == 'slimclr':
            for width, height in zip(BY_WIDTH, heights, strict=True):
                at = costs[recipe], height
                axis.annotate(width, at, (6, 0), textcoords='offset points', va='center', fontsize=7)
    print_table(['linear accuracy (%)', 'n', *BY_WIDTH, 'cost of training'], [*rows, *more])
    axis.set(xlabel="training (forwards of width 1.0 an image), teacher's with it", ylabel='linear accuracy (%)')
    axis.legend(fontsize=7)
    save_figure(figure, runs.folder / 'teachers')


def main() -> None:
    if len(sys.argv) != 2 or not (runs := Runs(Path(sys.argv[1]))).seeds:
        sys.exit('usage: python benchmarks/small_scale.py FOLDER, with the runs of benchmarks/small_scale.sh')
    tables: list[Callable[[Runs], None]] = [interference, parts, gradients, offsets, condition]
    for table in tables if runs.of('slimclr') else ():
        table(runs)
    if any(runs.folder.glob('collapse-*')):
        collapse(runs)
    if runs.of('seed'):
        teachers(runs)


if __name__ == '__main__':
    main()
