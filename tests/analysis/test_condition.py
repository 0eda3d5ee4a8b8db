"""The linear-probe condition against the paper's formula and closed forms, and its command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimclr_hub.analysis.condition import (
    Condition,
    condition_defaults,
    condition_figure,
    least_squares,
    linear_condition,
    narrower,
    sides,
)
from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from slimclr_hub.hub.open import open_network
from slimclr_hub.runs.command_line import dump
from slimclr_hub.runs.figures import save_figure
from slimclr_hub.train.config import PretrainConfig
from tests.analysis.runs import analyse, refusal
from tests.data_room.files import write_idx_set
from tests.hub.files import save_small

pytestmark = pytest.mark.usefixtures('on_the_cpu')

N, D, D1, C = 60, 12, 5, 4
IMAGES = 80


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(seed))
    labels[:C] = torch.arange(C)
    return torch.nn.functional.one_hot(labels, C).double(), labels


def written_out(X: torch.Tensor, X1: torch.Tensor, T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (23) to the letter, with the inverse of (21)."""
    d1 = X1.shape[1]
    X11, X12 = X[:, :d1], X[:, d1:]
    inner = X11.T @ X12 @ torch.inverse(X12.T @ X12)
    B11 = torch.inverse(X11.T @ X11 - inner @ X12.T @ X11)
    return B11 @ (X11.T - inner @ X12.T) @ T, torch.inverse(X1.T @ X1) @ X1.T @ T


def test_sides_are_those_of_equation_23():
    X, X1, (T, _) = random(N, D), random(N, D1, seed=1), one_hot()
    left, right = sides(X, X1, T)
    expected_left, expected_right = written_out(X, X1, T)
    assert left.shape == right.shape == (D1, C)
    torch.testing.assert_close(left, expected_left, rtol=0, atol=1e-12)
    torch.testing.assert_close(right, expected_right, rtol=0, atol=1e-12)
    # B11 of Eq. (21) is the corner of (X^T X)^-1, so the left side is the corner of theta in (9).
    theta = torch.inverse(X.T @ X) @ X.T @ T
    torch.testing.assert_close(left, theta[:D1], rtol=0, atol=1e-12)
    torch.testing.assert_close(least_squares(X, T), theta, rtol=0, atol=1e-12)


def orthogonal() -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose first columns, those of the narrower width, are orthogonal to the others."""
    basis, _ = torch.linalg.qr(random(N, D))
    X = torch.cat([basis[:, :D1] @ random(D1, D1, seed=5), basis[:, D1:] @ random(D - D1, D - D1, seed=6)], 1)
    return X, X[:, :D1].clone()


def test_condition_holds_where_the_other_features_are_orthogonal():
    (X, X1), (T, labels) = orthogonal(), one_hot()
    left, right = sides(X, X1, T)
    assert (left - right).abs().max() < 1e-6
    assert right.abs().mean() > 1e-3
    result = linear_condition(X, X1, labels)
    assert result.relative < 1e-6
    assert result.mean < 1e-6
    assert result.own == result.shared


def test_condition_holds_where_the_first_features_explain_everything():
    X = random(N, D)
    weights = random(D1, C, seed=9)
    left, right = sides(X, X[:, :D1], X[:, :D1] @ weights)
    torch.testing.assert_close(left, weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(right, weights, rtol=0, atol=1e-12)


def test_condition_does_not_hold_for_correlated_features():
    """The difference is the bias of omitted variables, (X11^T X11)^-1 X11^T X12 theta2, and it is not small."""
    X, (T, labels) = random(N, D) + random(N, 1, seed=4), one_hot()
    X1 = X[:, :D1]
    theta = least_squares(X, T)
    left, right = sides(X, X1, T)
    bias = torch.linalg.pinv(X1) @ X[:, D1:] @ theta[D1:]
    torch.testing.assert_close(right - left, bias, rtol=0, atol=1e-12)
    assert linear_condition(X, X1, labels).relative > 0.1


def test_figures_by_loop():
    X, X1, (T, labels) = random(N, D), random(N, D1, seed=1), one_hot()
    left, right = sides(X, X1, T)
    result = linear_condition(X, X1, labels)
    differences = [abs(float(left[i, j] - right[i, j])) for i in range(D1) for j in range(C)]
    assert result.total == pytest.approx(sum(differences))
    assert result.mean == pytest.approx(sum(differences) / (D1 * C))
    assert result.features == (D, D1)
    assert result.images == N
    hits = {'own': 0, 'shared': 0}
    for n in range(N):
        hits['own'] += int((X1[n] @ right).argmax()) == int(labels[n])
        hits['shared'] += int((X1[n] @ left).argmax()) == int(labels[n])
    assert result.own == pytest.approx(100 * hits['own'] / N)
    assert result.shared == pytest.approx(100 * hits['shared'] / N)
    eigenvalues = torch.linalg.eigvalsh(X.T @ X)
    assert result.condition_number == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]) ** 0.5)


def test_invariances():
    X, X1, (T, _) = random(N, D), random(N, D1, seed=1), one_hot()
    left, right = sides(X, X1, T)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(8))
    rotation, _ = torch.linalg.qr(random(N, N, seed=2))
    mixed = torch.cat([X[:, :D1], X[:, D1:] @ random(D - D1, D - D1, seed=7)], 1)
    for other, factor in (
        (sides(X[order], X1[order], T[order]), 1),
        (sides(rotation @ X, rotation @ X1, rotation @ T), 1),
        (sides(mixed, X1, T), 1),  # what the other features span matters, not which they are
        (sides(X, X1, 3 * T), 3),
        (sides(2 * X, 2 * X1, T), 0.5),
    ):
        torch.testing.assert_close(other[0], factor * left, rtol=0, atol=1e-10)
        torch.testing.assert_close(other[1], factor * right, rtol=0, atol=1e-10)


def test_ridge_by_normal_equations():
    X, X1, (T, _) = random(N, D), random(N, D1, seed=1), one_hot()
    left, right = sides(X, X1, T, ridge=0.3)
    for found, features in (left, X), (right, X1):
        strength = 0.3 * features.square().sum(0).mean()
        gram = features.T @ features + strength * torch.eye(features.shape[1], dtype=torch.float64)
        torch.testing.assert_close(found, torch.linalg.solve(gram, features.T @ T)[:D1], rtol=0, atol=1e-12)


def test_a_small_ridge_hardly_moves_independent_features():
    X, X1, (T, _) = random(N, D), random(N, D1, seed=1), one_hot()
    torch.testing.assert_close(sides(X, X1, T, ridge=1e-9), sides(X, X1, T), rtol=0, atol=1e-8)


def spoil(X: torch.Tensor, how: str) -> torch.Tensor:
    X = X.float()
    if how == 'dead':
        X[:, 2] = 0
    elif how == 'sum':
        X[:, 2] = X[:, 0] + X[:, 1]  # up to the rounding of float32
    return X[: D - 3] if how == 'few' else X


@pytest.mark.parametrize(
    ('how', 'words'),
    [
        ('dead', '12 features of 60 images have rank 11 (1 are zero for every image)'),
        ('sum', '12 features of 60 images have rank 11,'),
        ('few', '12 features of 9 images have rank 9,'),
    ],
)
def test_dependent_features_are_refused_and_a_ridge_takes_them(how, words):
    X, (T, _) = spoil(random(N, D), how), one_hot()
    X1, T = random(N, D1, seed=1)[: len(X)], T[: len(X)]
    with pytest.raises(InputError) as caught:
        sides(X, X1, T)
    assert words in str(caught.value)
    assert '--ridge' in str(caught.value)
    assert all(side.isfinite().all() for side in sides(X, X1, T, ridge=1e-6))


def test_shapes_and_labels_are_checked():
    X, X1, (T, labels) = random(N, D), random(N, D1, seed=1), one_hot()
    for wrong in ((X[1:], X1, T), (X1, X, T), (X, X1, T[1:])):
        with pytest.raises(InputError, match='belong together'):
            sides(*wrong)
    labels[3] = -1
    with pytest.raises(InputError, match='label'):
        linear_condition(X, X1, labels)


def test_narrower_widths():
    widths = (1.0, 0.5, 0.25)
    assert narrower(widths, None) == [0.5, 0.25]
    assert narrower(widths, [0.25]) == [0.25]
    with pytest.raises(InputError, match=r'width 0\.75 is not one of 0\.5, 0\.25'):
        narrower(widths, [0.75])
    with pytest.raises(InputError, match=r'width 1 is not one of'):
        narrower(widths, [1.0])
    with pytest.raises(InputError, match='alone'):
        narrower((0.5,), None)


@pytest.fixture(scope='module')
def network(tmp_path_factory) -> Path:
    """The folder of a run, whose recipe names its images."""
    folder = tmp_path_factory.mktemp('condition') / 'network'
    save_small(folder, in_chans=1)
    data = DataConfig(
        'fashion-mnist', root=str(write_idx_set(folder.parent / 'idx', 96, 37)), size=8, num_workers=0, batch_size=16
    )
    (folder / 'recipe.yaml').write_text(dump(PretrainConfig(data=data)))
    return folder


@torch.no_grad()
def test_command(network, tmp_path, capsys, monkeypatch):
    """On the images of the network's run, without its classifier, by hand."""
    monkeypatch.setenv('COLUMNS', '80')
    options = ['--images', IMAGES, '--splits', '[train]', '--widths', '[0.25, 0.5]', '--output', tmp_path]
    analyse('condition', network, *options, '--ridge', '1e-6')
    shown = capsys.readouterr().out
    assert '…' not in shown
    content = json.loads((tmp_path / 'condition.json').read_text())
    assert content['settings']['data.size'] == 8
    assert 'torch' in content['environment']['versions']
    data = DataConfig('fashion-mnist', root=str(network.parent / 'idx'), size=8, num_workers=0, batch_size=16)
    views, labels = (torch.cat(parts) for parts in zip(*eval_loader(data, 'train', IMAGES, 0), strict=True))
    model = open_network(str(network)).eval()
    model.reset_classifier(0)
    assert list(content['condition']['train']) == ['0.5', '0.25']
    for width, found in content['condition']['train'].items():
        features = [model.forward_at(views, each) for each in (1.0, float(width))]
        expected = linear_condition(*features, labels, ridge=1e-6)
        assert (found['images'], found['features']) == (IMAGES, [64, int(64 * float(width))])
        for name in 'mean', 'total', 'relative', 'own', 'shared', 'full':
            assert found[name] == pytest.approx(getattr(expected, name), rel=1e-3)
        assert f' {found["mean"]:.3g} ' in shown
        assert re.search(rf'│ train │ +{IMAGES} │ +{width} │', shown)
    assert (tmp_path / 'condition.pdf').is_file()

    before = (tmp_path / 'condition.json').read_bytes()
    error = refusal(capsys, 'condition', network, *options, '--ridge', '1e-3')
    assert 'has results of other settings (ridge 1e-06 -> 0.001); give --output' in error
    assert (tmp_path / 'condition.json').read_bytes() == before


def test_figure(tmp_path):
    values = [Condition((64, 64 // n), 99, 0.1 * n, 0.2, 0.3, 9.0, 1.0, 50.0, 70.0, 10.0 * n, 80.0) for n in (1, 2, 4)]
    results = {split: dict(zip((0.75, 0.5, 0.25), values, strict=True)) for split in ('train', 'validation')}
    figure = condition_figure(results, 'runs/network')
    assert 'network' in figure.get_suptitle()
    for axis, split in zip(figure.axes, ('training', 'training', 'validation', 'validation'), strict=True):
        assert f'99 {split} images' in axis.get_ylabel()
    save_figure(figure, tmp_path / 'condition')
    with Image.open(tmp_path / 'condition.png') as image:
        assert image.size == (1560, 1140)
        pixels = np.asarray(image.convert('RGB'))
    for colour in (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73):
        assert (pixels == colour).all(2).sum() > 2000
    assert (pixels == 255).all(2).mean() > 0.5


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['{network}', '--images', '0'], 'images is 0; give 1 or more'),
        (['{network}', '--splits', '[test]'], "splits 'test' is not one of train, validation"),
        (['{network}', '--ridge', '-1'], 'ridge is -1.0; give 0 or more'),
        (['{network}', '--data.val_split', 'null'], 'data.val_split is null, and splits asks for validation'),
        (['{network}', '--widths', '[0.6]'], 'width 0.6 is not one of 0.75, 0.5, 0.25'),
        (['--images', '9', '{network}'], '--images comes before the network; name it first'),
        (['{network}', '{network}'], 'are 2 networks; give one'),
        (
            ['{network}', '--images', '37'],
            '37 images, and width 1 has 64 features, which are then not independent; give --images 64',
        ),
    ],
)
def test_mistakes_end_in_one_line(network, tmp_path, capsys, arguments, words):
    arguments = [argument.format(network=network) for argument in arguments]
    assert words in refusal(capsys, 'condition', *arguments, '--output', tmp_path)
    assert not list(tmp_path.iterdir())


def test_images_are_those_of_the_run_or_imagenet(network):
    own, published = condition_defaults([str(network)]), condition_defaults(['slimclr_resnet50.mocov2_200e_in1k'])
    assert (own['data.name'], own['data.size'], own['data.channels']) == ('fashion-mnist', 8, 1)
    assert (published['data.name'], published['data.size'], published['data.channels']) == ('folder', 224, 3)
