import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from slimclr_hub.analysis.replay import Replay
from slimclr_hub.analysis.surface import ErrorMeasure, LossMeasure, SurfaceConfig, _height, grid, measure_surface
from slimclr_hub.analysis.trajectory import load_trajectory
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from tests.analysis.runs import analyse, pretrain, refusal
from tests.train.runs import make_place

SETTINGS = {'run': 'x', 'resolution': 3}
_NO_MOCO = [
    argument for name in ('dim', 'queue_size', 'bn_splits', 'momentum') for argument in (f'--method.{name}', 'null')
]
KINDS = {'mocov2': [], 'supervised': [*_NO_MOCO, '--method.name', 'supervised', '--method.num_classes', '10']}


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs of six steps with a checkpoint after each; `earlier` is the one of MoCo v2 without its last step."""
    place = make_place(
        tmp_path_factory.mktemp('surface'),
        model={'widths': [1.0, 0.25]},
        method={'slow_start_epochs': 0},
        optim={'epochs': 1},
        knn={'every': 0},
        data={'size': 8},
        run={'checkpoint_steps': 1, 'keep_checkpoints': 9},
    )
    for kind, options in KINDS.items():
        pretrain(place, '--run.name', kind, *options)
    found = {kind: place / 'runs' / kind for kind in KINDS}
    found['earlier'] = Path(shutil.copytree(found['mocov2'], found['mocov2'].with_name('earlier')))
    shutil.rmtree(found['earlier'] / 'checkpoints' / 'step-00000006')
    return found


@pytest.fixture(scope='module')
def replays(runs) -> dict[str, Replay]:
    return {kind: Replay(folder, 'cpu') for kind, folder in runs.items()}


@pytest.fixture
def at_the_end(replays):
    """A function that loads the last checkpoint of a kind."""

    def load(kind: str) -> Replay:
        replays[kind].load(replays[kind].steps[-1])
        return replays[kind]

    return load


def plane_of(folder: Path):
    return load_trajectory(folder).plane('filter')[0]


def state_of(replay: Replay) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in replay.method.state_dict().items()}


AXES = ([-0.05, 0.0, 0.05], [-0.02, 0.0, 0.02])


def test_grid():
    for resolution in 3, 21, 51:
        points = grid(0.1318, resolution)
        assert len(points) == resolution
        assert points[resolution // 2] == 0.0
        np.testing.assert_allclose(points, np.linspace(-0.1318, 0.1318, resolution), atol=1e-15)
        assert [-point for point in reversed(points)] == points


@pytest.mark.parametrize('method', ['mocov2', 'supervised'])
def test_surface_by_loop(runs, at_the_end, tmp_path, method):
    """At the origin exactly the loss of the checkpoint; elsewhere that of a network with moved weights."""
    replay, plane = at_the_end(method), plane_of(runs[method])
    before = state_of(replay)
    values = measure_surface(LossMeasure(replay, 2), plane, AXES, tmp_path / 'points.jsonl', SETTINGS)
    # Weights, statistics, queue and momentum encoder are as before.
    torch.testing.assert_close(state_of(replay), before, rtol=0, atol=0)

    fresh = Replay(runs[method], 'cpu')
    fresh.load(6)
    steps = fresh.next_steps(2)
    for j, i in (0, 0), (0, 2), (2, 1), (1, 1):
        moved = dict(before)
        for name in plane[0]:
            weight, (a, b) = before[f'backbone.{name}'], (AXES[0][i], AXES[1][j])
            moved[f'backbone.{name}'] = weight + a * plane[0][name].float() + b * plane[1][name].float()
        fresh.method.load_state_dict(moved)
        losses = fresh.losses(steps, momentum=False)
        assert {name: values[name][j][i] for name in values} == {n: loss.item() for n, loss in losses.items()}
    fresh.load(6)
    assert values['loss'][1][1] == fresh.losses(fresh.next_steps(2), momentum=False)['loss'].item()
    assert len({value for row in values['loss'] for value in row}) == 9
    assert {f'{"info_nce" if method == "mocov2" else "cross_entropy"}/{w:g}' for w in (1, 0.25)} < set(values)


class Cut:
    """A measure that is interrupted before its `last`-th point."""

    def __init__(self, measure: LossMeasure, last: int) -> None:
        self.backbone = measure.backbone
        self.measure = measure
        self.left = last

    def __call__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.measure()


def test_interrupted_surface_is_resumed(runs, at_the_end, tmp_path):
    replay, plane = at_the_end('supervised'), plane_of(runs['supervised'])
    measure, partial, seen = LossMeasure(replay, 1), tmp_path / 'points.jsonl', []
    complete = measure_surface(measure, plane, AXES, tmp_path / 'complete.jsonl', SETTINGS)
    before = state_of(replay)
    with pytest.raises(KeyboardInterrupt):
        measure_surface(Cut(measure, 4), plane, AXES, partial, SETTINGS)
    torch.testing.assert_close(state_of(replay), before, rtol=0, atol=0)  # the weights are restored
    with partial.open('a') as file:
        file.write('[1, 1, {"lo')  # as a kill leaves it
    rest = Cut(measure, 5)
    assert measure_surface(rest, plane, AXES, partial, SETTINGS, seen.append) == complete
    assert rest.left == 0
    assert seen == [4, 1, 1, 1, 1, 1]
    # With nothing left to measure.
    assert measure_surface(Cut(measure, 0), plane, AXES, partial, SETTINGS) == complete
    with pytest.raises(InputError, match='other settings'):
        measure_surface(measure, plane, AXES, partial, {**SETTINGS, 'resolution': 5})


def test_infinite_losses_are_none(runs, at_the_end, tmp_path):
    replay, (first, second) = at_the_end('supervised'), plane_of(runs['supervised'])
    first = {name: tensor.clone() for name, tensor in first.items()}
    first['conv1.weight'][0, 0, 0, 0] = 1e38
    values = measure_surface(
        LossMeasure(replay, 1), (first, second), ([-9.0, 0.0, 9.0], [-0.1, 0.0, 0.1]), tmp_path / 'p.jsonl', SETTINGS
    )
    assert [[value is None for value in row] for row in values['loss']] == [[True, False, True]] * 3


def images(replay: Replay, split: str, count: int | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two batches."""
    found = list(eval_loader(replay.config.data, split, count, replay.config.run.seed))[:2]
    return [views for views, _ in found], torch.cat([labels for _, labels in found])


def test_error_of_a_classifier(at_the_end):
    """By hand: batches of 16 normalised by their own statistics; the last one of the 37 images is not whole."""
    replay = at_the_end('supervised')
    before = state_of(replay)
    found = ErrorMeasure(replay, 37)()
    backbone = copy.deepcopy(replay.method.backbone).train().requires_grad_(False)
    views, labels = images(replay, 'validation')
    for width in backbone.widths:
        predicted = torch.cat([backbone.forward_at(batch, width).argmax(1) for batch in views])
        assert found[f'error/{width:g}'].item() == pytest.approx(100 * (predicted != labels).double().mean().item())
    torch.testing.assert_close(state_of(replay), before, rtol=0, atol=0)


def test_error_by_k_nn(at_the_end):
    replay = at_the_end('mocov2')
    measure = ErrorMeasure(replay, 32)
    found = {name: value.item() for name, value in measure().items()}
    backbone = copy.deepcopy(replay.method.backbone).train().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.splits = 1
    bank, labels = images(replay, 'train', 32)
    queries, truth = images(replay, 'validation', 32)
    for width in backbone.widths:
        keys, asked = (torch.cat([backbone.forward_at(batch, width) for batch in x]) for x in (bank, queries))
        similar = F.normalize(asked) @ F.normalize(keys).T
        wrong = 0
        for row, label in zip(similar, truth, strict=True):
            votes = [0.0] * 10
            for n in row.argsort(descending=True)[: replay.config.knn.k]:
                votes[int(labels[n])] += float((row[n] / replay.config.knn.temperature).exp())
            wrong += max(range(10), key=votes.__getitem__) != int(label)
        assert found[f'error/{width:g}'] == pytest.approx(100 * wrong / 32)
    with torch.no_grad():
        for parameter in measure.backbone.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert {name: value.item() for name, value in measure().items()} != found


def test_error_needs_images(at_the_end):
    with pytest.raises(InputError, match='5 images of validation make no batch of 16'):
        ErrorMeasure(at_the_end('mocov2'), 5)


def test_the_loss_of_one_width_has_the_name_of_the_method():
    """SEED and CompRess log a cross-entropy, and a method of one's own may log neither."""
    config = SurfaceConfig(quantity='full')
    taught = {'loss': 0, 'loss/1': 0, 'kl/0.5': 0, 'cross_entropy/0.5': 0, 'cross_entropy/1': 0}
    narrow = {'loss': 0, 'cross_entropy/0.25': 0}
    keys = ['cross_entropy/1', 'cross_entropy/0.25']
    assert _height(config, [{'values': taught}, {'values': narrow}]) == (keys, 'cross-entropy (nats)')
    with pytest.raises(InputError, match=r'logs no info_nce and no cross_entropy of each width; give --quantity total'):
        _height(config, [{'values': {'loss': 0, 'loss/1': 0}}])


def test_command(runs, at_the_end, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    options = ['--resolution', 3, '--batches', 1, '--output', tmp_path]
    arguments = ['surface', runs['mocov2'], runs['earlier'], *options, '--quantity']
    analyse(*arguments, 'full')
    shown = capsys.readouterr()
    assert 'earlier: the last checkpoint is after step 5 of 6' in shown.err + shown.out
    stem = tmp_path / 'loss-surface+mocov2+earlier'
    content = json.loads(stem.with_suffix('.json').read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{stem.name}.{s}' for s in ('json', 'pdf', 'png')]
    origins = []
    for run, name in zip(content['runs'], ('mocov2', 'earlier'), strict=True):
        replay = at_the_end(name)
        losses = replay.losses(replay.next_steps(1), momentum=False)
        origins.append(run['values']['info_nce/1'][1][1])
        assert origins[-1] == losses['info_nce/1'].item()
        row = next(line for line in shown.out.splitlines() if f' {name} ' in line)
        assert f' {origins[-1]:.3f} ' in row
        # The same range for both, which holds both trajectories.
        assert run['axes'] == content['runs'][0]['axes']
        for point in run['path']['coordinates']:
            assert all(abs(x) < axis[-1] for x, axis in zip(point, run['axes'], strict=True))
    assert origins[0] != origins[1]
    with Image.open(stem.with_suffix('.png')) as image:
        assert image.size == (1620, 1320)
        pixels = np.asarray(image.convert('RGB'))
    assert (pixels == (0xD5, 0x5E, 0x00)).all(2).sum() > 500  # the way
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # the heights

    before = stem.with_suffix('.json').read_bytes()
    error = refusal(capsys, *arguments, 'full', '--batches', 2)
    assert 'has results of other settings (batches 1 -> 2); give --output' in error
    assert stem.with_suffix('.json').read_bytes() == before

    # Another quantity of what has been measured is drawn at once.
    content['runs'][0]['values']['loss'][1][1] = 123.0  # which shows that it is read
    stem.with_suffix('.json').write_text(json.dumps(content))
    analyse(*arguments, 'total')
    assert ' 123.000 ' in capsys.readouterr().out
    assert (tmp_path / f'{stem.name}-total.png').is_file()


def test_errors_of_different_methods_compare_and_losses_do_not(runs, tmp_path, capsys):
    options = ['--resolution', 3, '--output', tmp_path]
    both = ['surface', runs['supervised'], runs['mocov2'], *options]
    assert 'losses of mocov2 and supervised do not compare' in refusal(capsys, *both, '--quantity', 'full')
    error = refusal(capsys, *both, '--images', 5)
    assert '5 images of validation make no batch of 16' in error
    analyse('surface', runs['mocov2'], *options, '--images', 32)
    (run,) = json.loads((tmp_path / 'error-surface+mocov2.json').read_text())['runs']
    assert set(run['values']) == {'error/1', 'error/0.25'}
    assert run['path']['normalise'] == 'none'
    assert all(0 <= value <= 100 for rows in run['values'].values() for row in rows for value in row)


@pytest.mark.parametrize(
    ('option', 'value', 'words'),
    [
        ('resolution', 10, 'resolution is 10, which has no point at the origin; give 11'),
        ('resolution', 1, 'resolution is 1; give 3 or more'),
        ('batches', 0, 'batches is 0; give 1 or more'),
        ('quantity', 'height', "quantity 'height' is not one of error, full, total"),
        ('reach', '[0.1, 0]', 'reach is 0.0; give more than 0'),
    ],
)
def test_mistakes_end_in_one_line(runs, capsys, option, value, words):
    assert words in refusal(capsys, 'surface', runs['mocov2'], f'--{option}', value)


def test_directions_are_those_of_the_backbone(runs, at_the_end):
    """All convolutions of all blocks, and with labels the classifier; no head, no momentum encoder."""
    for name, extra in ('mocov2', set()), ('supervised', {'fc.weight'}):
        replay = at_the_end(name)
        expected = {n for n, p in replay.method.backbone.named_parameters() if p.ndim == 4} | extra
        assert set(plane_of(runs[name])[0]) == expected
