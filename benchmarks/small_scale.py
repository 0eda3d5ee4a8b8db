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

# Recipe -> its name in RESULTS.md; each adds one component to the recipe before.
PARTS = {
    'vanilla': 'four widths together',
    'slow': '+ slow start',
    'slow_kd': '+ distillation',
    'slimclr': '+ loss weights: SlimCLR',
}
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
    print('| ' + ' | '.join(headers) + ' |')
    print('| --- |' + ' ---: |' * (len(headers) - 1))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    print()


class Runs:
    """The runs in a folder, named RECIPE-SEED."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds = sorted({int(path.parent.name.rpartition('-')[2]) for path in folder.glob('*-*/metrics.jsonl')})

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

    def last(self, recipe: str, key: str) -> list[float]:
        """Last value of a metric for each seed."""
        values = []
        for run in self.of(recipe):
            lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
            values.append([record[key] for record in map(json.loads, lines) if key in record][-1])
        return values

    def analyses(self, file: str) -> list[dict]:
        """Contents of a data file of the analyses for each seed."""
        paths = [self.folder / f'analysis-{seed}' / file for seed in self.seeds]
        return [json.loads(path.read_text(encoding='utf-8')) for path in paths if path.is_file()]


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value - before for value, before in zip(values, base, strict=True)]


def cells(found: Mapping[float, Sequence[float]]) -> list[str]:
    return [spread(found.get(width, ())) for width in WIDTHS]


def interference(runs: Runs) -> None:
    rows = []
    for what, alone, slimmable in (
        ('linear, without labels', runs.linear('alone_w100')[1.0], runs.linear('vanilla')[1.0]),
        ('k-NN, without labels', runs.last('alone_w100', 'knn/1'), runs.last('vanilla', 'knn/1')),
        ('own classifier, with labels', runs.last('supervised_w100', 'top1/1'), runs.last('supervised', 'top1/1')),
        ('linear, with labels', runs.linear('supervised_w100')[1.0], runs.linear('supervised')[1.0]),
        ('k-NN, with labels', runs.last('supervised_w100', 'knn/1'), runs.last('supervised', 'knn/1')),
    ):
        rows.append([what, spread(alone), spread(slimmable), spread(differences(slimmable, alone))])
    print_table(['accuracy of width 1.0 (%)', 'alone', 'in four', 'difference'], rows)


def parts(runs: Runs) -> None:
    rows = [[name, *cells(runs.linear(recipe))] for recipe, name in PARTS.items()]
    alone = {width: runs.linear(recipe).get(width, []) for width, recipe in ALONE.items()}
    rows.append(['each width alone', *cells(alone)])
    rows.append(['slimmable probe on SlimCLR', *cells(runs.linear('slimclr', 'slimmable'))])
    rows.append(['random weights', *cells(runs.linear('random_weights'))])
    (pixels,) = load(runs.folder / 'raw_pixels' / RESULT)
    rows.append(['raw pixels', *cells({1.0: list(pixels.top1.values())})])
    print_table(['linear accuracy (%)', *BY_WIDTH], rows)
    pairs = [
        ('slow start', 'vanilla', 'slow', '1.1, 1.0, 1.2, 0.4'),
        ('distillation', 'slow', 'slow_kd', '0.3, 0.0, 0.1, 0.0'),
        ('loss weights', 'slow_kd', 'slimclr', '0.4, 0.2, -0.1, 0.2'),
        ('all three', 'vanilla', 'slimclr', ''),
    ]
    rows = []
    for name, before, after, paper in pairs:
        old, new = runs.linear(before), runs.linear(after)
        rows.append([name, *cells({width: differences(new[width], old[width]) for width in WIDTHS}), paper])
    shared, own = runs.linear('slimclr', 'slimmable'), runs.linear('slimclr')
    gain = {w: differences(own[w], shared[w]) for w in WIDTHS if w in shared}
    rows.append(['switchable probe', *cells(gain), '0.8, 0.9, 1.7, 1.5'])
    gain = {w: differences(own[w], alone[w]) for w in WIDTHS if len(alone[w]) == len(own[w])}
    rows.append(['SlimCLR over alone (table 1)', *cells(gain), '0.2, 1.2, 3.6, 7.2'])
    print_table(['gain (points)', *BY_WIDTH, 'paper, table 3'], rows)


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
    print_table(['mean over layers', 'all / 0.25', 'rest / 0.25', 'cosine to the next', 'norm, last layer'], rows)


def offsets(runs: Runs) -> None:
    found: dict[str, list[list[float]]] = {}
    for seed in runs.seeds:
        for file in sorted((runs.folder / f'analysis-{seed}').glob('trajectory*.json')):
            trajectories = json.loads(file.read_text(encoding='utf-8'))
            for run, both in zip(trajectories['settings']['runs'], trajectories['trajectories'], strict=True):
                found.setdefault(Path(run).name.rpartition('-')[0], []).append(both['none']['offsets'])
    rows = []
    for recipe, (name, alone, paper) in TRAJECTORIES.items():
        if recipe in found:
            first, second = ([each[i] for each in found[recipe]] for i in (0, 1))
            against = ['', '']
            if alone in found:
                pairs = list(zip(found[recipe], found[alone], strict=True))
                against = [spread([100 * (own[i] / base[i] - 1) for own, base in pairs], 0) for i in (0, 1)]
            rows.append([name, spread(first, 2), spread(second, 2), *against, paper])
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
        values = {recipe: [runs.last(recipe, key) for key, _ in columns] for recipe in (without, with_slow)}
        gains = [differences(new, old) for new, old in zip(values[with_slow], values[without], strict=True)]
        for name, found in (('no', values[without]), ('half an epoch', values[with_slow]), ('difference', gains)):
            cells = [spread(column, digits) for column, (_, digits) in zip(found, columns, strict=True)]
            rows.append([rate, name, str(len(found[0])), *cells])
    headers = ['learning rate', 'slow start', 'n', 'InfoNCE, 1.0', 'InfoNCE, 0.25', 'k-NN, 1.0 (%)', 'k-NN, 0.25 (%)']
    print_table(headers, rows)


def training_costs(size: int = 20) -> dict[str, float]:
    """Recipe -> multiply-adds of its training for each image of each epoch, in those of a forward at width 1.0.

    A backward counts as two forwards. What learned from a teacher has the cost of the teacher's own training with it.
    """
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1)
    assert isinstance(model, SlimmableResNet)
    each = {width: cost(model, width, size)[1] for width in WIDTHS}
    full, all_four = 1.0, sum(each.values()) / each[1.0]
    both = (full + all_four) / 2  # with slow start in half of the epochs
    alone = 3 * full + full  # a query with its backward, and a key
    return {
        'alone': sum(alone * each[width] / each[1.0] for width in WIDTHS),
        'slimclr': 3 * both + full,
        'seed': 3 * all_four + full + alone,
        'compress': 3 * all_four + all_four + full + alone,  # each width has a momentum copy
        'disco': 2 * 3 * both + full + 2 * full + alone,  # both views train and are seen by the teacher
        'bingo': 3 * 3 * all_four + 2 * full + alone,  # image, neighbour and their CutMix
    }


def teachers(runs: Runs) -> None:
    costs, rows = training_costs(), []
    figure, (axis,) = new_figure()
    for number, (recipe, name) in enumerate(TEACHERS.items()):
        found = runs.linear(recipe)
        if recipe == 'alone':
            found = {width: runs.linear(of).get(width, []) for width, of in ALONE.items()}
        if not found:
            continue
        count = str(min(len(values) for values in found.values()))
        rows.append([name, count, *cells(found), f'{costs[recipe]:.1f}'])
        known = [mean(found[width]) for width in WIDTHS if found[width]]
        style = {**line_style(number), 'marker': marker(number), 'linestyle': 'none'}
        axis.plot([costs[recipe]] * len(known), known, label=name, **style)
    print_table(['linear accuracy (%)', 'n', *BY_WIDTH, 'cost of training'], rows)
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
