"""benchmarks/small_scale.py prints the tables of RESULTS.md from runs as its script leaves them."""

import itertools
import json
import re
import runpy
import sys
from pathlib import Path
from statistics import mean

import pytest
from scipy import stats

from slimclr_hub.runs.result import Protocol, Result, save

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'benchmarks' / 'small_scale.py'
ALONE = {f'alone_w{100 * width:03.0f}': width for width in (1.0, 0.75, 0.5, 0.25)}
SLOW = ('slow', 'slow_kd', 'slimclr')
# The order of panels in the second figure differs from that of the tables.
RUNS = ('alone_w100', 'vanilla', 'supervised', *SLOW, 'supervised_w100')
WIDTHS = (1.0, 0.75, 0.5, 0.25)


def save_probe(run: Path, name: str, head: str, height: float, widths: tuple[float, ...]) -> None:
    top1 = {width: height - 10 * (1 - width) for width in widths}
    save([Result(str(run), Protocol('linear', head=head), top1)], run / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two seeds."""
    for seed in 0, 1:
        for i, recipe in enumerate((*RUNS, *list(ALONE)[1:])):
            run = tmp_path / f'{recipe}-{seed}'
            widths = (ALONE[recipe],) if recipe in ALONE else (1.0,) if recipe.endswith('w100') else WIDTHS
            save_probe(run, 'linear_eval', 'switchable', 70 + i + seed, widths)
            knn = {f'knn/{width:g}': 60.0 + i + seed for width in widths}
            before = {**dict.fromkeys(knn, 50.0), 'raw_pixels/knn': 64.0 + seed}
            kind = {'top1/1': 80.0 + i} if recipe.startswith('supervised') else {'info_nce/1': 4.5 + i / 10}
            lines = [before, {**knn, **kind, 'rank/1': 20.0 + i * seed}]
            (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        save_probe(tmp_path / f'random_weights-{seed}', 'linear_eval', 'switchable', 60, WIDTHS)
        for head, height in ('switchable', 69), ('slimmable', 66 + seed):
            save_probe(tmp_path / f'unstandardised_{head}-{seed}', 'linear_eval', head, height, WIDTHS)
        slimclr, analysis = tmp_path / f'slimclr-{seed}', tmp_path / f'analysis-{seed}'
        save_probe(slimclr, 'linear_eval-2', 'slimmable', 68, WIDTHS)
        values = dict.fromkeys(('mean', 'total', 'right', 'relative', 'own', 'shared'), 1.0)
        condition = {
            split: {width: {**values, 'images': images} for width in ('0.75', '0.5', '0.25')}
            for split, images in (('train', 2048), ('validation', 2048))
        }
        (slimclr / 'analysis').mkdir()
        (slimclr / 'analysis' / 'condition.json').write_text(json.dumps({'condition': condition}))
        analysis.mkdir()
        found = []
        for recipe in RUNS:
            names = ('before S', 'after S') if recipe in SLOW else ('all',)
            ratios = {'all_ratio': 3.5, 'rest_ratio': 1.25, 'consecutive': 0.0, 'length': 0.5}
            found.append({'name': f'{recipe}-{seed}', 'phases': [{'name': name, **ratios} for name in names]})
        (analysis / 'gradients.json').write_text(json.dumps({'runs': found}))
        for runs in ('alone_w100', 'vanilla', 'slimclr'), ('supervised_w100', 'supervised'):
            trajectories = [{'none': {'offsets': [4.0 + i, 2.0 + i]}} for i in range(len(runs))]
            settings = {'runs': [str(tmp_path / f'{recipe}-{seed}') for recipe in runs]}
            file = analysis / f'trajectory+{"+".join(runs)}.json'
            file.write_text(json.dumps({'settings': settings, 'trajectories': trajectories}))
        for rate, slow in itertools.product(('0.03', '0.06'), ('0', '0.5')):
            run = tmp_path / f'collapse-lr{rate}-slow{slow}-{seed}'
            run.mkdir()
            lines = [{'info_nce/1': 6.24, 'info_nce/0.25': 6.0}, {'knn/1': 60.0 + seed, 'knn/0.25': 50.0}]
            (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    save([Result('raw pixels', Protocol('linear', head='switchable'), {1.0: 83.6})], tmp_path / 'raw_pixels')
    return tmp_path


def tables_of(text: str) -> list[list[list[str]]]:
    """Cells of each row of each Markdown table, without the rule."""
    tables = re.findall(r'(?:^\|.*\|\n)+', text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip('|').split('|')] for line in of.splitlines()] for of in tables]
    return [[first, *others] for first, _, *others in rows]


def teach(folder: Path, recipe: str, seed: int, height: float) -> None:
    save_probe(folder / f'{recipe}-{seed}', 'linear_eval', 'switchable', height, WIDTHS)
    (folder / f'{recipe}-{seed}' / 'metrics.jsonl').write_text('')


def test_tables_have_the_rows_of_results(folder, capsys, monkeypatch):
    for recipe in 'seed', 'compress', 'disco', 'bingo':
        teach(folder, recipe, 0, 80)
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), str(folder)])
    runpy.run_path(str(SCRIPT), run_name='__main__')
    printed = tables_of(capsys.readouterr().out)
    # The first is of claims, and the last of another script.
    _, *written, _ = tables_of((ROOT / 'RESULTS.md').read_text())
    assert len(printed) == len(written) == 11
    for ours, theirs in zip(printed, written, strict=True):
        assert ours[0] == theirs[0]
        assert [row[0] for row in ours] == [row[0] for row in theirs]
        assert all(len(row) == len(ours[0]) for row in ours)
        for column in (i for i, title in enumerate(ours[0]) if title.startswith('paper')):
            assert [row[column] for row in ours] == [row[column] for row in theirs]
    cost = {row[0]: row[3] for row in printed[0]}
    assert cost['without labels: InfoNCE (nats)'] == '0.10 ± 0.00'
    assert cost['without less with: linear (points)'] == '5.0 ± 0.0'
    linear, knn = ({row[0]: row[1:5] for row in printed[number]} for number in (2, 4))
    assert linear['SlimCLR over raw pixels'] == ['-8.1 ± 6.4', '-10.6 ± 6.4', '-13.1 ± 6.4', '-15.6 ± 6.4']
    assert linear['switchable probe, not standardised'] == ['2.5 ± 6.4'] * 4
    assert linear['four widths together over alone'] == ['1.0 ± 0.0', '-6.0 ± 0.0', '-7.0 ± 0.0', '-8.0 ± 0.0']
    assert knn['SlimCLR over raw pixels'] == ['1.0 ± 0.0'] * 4
    offsets = {row[0]: row[1:5] for row in printed[7]}
    assert printed[9][1] == ['0.03', 'no', '2', '6.24 ± 0.00', '6.00 ± 0.00', '60.5 ± 6.4', '50.0 ± 0.0']
    assert offsets['MoCo v2, four widths together'] == ['5.00 ± 0.00', '3.00 ± 0.00', '25 ± 0', '50 ± 0']


def test_teachers_beside_slimclr(folder, capsys, monkeypatch):
    for seed in 0, 1:
        teach(folder, 'seed', seed, 80 + seed)
    teach(folder, 'compress', 1, 85)
    (folder / 'compress-0').mkdir()  # a run that has not ended
    (folder / 'compress-0' / 'metrics.jsonl').write_text('')
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), str(folder)])
    script = runpy.run_path(str(SCRIPT), run_name='__main__')
    headers, *rows = tables_of(capsys.readouterr().out)[-1]
    assert headers[-1] == 'cost of training'
    names = ['each width alone', 'SlimCLR', 'SEED', 'CompRess', 'SEED over SlimCLR', 'CompRess over SlimCLR']
    assert [row[:2] for row in rows] == [[name, '1' if 'CompRess' in name else '2'] for name in names]
    assert rows[2][2:6] == ['80.5 ± 6.4', '78.0 ± 6.4', '75.5 ± 6.4', '73.0 ± 6.4']
    assert rows[4][2:6] == ['5.0 ± 0.0'] * 4
    assert rows[5][2:6] == ['9.0'] * 4  # of the seed that both have, though there is a run of the other
    assert (folder / 'teachers.png').stat().st_size > 1000
    # Of widths 1, w, ... a forward costs about 1, w^2, ...: SEED trains all in each epoch, and has its teacher's cost.
    roughly = sum(width**2 for width in WIDTHS)
    costs = script['training_costs']()
    assert costs['alone'] == pytest.approx(4 * roughly, rel=0.02)
    assert costs['seed'] == pytest.approx(3 * roughly + 1 + 4, rel=0.02)


def test_intervals_are_those_of_scipy():
    script = runpy.run_path(str(SCRIPT))
    for values in [1.0, 2.5], [78.1, 80.2, 79.6], [0.3, 0.1, -2.0, 5.0, 0.2]:
        low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
        assert script['spread'](values) == f'{mean(values):.1f} ± {(high - low) / 2:.1f}'


def test_verdicts_are_counted():
    text = (ROOT / 'RESULTS.md').read_text()
    verdicts = [row[-1] for row in tables_of(text)[0][1:]]
    counts = [verdicts.count(verdict) for verdict in ('agree', 'disagree', 'undecided')]
    assert sum(counts) == len(verdicts)
    assert '**{} agree, {} disagree, {} undecided.**'.format(*counts) in text
