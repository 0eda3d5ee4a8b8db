import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import save_file

from slimclr_hub.analysis.base import labels_of
from slimclr_hub.analysis.trajectory import Panel, load_trajectory, planes_figure
from slimclr_hub.errors import InputError
from slimclr_hub.runs.command_line import dump
from slimclr_hub.train.config import PretrainConfig
from tests.analysis.runs import analyse, refusal

SHAPES = {'backbone.conv1.weight': (4, 1, 3, 3), 'backbone.layer1.weight': (6, 4, 3, 3)}
OTHERS = {'backbone.bn1.w100.weight': (4,), 'head.fc1.weight': (8, 6), 'key_backbone.conv1.weight': (4, 1, 3, 3)}
STATE = {'steps_per_epoch': 20, 'evaluated': False, 'processes': 1, 'files': {'process_0.pt': 'a hash'}}
ALONE = {10: (4.0, 1.0), 20: (4.0, -1.0), 30: (3.0, 0.0), 40: (0.0, 0.0)}
SLIMMABLE = {10: (5.0, 1.5), 20: (5.0, -1.5), 30: (1.0, 0.0), 40: (0.0, 0.0)}


def plane() -> torch.Tensor:
    columns = torch.randn(sum(torch.Size(s).numel() for s in SHAPES.values()), 2, generator=torch.manual_seed(1))
    return torch.linalg.qr(columns.double())[0]


def tensors(at: tuple[float, float], seed: int) -> dict[str, torch.Tensor]:
    """Weights at a point of the plane, and other tensors by `seed`."""
    flat = plane() @ torch.tensor(at, dtype=torch.float64) + torch.linspace(-1, 1, len(plane()))
    parts = flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    generator = torch.Generator().manual_seed(seed)
    found = {name: part.reshape(shape).clone() for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}
    return found | {name: torch.randn(shape, generator=generator) for name, shape in OTHERS.items()}


def write_run(folder: Path, path: dict[int, tuple[float, float]]) -> Path:
    """The files of a run along a path that `load_trajectory` reads."""
    for step, at in path.items():
        checkpoint = folder / 'checkpoints' / f'step-{step:08d}'
        checkpoint.mkdir(parents=True)
        save_file(tensors(at, step), checkpoint / 'model.safetensors')
        (checkpoint / 'state.json').write_text(json.dumps({'step': step, **STATE}))
    (folder / 'recipe.yaml').write_text(dump(PretrainConfig()))
    return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp('runs')
    return write_run(place / 'alone-1.0-0', ALONE), write_run(place / 'slimmable-0.5', SLIMMABLE)


@pytest.fixture
def own(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs[0], tmp_path / 'alone'))


def test_path_is_that_of_the_checkpoints(runs):
    trajectory = load_trajectory(runs[0])
    assert trajectory.steps == (10, 20, 30, 40)
    assert set(trajectory.points[-1]) == {'conv1.weight', 'layer1.weight'}
    _, found = trajectory.plane('none')
    expected = torch.tensor(list(ALONE.values()), dtype=torch.float64)
    np.testing.assert_allclose(found.coordinates, expected, rtol=0, atol=1e-9)
    assert found.offsets == pytest.approx((4.0, 1.0))
    squares = expected.var(0)
    assert found.explained == pytest.approx((squares / squares.sum()).tolist())


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"step": 40}', '[' * 9999])
def test_a_damaged_state_is_one_line(own, capsys, text):
    (own / 'checkpoints' / 'step-00000040' / 'state.json').write_text(text)
    assert 'step-00000040 cannot be read' in refusal(capsys, 'trajectory', own)


def test_snapshots_lie_between_checkpoints(own):
    """A snapshot after the last checkpoint belongs to a part of the run that was lost."""
    (own / 'diagnostics').mkdir()
    for step, at in {15: (2.0, 9.0), 20: (8.0, 8.0), 45: (7.0, 7.0)}.items():
        save_file(tensors(at, step), own / 'diagnostics' / f'weights-{step:08d}.safetensors')
    trajectory = load_trajectory(own)
    assert trajectory.steps == (10, 15, 20, 30, 40)
    end = trajectory.points[-1]
    flat = torch.cat([(trajectory.points[1][name] - end[name]).flatten() for name in end])
    torch.testing.assert_close(plane().T @ flat, torch.tensor([2.0, 9.0], dtype=torch.float64))
    assert trajectory.plane('none')[1].offsets[0] == pytest.approx(8.8, abs=0.1)  # mostly along the 2nd column now


def test_runs_that_cannot_be_read(own, tmp_path):
    file = own / 'checkpoints' / 'step-00000020' / 'model.safetensors'
    save_file({'backbone.conv1.weight': torch.zeros(4, 3, 3, 3)}, file)
    with pytest.raises(InputError, match=r'step-00000020.*does not hold the network that'):
        load_trajectory(own)
    file.write_bytes(b'broken')
    with pytest.raises(InputError, match=r'step-00000020.*cannot be read'):
        load_trajectory(own)
    with pytest.raises(InputError, match='has no checkpoint'):
        load_trajectory(tmp_path)


def test_a_run_with_too_few_points_is_named(tmp_path, capsys):
    """As one that has kept two checkpoints and recorded nothing."""
    run = write_run(tmp_path / 'short', {30: (3.0, 0.0), 40: (0.0, 0.0)})
    for analysis in 'trajectory', 'surface':
        error = refusal(capsys, analysis, run)
        assert f'{run}: 2 points' in error
        assert '--diagnostics.snapshots' in error


def test_colours_of_epochs_are_those_of_all_panels(runs, own):
    shutil.rmtree(own / 'checkpoints' / 'step-00000040')
    paths = [load_trajectory(run).plane('none')[1] for run in (runs[0], own)]
    assert [path.epochs[-1] for path in paths] == [2, 1.5]
    figure = planes_figure([Panel('run', path) for path in paths], '')
    scales = [dots.get_clim() for axis in figure.axes for dots in axis.collections if len(dots.get_offsets()) > 2]
    assert scales == [(0, 2)] * 2
    plt.close(figure)


def test_labels():
    names = labels_of([Path('a/x'), Path('b/x'), Path('b/y')])
    assert names == ['a-x', 'b-x', 'y']


def test_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    analyse('trajectory', *runs, '--output', tmp_path)
    shown = capsys.readouterr().out
    assert '…' not in shown
    rows = [line.split() for line in shown.replace('│', ' ').splitlines()]
    assert ['alone-1.0-0', '4', '84.3,', '15.7', '4,', '1'] in rows
    assert ['slimmable-0.5', '4', '82.2,', '17.8', '5,', '1.5', '+50.0', '%'] in rows
    stem = tmp_path / 'trajectory+alone-1.0-0+slimmable-0.5'
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{stem.name}.{s}' for s in ('json', 'pdf', 'png')]
    content = json.loads(Path(f'{stem}.json').read_text())
    alone, slimmable = (each['none'] for each in content['trajectories'])
    assert alone['offsets'] == pytest.approx([4, 1])
    assert slimmable['offsets'] == pytest.approx([5, 1.5])
    assert alone['epochs'] == [0.5, 1, 1.5, 2]
    np.testing.assert_allclose(slimmable['coordinates'], list(SLIMMABLE.values()), atol=1e-9)
    assert content['trajectories'][0]['filter']['normalise'] == 'filter'
    assert Path(f'{stem}.pdf').read_bytes()[:5] == b'%PDF-'
    with Image.open(Path(f'{stem}.png')) as image:
        assert image.size == (1620, 660)
        pixels = np.asarray(image.convert('RGB'))
    assert (pixels == (0xD5, 0x5E, 0x00)).all(2).sum() > 500  # the way
    assert (pixels == 255).all(2).mean() > 0.6


def test_other_settings_do_not_replace_data(own, capsys):
    analyse('trajectory', own)
    file = own / 'analysis' / 'trajectory.json'
    before = file.read_bytes()
    error = refusal(capsys, 'trajectory', own, '--normalise', 'filter')
    assert 'has results of other settings (normalise none -> filter); give --output' in error
    assert file.read_bytes() == before
    analyse('trajectory', own)  # the same again is no harm
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--normalise', 'layer'], "normalise 'layer' is not one of none, filter"),
        (['nowhere'], 'nowhere is not the folder of a run'),
        (['{run}'], 'a run is given twice'),
    ],
)
def test_mistakes_end_in_one_line(runs, capsys, arguments, words):
    arguments = [argument.format(run=runs[0]) for argument in arguments]
    assert words in refusal(capsys, 'trajectory', runs[0], *arguments)
