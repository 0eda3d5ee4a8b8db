"""Networks side by side: what is read of them, tables, Markdown, figure, and the table that a run ends with."""

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from slimclr_hub.cli import app
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.compare import compare_networks
from slimclr_hub.evaluate.compare.entries import Entry, measure_speed, read_entries
from slimclr_hub.evaluate.compare.figure import draw_pareto, pareto_figure
from slimclr_hub.evaluate.compare.tables import comparison_tables
from slimclr_hub.evaluate.linear_eval.config import FeaturesConfig, LinearEvalConfig, LinearProbeConfig
from slimclr_hub.evaluate.reported import REPORTED, REPORTED_DETECTION
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.hub.push import _with_results
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import cost
from slimclr_hub.runs.command_line import dump
from slimclr_hub.runs.result import IMAGENET, Protocol, Result, save
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import RECIPE
from slimclr_hub.text import human
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.report import compare_with_itself
from slimclr_hub.weights.published import PUBLISHED, WIDTHS

TAG = 'slimclr_resnet50.mocov2_800e_in1k'
LINEAR = replace(LinearEvalConfig(network='x').protocol, data='fashion-mnist')
AUGMENTED = LinearEvalConfig(network='x', features=FeaturesConfig(mode='augmented')).protocol


def save_network(folder: Path, widths: tuple[float, ...]) -> Path:
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=widths)
    assert isinstance(model, SlimmableResNet)
    save_folder(model, folder, size=12, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    return folder


def save_run(folder: Path, widths: tuple[float, ...], accuracies: list[float], name: str = 'fashion-mnist') -> Path:
    """A run whose k-NN accuracy was measured thrice: `accuracies` at the full width, and less at narrower ones."""
    save_network(folder, widths)
    recipe = {
        'model': {'name': 'slimclr_resnet20', 'widths': list(widths)},
        'data': {'name': name, 'root': '/data/fashion', 'size': 12, 'channels': 1},
        'knn': {'k': 20, 'every': 1, 'temperature': 0.1},
    }
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    records = [
        {'kind': 'eval', 'epoch': i, 'step': i, **{f'knn/{width:g}': accuracy - 10 * (1 - width) for width in widths}}
        for i, accuracy in enumerate(accuracies)
    ]
    records.insert(1, {'kind': 'train', 'epoch': 1, 'step': 1, 'loss': 1.0})
    lines = [json.dumps(record) for record in records]
    (folder / 'metrics.jsonl').write_text('\n'.join([*lines, '{"kind": "ev']) + '\n')  # cut off by a kill
    return folder


def save_linear(
    folder: Path,
    top1: dict[float, float],
    name: str = 'linear_eval',
    protocol: Protocol = LINEAR,
    time: str | None = None,
) -> None:
    top5 = {width: value + 9 for width, value in top1.items()}
    made = {'time': time} if time is not None else {}
    save([Result(str(folder), protocol, top1, top5, images=1000, environment=made)], folder / name)


def save_knn(folder: Path, values: dict[int, float], name: str = 'knn_eval', time: str | None = None) -> None:
    """k -> accuracy, the same at both widths."""
    made = {'time': time} if time is not None else {}
    results = [
        Result(str(folder), Protocol('knn', 'fashion-mnist', None, k, 0.1), {1.0: v, 0.5: v}, environment=made)
        for k, v in values.items()
    ]
    save(sorted(results, key=lambda result: -result.mean), folder / name)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A run with a linear evaluation, one of an individual network, one on other images, and what is none of these."""
    place = tmp_path_factory.mktemp('comparison')
    save_run(place / 'slim', (1.0, 0.5), [30, 60, 71.26])
    save_linear(place / 'slim', {1.0: 80.04, 0.5: 75.0})
    save_run(place / 'alone', (0.5,), [25, 68.0])
    save_run(place / 'other', (1.0, 0.5), [30, 50], name='fashion-mnist-6k')
    save_network(place / 'bare', (1.0, 0.5))
    (place / 'nothing').mkdir()
    return place


def parse_markdown(text: str) -> list[list[dict[str, str]]]:
    """Rows of each table, by title of the column."""
    tables = re.findall(r'(?:^\|.*\|\n)+', text, re.MULTILINE)
    parsed = []
    for table in tables:
        headers, _, *rows = ([cell.strip() for cell in line.strip('|').split(' | ')] for line in table.splitlines())
        assert {len(row) for row in rows} == {len(headers)}
        parsed.append([dict(zip(headers, row, strict=True)) for row in rows])
    return parsed


def by_label(network: Path) -> dict[str, Result]:
    (entry,) = read_entries([str(network)])
    return {protocol.label: result for protocol, (result,) in entry.results.items()}


# What is read


def test_first_and_last_accuracies_of_a_run(place):
    result = by_label(place / 'slim')['k-NN']
    assert result.start == {1.0: 30, 0.5: 25}
    assert result.top1 == {1.0: 71.26, 0.5: 66.26}
    assert result.protocol == Protocol('knn', 'fashion-mnist', None, 20, 0.1, while_training=True)


def test_results_of_evaluations(place):
    result = by_label(place / 'slim')['linear eval']
    assert result.top1 == {1.0: 80.04, 0.5: 75.0}
    assert result.top5 == {1.0: 89.04, 0.5: 84.0}
    assert result.protocol == LINEAR


def test_cost_is_that_of_the_network(place):
    (entry,) = read_entries([str(place / 'slim')])
    assert [(of.parameters, of.multiply_adds) for of in entry.facts] == [cost(entry.model, w, 12) for w in (1.0, 0.5)]


def test_unfinished_run_has_cost_and_the_accuracies_so_far(place, tmp_path):
    run = save_run(tmp_path / 'run', (1.0, 0.5), [30, 60])
    (finished,) = read_entries([str(run)])
    for file in 'config.json', 'model.safetensors':
        (run / file).unlink()
    (entry,) = read_entries([str(run)])
    assert (entry.facts, entry.size, entry.results) == (finished.facts, 12, finished.results)
    tagged = (run / RECIPE).read_text().replace('slimclr_resnet20', 'slimclr_resnet20.mocov3_fashionmnist')
    (run / RECIPE).write_text(tagged)  # as a recipe has it that begins from a published network
    (entry,) = read_entries([str(run)])
    assert (entry.facts, entry.size) == (finished.facts, 12)


def test_one_k_for_all_that_have_it(tmp_path):
    """The first network is best at 10, the second at 50, both together at 20; only the second has 5."""
    first, second = (save_network(tmp_path / name, (1.0, 0.5)) for name in ('first', 'second'))
    save_knn(first, {10: 70, 20: 68, 50: 55})
    save_knn(second, {5: 90, 10: 50, 20: 65, 50: 66})
    entries = read_entries([str(first), str(second)])
    found = [(protocol.k, result.top1) for entry in entries for protocol, (result,) in entry.results.items()]
    assert found == [(20, {1.0: 68, 0.5: 68}), (20, {1.0: 65, 0.5: 65})]
    (alone,) = read_entries([str(second)])
    assert [protocol.k for protocol in alone.results] == [5]


def test_linear_evaluations_of_other_training_images_stand_apart(tmp_path, capsys):
    network = save_network(tmp_path / 'network', (1.0, 0.5))
    for i, (images, value) in enumerate({12000: 80.0, 600: 70.0, None: 81.0}.items()):
        protocol = replace(LINEAR, train_images=images)
        save_linear(network, {1.0: value}, name=f'linear_eval-{i}', protocol=protocol)
    compare_networks([str(network)], markdown=Path('-'), batch_size=None)
    text = capsys.readouterr().out
    ((row, _),) = parse_markdown(text)
    begin = 'linear evaluation, switchable, cached, '
    assert {title: cell for title, cell in row.items() if title.startswith('linear')} == {
        f'{begin}at most 12000 training images, 50 epochs': '80.0 / 89.0',
        f'{begin}at most 600 training images, 50 epochs': '70.0 / 79.0',
        f'{begin}50 epochs': '81.0 / 90.0',
    }
    figure = pareto_figure(read_entries([str(network)]))
    assert len(figure.axes) == 3
    plt.close(figure)


@pytest.mark.parametrize('told', [True, False], ids=['by the time in it', 'by the time of the file'])
def test_of_equal_protocols_the_newest_counts(tmp_path, capsys, told):
    """In the order of paths it is neither the first nor the last, and a copy of the folder has other times of files."""
    network = save_network(tmp_path / 'network', (1.0, 0.5))
    for number, (value, day) in {'': (80.0, 3), '-10': (70.0, 1), '-3': (75.0, 5), '-4': (60.0, 4)}.items():
        name = f'linear_eval{number}'
        save_linear(network, {1.0: value}, name=name, time=f'2026-01-0{day}T00:00:00+00:00' if told else None)
        seconds = 100 * (9 - day if told else day)
        os.utime(network / name / 'result.json', (seconds, seconds))
    compare_networks([str(network)], markdown=Path('-'), batch_size=None)
    text = capsys.readouterr().out
    ((row, _),) = parse_markdown(text)
    assert row['linear eval'] == '75.0 / 84.0'
    assert (
        '- linear eval of network: of linear_eval-3, the newest by this protocol; left out: linear_eval-10, '
        'linear_eval, linear_eval-4 (how they differ stands in the settings of their result.json)'
    ) in text
    figure = pareto_figure(read_entries([str(network)]))
    (axis,) = figure.axes
    assert axis.get_legend_handles_labels()[1] == ['network']
    plt.close(figure)


def test_one_k_makes_two_evaluations_equal(tmp_path, capsys):
    network = save_network(tmp_path / 'network', (1.0, 0.5))
    save_knn(network, {10: 50, 20: 60}, time='2026-01-02')
    save_knn(network, {5: 80, 20: 61}, 'knn_eval-2', time='2026-01-01')
    compare_networks([str(network)], markdown=Path('-'), batch_size=None)
    text = capsys.readouterr().out
    ((row, _),) = parse_markdown(text)
    assert row['k-NN eval'] == '60.0'
    assert 'of knn_eval, the newest by this protocol; left out: knn_eval-2' in text


# Reported


def test_published_tag_has_what_the_paper_reports(place):
    (entry,) = read_entries([TAG])
    ((protocol, (result,)),) = entry.results.items()
    reported = PUBLISHED['mocov2_800e_in1k'].reported
    assert result.top1 == {width: of.top1 for width, of in reported.items()}
    assert protocol.label == 'linear, reported'
    assert [human(fact.multiply_adds) for fact in entry.facts] == ['4.09 G', '2.32 G', '1.05 G', '278 M']


@pytest.mark.parametrize('tag', ['mocov2_200e_in1k', 'mocov2_800e_in1k', 'mocov3_300e_in1k'])
def test_table_1_has_the_published_networks(tag):
    published = PUBLISHED[tag]
    (network,) = (of for of in REPORTED if of.method == f'SlimCLR-{published.method}, {published.epochs} epochs')
    assert network.result.top1 == {width: of.top1 for width, of in published.reported.items()}
    assert network.result.top5 == {width: of.top5 for width, of in published.reported.items()}


def test_table_1_has_the_differences_that_the_paper_names():
    """The arrows: by how much the full width falls behind its own baseline."""
    for method, baseline, arrow in (
        ('supervised slimmable (Yu et al. 2019)', 'supervised', 0.6),
        ('SlimCLR-MoCo v2, 200 epochs', 'MoCo v2, individual networks', 0.1),
        ('SlimCLR-MoCo v2, 800 epochs', 'MoCo v2', 0.7),
        ('SlimCLR-MoCo v3, 300 epochs', 'MoCo v3', 0.5),
    ):
        (full,) = (of for of in REPORTED if of.method == method)
        (reference,) = (of for of in REPORTED if (of.method, of.backbone, len(of.costs)) == (baseline, 'R-50', 1))
        assert reference.result.top1[1.0] - full.result.top1[1.0] == pytest.approx(arrow)
        assert reference.epochs == full.epochs


def test_reported_costs_and_teachers():
    assert sum(len(of.costs) for of in REPORTED) == 3 + 4 + 5 + 2 + 12 + 6 + 7
    assert {of.backbone: of.costs[1.0] for of in REPORTED} == {
        'R-50': (25.6e6, 4.1e9), 'R-34': (21.8e6, 3.7e9), 'R-18': (11.9e6, 1.8e9),
    }  # fmt: skip
    # A teacher in all rows of a small network trained without labels, and in no other.
    assert all((of.teacher is not None) == (of.method in ('SEED', 'DisCo', 'BINGO', 'CompRess')) for of in REPORTED)


def test_table_2_has_the_published_network():
    rows = {row.width: (row.box_ap, row.mask_ap) for row in REPORTED_DETECTION if row.method.startswith('SlimCLR')}
    assert rows == {w: (of.box_ap, of.mask_ap) for w, of in PUBLISHED['mocov2_800e_in1k'].reported.items()}
    baseline = {
        row.width: (row.box_ap, row.mask_ap) for row in REPORTED_DETECTION if row.method.startswith('supervised')
    }
    assert all(baseline[width] < rows[width] for width in WIDTHS)


# Tables


def test_markdown_parsed_back(place, tmp_path, capsys):
    networks = [str(place / name) for name in ('slim', 'alone')]
    file = tmp_path / 'tables' / 'table.md'
    assert compare_networks(networks, markdown=file, batch_size=None) == [file]
    (rows,) = parse_markdown(file.read_text())
    (entry,) = read_entries(networks[:1])
    assert rows[:3] == [
        {
            'network': name, 'width': f'{width:g}', 'parameters': human(cost(entry.model, width, 12)[0]),
            'multiply-adds': human(cost(entry.model, width, 12)[1]), 'k-NN': knn, 'linear eval': linear,
        }
        for name, width, knn, linear in (
            ('slim', 1.0, '71.3', '80.0 / 89.0'), ('slim', 0.5, '66.3', '75.0 / 84.0'), ('alone', 0.5, '63.0', '')
        )
    ]  # fmt: skip
    # Of each network that costs something else.
    assert [[cell for cell in row.values() if cell] for row in rows[3:]] == [
        ['random weights of slim', '1', '30.0'], ['random weights of slim', '0.5', '25.0'],
        ['random weights of alone', '0.5', '20.0'],
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert '80.0 / 89.0' in printed
    for note in 'k-NN: k-NN, k=20, tau=0.1', f'linear eval: {LINEAR} (top-1 / top-5)', 'do not compare':
        assert note in printed
        assert f'- {note}' in file.read_text() or note == 'do not compare'


def test_data_sets_stand_apart(place, capsys):
    networks = [str(place / name) for name in ('slim', 'other')]
    compare_networks(networks, markdown=Path('-'), baselines=False, batch_size=None)
    text = capsys.readouterr().out
    first, second = parse_markdown(text)
    assert {row['network'] for row in first} == {'slim'}
    assert {row['network'] for row in second} == {'other'}
    assert '**accuracies (%) by width on fashion-mnist-6k**' in text
    assert 'Accuracies on different data sets do not compare.' in text
    assert '┃' not in text


def test_protocols_stand_apart(place, tmp_path, capsys):
    """Of another k, the same name is not enough."""
    other = save_run(tmp_path / 'k', (1.0, 0.5), [10, 20])
    recipe = other / 'recipe.yaml'
    recipe.write_text(recipe.read_text().replace('k: 20', 'k: 5'))
    compare_networks([str(place / 'alone'), str(other)], markdown=Path('-'), baselines=False, batch_size=None)
    (rows,) = parse_markdown(capsys.readouterr().out)
    ours, theirs = (next(title for title in rows[0] if title.startswith(f'k-NN, k={k}')) for k in (20, 5))
    assert [(row[ours], row[theirs]) for row in rows] == [('63.0', ''), ('', '20.0'), ('', '15.0')]


def test_network_without_accuracy_has_its_cost(place, capsys):
    """Beside one that has some; alone it is `cost by width`."""
    networks = [str(place / name) for name in ('slim', 'bare', 'other')]
    compare_networks(networks, markdown=Path('-'), baselines=False, batch_size=None)
    first, second = parse_markdown(capsys.readouterr().out)
    assert [(row['network'], row['linear eval']) for row in first if row['width'] == '1'] == [
        ('slim', '80.0 / 89.0'), ('bare', ''),
    ]  # fmt: skip
    assert all(row['multiply-adds'] for row in first)
    assert {row['network'] for row in second} == {'other'}
    compare_networks(networks[1:2], batch_size=None)
    assert 'bare: cost by width' in capsys.readouterr().out


def test_special_characters_in_cells():
    table = TextTable('100 %', ['network', 'k-NN'], [['a|b_c', '1.0 ± 0.1']], ['note'])
    assert r'| a\|b_c | 1.0 ± 0.1 |' in table.markdown()
    assert table.latex().splitlines() == [
        r'\begin{table}', r'\centering', r'\caption{100 \%}', r'\begin{tabular}{lr}', r'\hline',
        r'network & k-NN \\', r'\hline', r'a|b\_c & 1.0 $\pm$ 0.1 \\', r'\hline', r'\end{tabular}', r'\end{table}',
        '% note',
    ]  # fmt: skip


def test_csv_has_every_number(place, tmp_path, capsys):
    file = tmp_path / 'all.csv'
    networks = [str(place / name) for name in ('slim', 'bare')]
    assert compare_networks(networks, csv=file, latex=Path('-'), batch_size=None) == [file]
    assert capsys.readouterr().out.startswith(r'\begin{table}')
    rows = list(csv.DictReader(file.open()))
    assert [(row['model'], row['width'], row['top1'], row['top5'], row['start']) for row in rows] == [
        ('slim', '1.0', '71.26', '', '30.0'), ('slim', '0.5', '66.26', '', '25.0'),
        ('slim', '1.0', '80.04', '89.04', ''), ('slim', '0.5', '75.0', '84.0', ''),
        ('bare', '1.0', '', '', ''), ('bare', '0.5', '', '', ''),
    ]  # fmt: skip
    assert rows[2]['protocol'] == str(LINEAR)
    assert (rows[2]['test_images'], rows[2]['networks']) == ('1000', '1')
    # The columns of timm's files of results, in their order.
    of_timm = ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
    assert list(rows[0])[:9] == of_timm
    assert (rows[2]['top1_err'], rows[2]['top5_err']) == ('19.96', '10.96')
    model = timm.create_model('slimclr_resnet20', widths=(1.0, 0.5), in_chans=1, num_classes=0).extract(0.5)
    parameters = sum(p.numel() for p in model.parameters())
    assert float(rows[3]['param_count']) == round(parameters / 1e6, 2)


def test_rank_is_a_column_and_no_accuracy(place, tmp_path, capsys):
    """Of a run while training, and of an evaluation: the mean over seeds as others, in no panel of the figure."""
    folder = save_run(tmp_path / 'ranked', (1.0, 0.5), [30, 60])
    lines = (folder / 'metrics.jsonl').read_text().splitlines()[:-1]
    records = [{**json.loads(line), 'rank/1': 14.06, 'rank/0.5': 7.0, 'rank_images': 400} for line in lines]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, records)) + '\n')
    rank = Protocol('rank', 'fashion-mnist')
    save([Result(str(folder), rank, {}, rank={1.0: 20.04, 0.5: 9.0}, images=30)], folder / 'knn_eval')
    file = tmp_path / 'all.csv'
    compare_networks([str(folder), str(place / 'alone')], markdown=Path('-'), csv=file, batch_size=None)
    text = capsys.readouterr().out
    (rows,) = parse_markdown(text)
    assert [(row['k-NN'], row['rank'], row['rank eval']) for row in rows] == [
        ('60.0', '14.1', '20.0'), ('55.0', '7.0', '9.0'), ('63.0', '', ''),
        ('30.0', '14.1', ''), ('25.0', '7.0', ''), ('20.0', '', ''),
    ]  # fmt: skip
    assert 'rank: effective rank (RankMe), while training; 1 where' in text
    assert 'standard error' not in text
    assert 'do not compare' not in text
    ranks = [(row['top1'], row['start'], row['rank']) for row in csv.DictReader(file.open()) if row['rank']]
    assert ranks == [('', '14.06', '14.06'), ('', '7.0', '7.0'), ('', '', '20.04'), ('', '', '9.0')]
    assert len(pareto_figure(read_entries([str(folder)])).axes) == 1


def test_network_with_nothing_but_a_rank(place, tmp_path, capsys):
    folder = save_network(tmp_path / 'unlabelled', (1.0, 0.5))
    save([Result(str(folder), Protocol('rank', 'photos'), {}, rank={1.0: 20.0, 0.5: 9.0}, images=30)], folder)
    compare_networks([str(folder)], batch_size=None)
    printed = capsys.readouterr().out
    assert 'unlabelled: effective rank by width on photos' in printed
    assert not draw_pareto(read_entries([str(folder)]), tmp_path / 'figure')
    assert 'eval_results' not in _with_results('---\nlibrary_name: timm\n---\n', folder, 'user/name')


def test_reported_rows_of_such_a_cost(place, tmp_path, capsys):
    file = tmp_path / 'table.md'
    compare_networks([], markdown=file, reported=True, batch_size=None)
    first, second = parse_markdown(file.read_text())
    assert len(first) == sum(len(of.costs) for of in REPORTED)
    bingo = {
        'method': 'BINGO', 'backbone': 'R-34', 'width': '-', 'teacher': 'R-50x2 (77.3)', 'epochs': '200',
        'parameters': '21.8 M', 'multiply-adds': '3.7 G', 'top-1': '68.9', 'top-5': '88.9',
    }  # fmt: skip
    assert bingo in first
    assert {row['multiply-adds'] for row in first if row['width'] == '0.25'} == {'278 M'}
    assert len(second) == len(REPORTED_DETECTION)
    assert file.read_text().count('Reported by the paper') == 2

    compare_networks([TAG], markdown=file, reported=True, batch_size=None)
    ours, theirs = parse_markdown(file.read_text())
    assert len(ours) == 4
    assert bingo in theirs
    assert not any(row['method'] == 'SlimCLR-MoCo v2, 800 epochs' for row in theirs)

    compare_networks([str(place / 'slim')], markdown=file, reported=True, batch_size=None)
    (ours,) = parse_markdown(file.read_text())
    assert len(ours) == 4  # and as many of random weights
    assert 'The paper reports no network of about this cost' in file.read_text()


# Seeds


def test_runs_that_differ_in_their_seed_alone(tmp_path):
    """By the command: two seeds of one recipe, one of another, and an evaluation of one of the first."""
    recipe = yaml.safe_load(dump(PretrainConfig()))
    for name, seed, momentum, last in (('a-0', 0, 0.9, 70.0), ('a-1', 1, 0.9, 72.0), ('b-0', 0, 0.99, 60.0)):
        run = save_run(tmp_path / name, (0.5, 0.25), [30.0 + seed, last])
        changed = {**recipe, 'run': {**recipe['run'], 'seed': seed, 'name': name}}
        changed['method'] = {**recipe['method'], 'momentum': momentum}
        (run / 'recipe.yaml').write_text(yaml.safe_dump(changed))
    save_linear(tmp_path / 'a-1', {0.5: 80.0, 0.25: 75.0}, protocol=replace(LINEAR, data='fashion-mnist-6k'))
    runs = [str(tmp_path / name) for name in ('a-0', 'b-0', 'a-1')]
    result = CliRunner().invoke(app, ['compare', *runs, '--seeds', '--no-speed', '--markdown', '-'])
    assert result.exit_code == 0, result.output
    (rows,) = parse_markdown(result.stdout)
    assert [(row['network'], row['width'], row['k-NN'], row['linear eval']) for row in rows] == [
        ('a', '0.5', '66.0 ± 1.4', '80.0 / 89.0 (of 1)'), ('a', '0.25', '63.5 ± 1.4', '75.0 / 84.0 (of 1)'),
        ('b-0', '0.5', '55.0', ''), ('b-0', '0.25', '52.5', ''),
        ('random weights', '0.5', '25.3 ± 0.6', ''), ('random weights', '0.25', '22.8 ± 0.6', ''),
    ]  # fmt: skip
    assert f'a: mean and standard deviation of 2 runs that differ in their seed alone ({runs[0]}, {runs[2]})' in (
        result.stdout
    )


# Speed


def test_speed_of_every_width(place, capsys):
    entries = measure_speed(read_entries([str(place / name) for name in ('slim', 'alone')]), 4, seconds=0)
    assert [list(entry.speed) for entry in entries] == [[1.0, 0.5], [0.5]]
    assert all(speed > 0 for entry in entries for speed in entry.speed.values())
    steady = replace(entries[0], speed={1.0: 1234.4, 0.5: 5678.0}, spread=0.1)
    (table,) = comparison_tables([steady], 4, 'two cores')
    column = table.headers.index('images/s')
    assert [row[column] for row in table.rows] == ['1,234', '5,678', '', '']  # none of random weights
    assert any('batch of 4' in note and 'two cores' in note for note in table.notes)
    (busy,) = comparison_tables([replace(steady, spread=0.5)], 4, 'two cores')
    assert busy.notes == [*table.notes, 'The machine was busy: repetitions of images/s differ by 50 %.']


# Figure


@pytest.mark.parametrize(
    ('names', 'reported', 'size'),
    [(('slim', 'alone'), False, (1650, 684)), (('slim', 'other'), False, (2475, 657)), ((), True, (825, 954))],
    ids=['two protocols', 'two data sets', 'reported alone'],
)
def test_figure(place, tmp_path, names, reported, size):
    entries = read_entries([str(place / name) for name in names])
    assert draw_pareto(entries, tmp_path / 'pareto', reported)
    assert (tmp_path / 'pareto.pdf').read_bytes()[:5] == b'%PDF-'
    with Image.open(tmp_path / 'pareto.png') as image:
        assert image.size == size
        colours = {colour: count for count, colour in image.convert('RGB').getcolors(1 << 24)}
    assert (colours.get((0x00, 0x72, 0xB2), 0) > 100) == bool(names)
    assert (colours.get((0x88, 0x88, 0x88), 0) > 100) == reported


def with_results(place: Path, name: str, *protocols: Protocol) -> Entry:
    """The network under another name, with accuracies on ImageNet by some protocols."""
    (entry,) = read_entries([str(place / 'slim')])
    height = 40 + 9 * len(name)
    results = [Result(name, replace(of, data=IMAGENET), {1.0: height + 5, 0.5: height}) for of in protocols]
    return replace(entry, name=name, results={result.protocol: [result] for result in results})


def of_resnet50(entry: Entry) -> Entry:
    """The entry with about the cost of the networks that the paper reports."""
    return replace(entry, facts=[replace(of, multiply_adds=400 * of.multiply_adds) for of in entry.facts])


def drawn(entries: list[Entry], reported: bool = False) -> Figure:
    """A figure as it is when it is saved."""
    figure = pareto_figure(entries, reported)
    assert figure is not None
    figure.tight_layout()
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize('count', [1, 2, 5])
def test_legend_covers_nothing_and_widths_are_marked(place, count):
    entries = [with_results(place, 'n' * (i + 1), LINEAR, AUGMENTED) for i in range(count)]
    figure = drawn(entries)
    for axis in figure.axes:
        legend = axis.get_legend().get_window_extent()
        assert not legend.overlaps(axis.get_window_extent())
        assert not legend.overlaps(axis.xaxis.label.get_window_extent())
        assert legend.y0 >= 0
        # Networks of the same cost share a number, above the highest.
        assert {text.get_text(): text.xy[1] for text in axis.texts} == {
            f'{width:g}': 40 + 9 * count + (5 if width == 1 else 0) for width in (1.0, 0.5)
        }
        assert axis.get_window_extent().height > 250
    plt.close(figure)


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
@pytest.mark.parametrize('distillation', [True, False])
def test_the_papers_rows_lie_behind_its_protocol_alone(place, head, distillation):
    probe = LinearProbeConfig(head=head, distillation=distillation)
    like = LinearEvalConfig(network='x', features=FeaturesConfig(mode='augmented'), probe=probe).protocol
    figure = drawn([of_resnet50(with_results(place, 'n', LINEAR, like))], reported=True)
    cached, augmented, *own = figure.axes
    is_the_papers = head == 'switchable' and distillation
    assert len(own) == (0 if is_the_papers else 1)
    for axis, grey in (cached, False), (augmented, is_the_papers), *((axis, True) for axis in own):
        labels = axis.get_legend_handles_labels()[1]
        assert any('(reported)' in label for label in labels) == grey
        assert axis in own or labels[0] == 'n'  # one's own come first
    plt.close(figure)


def test_three_networks_beside_the_papers(place):
    """Panels of one size, each legend below its panel and within the figure."""
    entries = [of_resnet50(with_results(place, 'n' * i, LINEAR, AUGMENTED)) for i in (1, 2, 3)]
    figure = drawn(entries, reported=True)
    augmented = figure.axes[1]
    sizes = [axis.get_window_extent() for axis in figure.axes]
    assert sizes[0].width == pytest.approx(sizes[1].width, rel=0.01)
    legend = augmented.get_legend().get_window_extent()
    assert legend.y1 < sizes[1].y0
    assert legend.y0 >= 0
    assert augmented.get_legend_handles_labels()[1][:3] == ['n', 'nn', 'nnn']
    plt.close(figure)
    assert len(drawn([with_results(place, 'n', LINEAR)], reported=True).axes) == 1  # none costs as little
    plt.close('all')


def test_no_accuracy_to_draw(place, tmp_path):
    assert not draw_pareto(read_entries([str(place / 'bare')]), tmp_path / 'pareto')
    assert not (tmp_path / 'pareto.png').exists()


# The end of a run


def test_a_run_ends_with_its_own_comparison(place, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')  # a pipe, in which no column may be cut
    assert compare_with_itself(place / 'other') == [place / 'other' / 'pareto']
    printed = capsys.readouterr().out
    assert '…' not in printed
    rows = [re.split(r'\s*[│┃]\s*', line.strip(' │┃')) for line in printed.splitlines()]
    assert [(row[0], row[-1]) for row in rows if re.fullmatch(r'(random weights )?(1|0\.5)', row[0])] == [
        ('1', '50.0'), ('0.5', '45.0'), ('random weights 1', '30.0'), ('random weights 0.5', '25.0'),
    ]  # fmt: skip
    assert 'raw pixels' not in printed  # which this run did not measure
    for title in 'other: accuracies (%)', 'parameters', 'multiply-adds', 'images/s', 'k-NN':
        assert title in printed
    with Image.open(place / 'other' / 'pareto.png') as image:
        assert image.size == (825, 657)


def measure_raw_pixels(run: Path, top1: float) -> Path:
    """Add what raw pixels reach to the first evaluation of a run, as training writes it."""
    first, *others = (run / 'metrics.jsonl').read_text().splitlines()
    (run / 'metrics.jsonl').write_text('\n'.join([json.dumps({**json.loads(first), 'raw_pixels/knn': top1}), *others]))
    return run


def test_raw_pixels_of_a_run(tmp_path, capsys):
    run = measure_raw_pixels(save_run(tmp_path / 'run', (1.0, 0.5), [30, 50]), 82.83)
    compare_with_itself(run)
    rows = [re.split(r'\s*[│┃]\s*', line.strip(' │┃')) for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows if row[0] == 'raw pixels'] == ['82.8']
    figure = drawn(read_entries([str(run)]))
    assert figure.axes[0].get_legend_handles_labels()[1] == ['run', 'random weights', 'raw pixels']
    plt.close(figure)


def test_raw_pixels_among_several(place, tmp_path, capsys):
    """One row for all networks on the same images by the same protocol; an evaluation adds its own columns to it."""
    a, b = (measure_raw_pixels(save_run(tmp_path / name, (1.0, 0.5), [30, 50]), 82.83) for name in 'ab')
    pixels = Result('raw pixels', LINEAR, {1.0: 85.2}, {1.0: 99.1}, images=1000)
    save([Result(str(a), LINEAR, {1.0: 80.0, 0.5: 70.0}, images=1000), pixels], a / 'linear_eval')
    compare_networks([str(a), str(b), str(place / 'slim')], csv=Path('-'), batch_size=None)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    found = [(row['data'], row['protocol'], row['top1'], row['top5']) for row in rows if row['model'] == 'raw pixels']
    knn = 'k-NN, k=20, tau=0.1, while training'
    assert found == [('fashion-mnist', knn, '82.83', ''), ('fashion-mnist', str(LINEAR), '85.2', '99.1')]
    compare_networks([str(a), str(b)], markdown=Path('-'), batch_size=None)
    ((*_, last),) = parse_markdown(capsys.readouterr().out)
    assert [cell for cell in last.values() if cell] == ['raw pixels', '82.8', '85.2 / 99.1']
    assert all(
        of['network'] in ('a', 'b') for of in parse_markdown(markdown_of(a, b, baselines=False, capsys=capsys))[0]
    )


def markdown_of(*runs: Path, capsys, **options) -> str:
    compare_networks([str(run) for run in runs], markdown=Path('-'), batch_size=None, **options)
    return capsys.readouterr().out


def test_baselines_can_be_left_out(tmp_path, capsys):
    run = measure_raw_pixels(save_run(tmp_path / 'run', (1.0, 0.5), [30, 50]), 82.83)
    shown, hidden = (markdown_of(run, baselines=baselines, capsys=capsys) for baselines in (True, False))
    left_out = [line for line in shown.splitlines() if 'random weights' in line or 'raw pixels' in line]
    assert len(left_out) == 3
    assert [line for line in shown.splitlines() if line not in left_out] == hidden.splitlines()


def test_a_run_without_accuracies_tells_its_cost(place, capsys):
    assert compare_with_itself(place / 'bare') == []
    printed = capsys.readouterr().out
    assert 'bare: cost by width' in printed
    assert 'k-NN' not in printed


# Mistakes


MISTAKES = {
    'no run': (['nothing'], {}, 'neither a run'),
    'not there': (['nowhere'], {}, "no network 'nowhere'"),
    'of no kind': (['nowhere:x'], {}, "no network 'nowhere:x'"),
    'twice': (['slim', 'slim'], {}, 'once'),
    'nothing at all': ([], {}, '--reported'),
    'figure in another format': (['slim'], {'figure': Path('a.jpg')}, 'PNG and PDF'),
    'figure that is a folder': (['slim'], {'figure': Path('nothing')}, 'is a folder'),
    'Markdown that is a folder': (['slim'], {'markdown': Path('nothing')}, 'is a folder'),
    'CSV that is a folder': (['slim'], {'csv': Path('nothing')}, '--csv nothing is a folder'),
    'two on standard output': (['slim'], {'csv': Path('-'), 'latex': Path('-')}, 'only one of --markdown, --csv'),
    'no batch': (['slim'], {'batch_size': 0}, '--batch-size is 0'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake(place, mistake, monkeypatch):
    networks, options, named = MISTAKES[mistake]
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=named) as error:
        compare_networks(networks, **{'batch_size': None, **options})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('option', ['markdown', 'csv', 'latex', 'figure'])
def test_a_folder_that_cannot_be_made_is_noticed_before_any_network_is_opened(place, tmp_path, option):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match=rf'--{option} .*{tmp_path}/file/deep cannot be made \(.*\); give another'):
        compare_networks([str(place / 'nowhere')], **{option: tmp_path / 'file' / 'deep' / 'name'})


def test_command(place, tmp_path):
    torch.manual_seed(0)
    arguments = ['compare', str(place / 'slim'), '--figure', str(tmp_path / 'pareto.png'), '--batch-size', '2']
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for text in '80.0 / 89.0', 'images/s', f'Written: {tmp_path / "pareto.png"}', f'Written: {tmp_path / "pareto.pdf"}':
        assert text in result.output
    assert (tmp_path / 'pareto.pdf').exists()
    assert 'images/s' not in CliRunner().invoke(app, ['compare', str(place / 'slim'), '--no-speed']).output
