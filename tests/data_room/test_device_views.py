"""Views that the device computes: each operation against torchvision's, and their distribution against the CPU's."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from math import sqrt

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms.v2 import functional as F

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.device_views import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    Parameters,
    augment,
    blend,
    blur,
    draw,
    make_views,
    shift_hue,
    solarize,
)
from slimclr_hub.data.training import TrainData
from slimclr_hub.data.views import Normalize, blur_kernel, make_crop
from slimclr_hub.errors import InputError
from tests.data_room.files import write_idx_set, write_shards
from tests.data_room.plain import normalised_view

LEVEL = 1 / 255
MOCO_V3 = (ViewConfig(blur_prob=1.0), ViewConfig(blur_prob=0.1, solarize_prob=0.2))


def picture(side: int, seed: int = 0) -> Image.Image:
    """An image of many colours, with edges and fine texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 3) * x + rng.uniform(0.5, 3) * y + phase)) for phase in rng.random(3)]
    image = 128 + 70 * np.stack(waves, 2) + rng.normal(0, 15, (side, side, 3))
    image[side // 3 : side // 2, side // 4 : side // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return F.pil_to_tensor(image)[None] / 255


@pytest.fixture(scope='module')
def pictures() -> list[Image.Image]:
    return [picture(32, seed) for seed in range(6)]


@pytest.fixture(scope='module')
def batch(pictures) -> torch.Tensor:
    return torch.cat([tensor(each) for each in pictures])


# Each operation, with a parameter of its own for every sample


def differences(results: torch.Tensor, expected: list[Image.Image]) -> torch.Tensor:
    return (results - torch.cat([tensor(each) for each in expected])).abs()


@pytest.mark.parametrize(
    ('kind', 'operation', 'levels'),
    [
        # Pillow rounds the result down, and for the other two the gray that it blends with as well.
        (BRIGHTNESS, F.adjust_brightness, 1.0),
        (CONTRAST, F.adjust_contrast, 1.5),
        (SATURATION, F.adjust_saturation, 1.5),
    ],
)
def test_blending(pictures, batch, kind, operation, levels):
    factors = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.25, 1.4])
    results = blend(batch, factors, torch.full((6,), kind))
    expected = [operation(each, float(factor)) for each, factor in zip(pictures, factors, strict=True)]
    assert differences(results, expected).max() < (levels + 0.01) * LEVEL
    # Of another kind or factor it would be much more.
    assert differences(results.flip(0), expected[::-1]).max() < (levels + 0.01) * LEVEL
    assert differences(blend(batch, factors + 0.05, torch.full((6,), kind)), expected).max() > 3 * LEVEL


def test_blending_of_several_kinds_in_one_batch(pictures, batch):
    kinds = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION] * 2)
    operations = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation] * 2
    expected = [operation(each, 1.3) for operation, each in zip(operations, pictures, strict=True)]
    assert differences(blend(batch, torch.full((6,), 1.3), kinds), expected).max() < 1.51 * LEVEL


def test_hue(pictures, batch):
    turns = torch.tensor([-0.5, -0.1, -0.03, 0.02, 0.1, 0.4])
    results = shift_hue(batch, turns)
    exact = torch.cat([F.adjust_hue(each[None], float(turn)) for each, turn in zip(batch, turns, strict=True)])
    assert (results - exact).abs().max() < 1e-4
    # On 8 bits Pillow rounds hue, saturation and value each, so a colour is off by some levels, but not on average.
    rounded = [F.adjust_hue(each, float(turn)) for each, turn in zip(pictures, turns, strict=True)]
    assert differences(results, rounded).mean() < 1.5 * LEVEL
    assert differences(results, rounded).max() < 10 * LEVEL
    assert differences(shift_hue(batch, turns + 0.05), rounded).mean() > 5 * LEVEL


def test_gray(pictures, batch):
    gray = torch.tensor([True, False] * 3)
    results = augment(batch, ViewConfig(jitter_prob=0, blur_prob=0, flip_prob=0), parameters(6, gray=gray))
    expected = [
        F.rgb_to_grayscale(each, 3) if turned else each for each, turned in zip(pictures, gray.tolist(), strict=True)
    ]
    assert differences(results, expected).max() < 1.01 * LEVEL
    assert results[0].std(0).max() == 0


@pytest.mark.parametrize('side', [32, 64])
def test_blur(side):
    images = [picture(side, seed) for seed in range(5)]
    sigmas = torch.tensor([0.1, 0.3, 0.7, 1.3, 2.0])
    results = blur(torch.cat([tensor(each) for each in images]), sigmas)
    kernel = blur_kernel(side)
    expected = [
        F.gaussian_blur(each, [kernel, kernel], [float(sigma)] * 2) for each, sigma in zip(images, sigmas, strict=True)
    ]
    assert differences(results, expected).max() < 0.51 * LEVEL


def test_solarize(pictures, batch):
    expected = [F.solarize(each, 128) for each in pictures]
    assert differences(solarize(batch), expected).max() < 0.01 * LEVEL
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (solarize(ramp / 255) * 255).round().to(torch.uint8).equal(F.solarize(ramp, 128))


def test_flip(pictures, batch):
    flip = torch.tensor([True, True, False, False, True, False])
    results = augment(batch, ViewConfig(jitter_prob=0, blur_prob=0, gray_prob=0), parameters(6, flip=flip))
    expected = [F.hflip(each) if turned else each for each, turned in zip(pictures, flip.tolist(), strict=True)]
    assert differences(results, expected).max() == 0


def parameters(count: int, **values: torch.Tensor) -> Parameters:
    """Those that change nothing, but for what is given."""
    no = torch.zeros(count, dtype=torch.bool)
    nothing = Parameters(
        factors=torch.ones(count, 3),
        kinds=torch.arange(3).expand(count, 3),
        hue=torch.zeros(count),
        hue_place=torch.zeros(count, dtype=torch.int64),
        gray=no,
        blur=no,
        sigma=torch.ones(count),
        solarize=no,
        flip=no,
    )
    return replace(nothing, **values)


def test_nothing_asked_for_leaves_the_images(batch):
    assert augment(batch, replace(MOCO_V3[1], hue=0.1), parameters(6)).equal(batch)


def orders(drawn: Parameters) -> list[tuple[str, ...]]:
    """Order of the four jitters of each sample."""
    names = ('brightness', 'contrast', 'saturation')
    listed = []
    for kinds, place in zip(drawn.kinds.tolist(), drawn.hue_place.tolist(), strict=True):
        order = [names[kind] for kind in kinds]
        order.insert(place, 'hue')
        listed.append(tuple(order))
    return listed


def test_jitter_in_the_order_of_each_sample():
    """The hue is shifted once for the batch, yet in its place for each sample."""
    config = ViewConfig(jitter_prob=1.0, hue=0.3, gray_prob=0, blur_prob=0, flip_prob=0)
    drawn = draw(config, 48, torch.Generator().manual_seed(0))
    images = torch.cat([tensor(picture(16, seed)) for seed in range(48)])
    results = augment(images, config, drawn)
    assert len(set(orders(drawn))) > 15
    for i, order in enumerate(orders(drawn)):
        values = dict(zip(('brightness', 'contrast', 'saturation'), drawn.factors[i].tolist(), strict=True))
        values['hue'] = drawn.hue[i].item()

        def in_order(order, image=images[i : i + 1], values=values):
            for name in order:
                image = getattr(F, f'adjust_{name}')(image, values[name])
            return image

        assert (results[i] - in_order(order)[0]).abs().max() < 5e-3
        assert (results[i] - in_order(order[::-1])[0]).abs().max() > 5e-3 or order == order[::-1]


# What is drawn


def test_every_order_is_equally_likely():
    counts = Counter(orders(draw(ViewConfig(), 24_000, torch.Generator().manual_seed(1))))
    assert len(counts) == 24
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_probabilities_and_ranges():
    config = ViewConfig(
        brightness=0.2, contrast=1.5, saturation=0.4, hue=0.1, jitter_prob=0.7, gray_prob=0.2, blur_prob=0.3,
        flip_prob=0.5, solarize_prob=0.1,
    )  # fmt: skip
    count = 20_000
    drawn = draw(config, count, torch.Generator().manual_seed(2))
    for name in 'gray', 'blur', 'flip', 'solarize':
        probability = getattr(config, f'{name}_prob')
        share = getattr(drawn, name).float().mean().item()
        assert abs(share - probability) < 4 * sqrt(probability * (1 - probability) / count)
    jittered = drawn.hue != 0
    assert abs(jittered.float().mean().item() - 0.7) < 4 * sqrt(0.7 * 0.3 / count)
    # All of a sample or nothing.
    assert (drawn.factors[~jittered] == 1).all()
    ranges = ((0.8, 1.2), (0.0, 2.5), (0.6, 1.4))
    columns = [*drawn.factors[jittered].T, drawn.hue[jittered], drawn.sigma]
    for values, (low, high) in zip(columns, (*ranges, (-0.1, 0.1), (0.1, 2.0)), strict=True):
        assert low <= values.min()
        assert values.max() <= high
        assert ks_2samp(values.numpy(), np.linspace(low, high, count)).pvalue > 0.01
    # One sample's says nothing of the next one's.
    flags = torch.stack([drawn.gray, drawn.blur, drawn.flip, drawn.solarize, jittered]).float()
    assert (torch.corrcoef(flags) - torch.eye(5)).abs().max() < 4 / sqrt(count)


# Distribution


def statistics(views: torch.Tensor) -> dict[str, np.ndarray]:
    """Numbers [n] that tell views [n, 3, H, W] in [0, 1] apart by what the augmentations change."""
    saturation = views.amax(1) - views.amin(1)
    means = views.mean((2, 3))
    gray = views.mean(1)
    contrast, gradient = gray.std((1, 2)), gray.diff(dim=2).square().mean((1, 2)).sqrt()
    values = {
        'brightness': means.mean(1),
        # Each relative to what else changes it, so that little hides it.
        'contrast': contrast / means.mean(1),
        'saturation': saturation.mean((1, 2)) / means.mean(1),
        'gradient energy': gradient / contrast,
        'red over green': means[:, 0] - means[:, 1],
        'blue over green': means[:, 2] - means[:, 1],
        'left over right': (views[..., :8] - views[..., -8:]).mean((1, 2, 3)),
        'bright part': (views > 0.5).float().mean((1, 2, 3)),
    }
    # What is the same but for the last bits must count as the same: gray has no saturation in both.
    return {name: value.double().numpy().round(4) for name, value in values.items()}


def p_values(some: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    one, other = statistics(some), statistics(others)
    return {name: ks_2samp(one[name], other[name]).pvalue for name in one}


SIDE, DRAWS = 24, 2000
# Both crop by the same code; crops that differ little leave the differences to what is compared.
MOCO_V2 = ViewConfig(crop_min=0.9)
CONFIGS = {
    'moco v2': MOCO_V2,
    'moco v3 first': replace(MOCO_V2, blur_prob=1.0),
    'moco v3 second': replace(MOCO_V2, blur_prob=0.1, solarize_prob=0.2),
}


def seeded_draws(view: Callable[[Image.Image], torch.Tensor], seed: int) -> torch.Tensor:
    image = picture(40, seed=7)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return torch.stack([view(image) for _ in range(DRAWS)])


@pytest.fixture(scope='module')
def on_cpu() -> dict[str, torch.Tensor]:
    views = {name: normalised_view(config, SIDE, (0.0,) * 3, (1.0,) * 3) for name, config in CONFIGS.items()}
    return {name: seeded_draws(view, seed) for seed, (name, view) in enumerate(views.items())}


@pytest.fixture(scope='module')
def crops() -> torch.Tensor:
    return seeded_draws(make_crop(MOCO_V2, SIDE), seed=10)


def on_device(config: ViewConfig, crops: torch.Tensor, drawer: Callable[..., Parameters] = draw) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.cat([augment(part / 255, config, drawer(config, len(part), generator)) for part in crops.split(100)])


@pytest.mark.parametrize('name', list(CONFIGS))
def test_same_distribution_as_on_the_cpu(on_cpu, crops, name):
    values = p_values(on_cpu[name], on_device(CONFIGS[name], crops))
    # Of eight numbers the least lies below a hundredth in one case of a dozen, so their number is allowed for.
    assert min(values.values()) > 0.01 / len(values), values


def test_parameters_of_a_batch_instead_of_a_sample_are_found_out(on_cpu, crops):
    def shared(config, count, generator):
        drawn = draw(config, count, generator)
        each = [getattr(drawn, field.name) for field in fields(drawn)]
        return Parameters(*(values[:1].expand_as(values) for values in each))

    values = p_values(on_cpu['moco v2'], on_device(MOCO_V2, crops, shared))
    assert min(values.values()) < 1e-6, values


@pytest.mark.parametrize(
    'other', [{'hue': 0.15}, {'saturation': 0.9}, {'contrast': 0.2}, {'blur_prob': 0.3}, {'flip_prob': 0.4}]
)
def test_other_distributions_are_found_out(on_cpu, crops, other):
    values = p_values(on_cpu['moco v2'], on_device(replace(MOCO_V2, **other), crops))
    assert min(values.values()) < 1e-3, values


# On the device


def test_nothing_waits_for_the_device():
    """Tensors of the meta device have no values, so whatever asks for one fails."""
    meta = torch.device('meta')
    normalize = Normalize((0.5,) * 3, (0.2,) * 3, meta)
    crops = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=meta)
    result = normalize(make_views(crops, replace(MOCO_V3[1], blur_prob=0.5), 1, 2, 3))
    assert result.shape == crops.shape
    assert result.dtype == torch.float32
    with pytest.raises((RuntimeError, NotImplementedError)):
        crops[crops > 0]


@pytest.mark.parametrize('channels', [1, 3])
def test_gray_and_colour_images(channels):
    crops = torch.randint(256, (16, channels, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = make_views(crops, MOCO_V3[1], 0)
    assert result.shape == crops.shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert result.equal(make_views(crops, MOCO_V3[1], 0))
    assert not result.equal(make_views(crops, MOCO_V3[1], 1))


# In training


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_idx_set(tmp_path_factory.mktemp('idx'), 50, 20)


def train_data(root, *, workers=0, backend='kornia', **values) -> TrainData:
    of = DataConfig(name='fashion-mnist', root=str(root), batch_size=16, num_workers=workers)
    first = ViewConfig(size=20, backend=backend)
    return TrainData(of, first, ViewConfig(size=16, solarize_prob=0.2), seed=4, **values)


def test_batches_are_final_views(root):
    batch = next(train_data(root).epoch(0))
    assert [tuple(view.shape) for view in batch.views] == [(16, 1, 20, 20), (16, 1, 16, 16)]
    for view in batch.views:
        values = view * 0.353 + 0.286
        assert -1e-5 < values.min() < 0.01
        assert 0.5 < values.max() < 1 + 1e-5
    on_cpu = next(train_data(root, backend='cpu').epoch(0))
    assert batch.labels.equal(on_cpu.labels)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_can_be_entered_at_any_step(root, workers):
    whole = list(train_data(root, microbatches=2, processes=2, rank=1).epoch(1))
    rest = list(train_data(root, microbatches=2, processes=2, rank=1, workers=workers).epoch(1, start=1))
    assert len(rest) == len(whole) - 2 == 4
    for batch, expected in zip(rest, whole[2:], strict=True):
        assert all(a.equal(b) for a, b in zip(batch.views, expected.views, strict=True))


def test_draws_differ_by_everything_they_should(root):
    def drawn(epoch=0, rank=0, skip=0, view=0):
        """What the device draws, on one and the same crops."""
        data = train_data(root, microbatches=2, processes=2, rank=rank)
        crops = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
        return data._views((crops, crops), epoch, skip)[view]

    some = [drawn(), drawn(epoch=1), drawn(rank=1), drawn(skip=1), drawn(skip=2), drawn(view=1)]
    for i, one in enumerate(some):
        assert not any(one.equal(other) for other in some[:i])
    assert drawn().equal(some[0])


def test_resume_of_a_stream(tmp_path):
    write_shards(tmp_path, (21, 20))
    of = DataConfig(name='wds/', root=str(tmp_path), batch_size=4, shuffle_buffer=5)
    data = TrainData(of, ViewConfig(backend='kornia', size=8), seed=0)
    whole = list(data.epoch(0))
    rest = list(data.epoch(0, start=7, position=whole[6].position))
    assert len(rest) == 3
    for batch, expected in zip(rest, whole[7:], strict=True):
        assert all(a.equal(b) for a, b in zip(batch.views, expected.views, strict=True))


def test_missing_kornia(root, monkeypatch):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'kornia']:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, 'kornia', None)
    monkeypatch.delitem(sys.modules, 'slimclr_hub.data.device_views')
    with pytest.raises(InputError, match=r'pip install "slimclr-hub\[gpu\]"'):
        train_data(root)


def test_unknown_backend():
    with pytest.raises(InputError, match=r"views\.backend 'dali' is not one of cpu, kornia"):
        ViewConfig(backend='dali')


def test_cpu_backend_does_not_import_kornia(root):
    script = (
        'import sys; from slimclr_hub.data import DataConfig, ViewConfig\n'
        'from slimclr_hub.data.training import TrainData\n'
        'list(TrainData(DataConfig(batch_size=3000, num_workers=0, size=4), ViewConfig(), seed=0).epoch(0, start=2))\n'
        "assert not {'kornia', 'webdataset', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', script], check=False).returncode == 0
