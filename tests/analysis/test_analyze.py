"""`slimclr-hub analyze` and recipes/analyze.py: files of `gradients`, and messages."""

import csv
import json

import pytest
import torch
from PIL import Image

from slimclr_hub.runs.command_line import dump
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.config import OptimConfig, PretrainConfig
from slimclr_hub.train.diagnostics import NormRecord, Records
from tests.analysis.runs import ANALYZE, analyse, refusal, run_script


def make_run(folder, records=12):
    """Records of a run of two epochs of six steps, without its images."""
    (folder / 'checkpoints' / 'step-00000012').mkdir(parents=True)
    (folder / RECIPE).write_text(dump(PretrainConfig(optim=OptimConfig(epochs=2))))
    state = {'step': 12, 'steps_per_epoch': 6, 'evaluated': False, 'processes': 1, 'files': {'process_0.pt': '0' * 64}}
    (folder / 'checkpoints' / 'step-00000012' / 'state.json').write_text(json.dumps(state))
    generator = torch.Generator().manual_seed(0)
    if records:
        norms = [
            NormRecord(step, 0.25, 1.0, 4.0 if step < 6 else 1.5, 3.5 if step < 6 else 1, 4) for step in range(records)
        ]
        Records(folder).add_norms(norms)
        Records(folder).add_gradients(range(records), torch.randn(records, 30, generator=generator))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_run(tmp_path / 'runs' / 'one')
    make_run(tmp_path / 'runs' / 'two')
    make_run(tmp_path / 'runs' / 'bare', records=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_gradients_write_figures_data_and_a_table(place, capsys):
    run_script(ANALYZE, 'gradients', 'runs/one', 'runs/two', '--output', 'found')
    printed = capsys.readouterr().out
    assert 'after slow start' in printed
    assert '3.50' in printed
    names = {path.name for path in (place / 'found').iterdir()}
    figures = {
        f'gradient_{kind}.{suffix}' for kind in ('imbalance', 'divergence', 'directions') for suffix in ('png', 'pdf')
    }
    assert names == figures | {'gradients.csv', 'gradients.json'}
    with Image.open(place / 'found' / 'gradient_imbalance.png') as image:
        assert image.size == (1380, 540)  # two panels of 4.6 x 3.6 inches
        assert len(image.convert('L').getcolors()) > 50
    rows = list(csv.DictReader((place / 'found' / 'gradients.csv').open()))
    assert [(row['run'], int(row['step'])) for row in rows] == [
        (run, step) for run in ('one', 'two') for step in range(12)
    ]
    assert [float(row['epoch']) for row in rows[:3]] == pytest.approx([0, 1 / 6, 2 / 6], abs=1e-5)
    assert [row['slow_start'] for row in rows[5:7]] == ['1', '0']
    assert float(rows[0]['rest_ratio']) == 3.5
    assert all(float(row['direction1']) ** 2 + float(row['direction2']) ** 2 <= 1 + 1e-9 for row in rows)
    summary = json.loads((place / 'found' / 'gradients.json').read_text())
    assert [phase['rest_ratio'] for phase in summary['runs'][0]['phases']] == [3.5, 1]
    assert summary['runs'][0]['norms_from'] == 'records'
    assert 'torch' in summary['environment']['versions']


def test_results_are_replaced_by_the_same_settings_alone(place, capsys):
    analyse('gradients', 'runs/one')
    Records(place / 'runs' / 'one').drop_from(9)
    analyse('gradients', 'runs/one')
    assert len((place / 'runs' / 'one' / 'analysis' / 'gradients.csv').read_text().splitlines()) == 1 + 9
    capsys.readouterr()
    before = (place / 'runs' / 'one' / 'analysis' / 'gradients.json').read_bytes()
    assert 'give --output' in refusal(capsys, 'gradients', 'runs/one', 'runs/two')
    assert (place / 'runs' / 'one' / 'analysis' / 'gradients.json').read_bytes() == before


def test_runs_of_one_name_are_told_apart(place):
    make_run(place / 'more' / 'one')
    analyse('gradients', 'runs/one', 'more/one', '--output', 'found')
    summary = json.loads((place / 'found' / 'gradients.json').read_text())
    assert [run['name'] for run in summary['runs']] == ['runs-one', 'more-one']


def test_many_records_are_smoothed(place):
    records = [NormRecord(step, 0.25, 1.0, 2.0, 1.7, 4) for step in range(12, 300)]
    Records(place / 'runs' / 'one').add_norms(records)
    analyse('gradients', 'runs/one')
    assert (place / 'runs' / 'one' / 'analysis' / 'gradient_imbalance.pdf').stat().st_size > 5000


MISTAKES = {
    'no analysis': ([], 'the first argument is one of gradients'),
    'another analysis': (['gradient', 'runs/one'], "'gradient' is not an analysis"),
    'no run': (['gradients'], 'slimclr-hub analyze gradients runs/NAME'),
    'options alone': (['gradients', '--batches', '2'], 'required'),
    'no such run': (['gradients', 'runs/three'], 'runs/three is not the folder of a run'),
    'twice': (['gradients', 'runs/one', 'runs/one/'], 'given twice'),
    'unknown option': (['gradients', 'runs/one', '--batch', '2'], '--batch 2'),
    'no batches': (['gradients', 'runs/one', '--batches', '0'], 'batches is 0; give 1 or more'),
    'too wide': (['gradients', 'runs/bare', '--smallest', '1.5'], '1.5 is outside (0, 1]'),
    'nothing recorded': (['gradients', 'runs/bare'], '--diagnostics.every 10'),
    'another width': (['gradients', 'runs/one', '--smallest', '0.5'], 'has recorded the share of width 0.25'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake(place, capsys, mistake):
    arguments, named = MISTAKES[mistake]
    assert named in refusal(capsys, *arguments)
    assert not list(place.rglob('analysis'))


@pytest.mark.parametrize('analysis', ['gradients', 'trajectory', 'surface', 'condition'])
def test_help(capsys, analysis):
    run_script(ANALYZE, '--help')
    printed = capsys.readouterr().out
    assert 'usage: python recipes/analyze.py ANALYSIS' in printed
    assert f'  {analysis} ' in printed
    with pytest.raises(SystemExit, match='0'):
        analyse(analysis, '--help')
    printed = capsys.readouterr().out
    assert f'usage: slimclr-hub analyze {analysis} ' in ' '.join(printed.split())
    assert 'Folder of figures and data' in printed


def test_several_processes_are_refused(place, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # as launchers set it
    assert '2 processes were launched' in refusal(capsys, 'gradients', 'runs/one')
