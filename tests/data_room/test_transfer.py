"""Views of 8 bits that the device normalises: the same batches as of workers that do it."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.loaders import ToDevice
from slimclr_hub.data.training import TrainData
from slimclr_hub.data.views import Normalize, SingleImageTransform, make_crop, make_view
from tests.data_room.files import some_images, write_shards
from tests.data_room.plain import plain_data

CPU = torch.device('cpu')
RGB: dict[str, Any] = {'channels': 3, 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
VIEWS = ViewConfig(size=12, solarize_prob=0.2)
NOTHING: dict[str, Any] = dict.fromkeys(('jitter_prob', 'gray_prob', 'blur_prob', 'solarize_prob', 'flip_prob'), 0.0)
DISTRIBUTIONS = {
    'all': VIEWS,
    'nothing but crops': ViewConfig(**NOTHING),
    **{name: ViewConfig(**{**NOTHING, name: 0.7}) for name in NOTHING},
    'brightness and hue': ViewConfig(contrast=0, saturation=0, jitter_prob=1.0),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Forty images in colours, of which one cannot be read."""
    root = tmp_path_factory.mktemp('folder')
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 256, (30, 24 + i, 3), dtype=np.uint8)).save(root / f'{i:02d}.png')
    (root / '17.png').write_bytes(b'')
    return root


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp('shards')
    write_shards(root, (21, 23), {5: b''})
    return root


def by_index(folder, workers=0, backend='cpu', make=TrainData, **values) -> TrainData:
    of = DataConfig(name='folder', root=str(folder), batch_size=16, num_workers=workers, size=20, **RGB)
    return make(of, ViewConfig(backend=backend), VIEWS, seed=2, **values)


def stream(root, workers=0, make=TrainData, **values) -> TrainData:
    of = DataConfig(name='wds/', root=str(root), batch_size=8, num_workers=workers, shuffle_buffer=5, **values)
    return make(of, ViewConfig(size=20), VIEWS, seed=2)


def assert_same(batches, expected) -> None:
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert [view.dtype for view in batch.views] == [torch.float32] * len(other.views)
        assert all(a.equal(b) for a, b in zip(batch.views, other.views, strict=True))
        assert batch.labels.equal(other.labels)
        assert (batch.position, batch.corrupt) == (other.position, other.corrupt)


# Batches


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('backend', ['cpu', 'kornia'])
def test_the_same_batches_by_index(folder, workers, backend):
    data, plain = by_index(folder, workers, backend), by_index(folder, 0, backend, plain_data)
    for epoch in range(2):
        assert_same(list(data.epoch(epoch)), list(plain.epoch(epoch)))


def test_the_same_microbatches_of_processes(folder):
    shared = {'processes': 2, 'rank': 1, 'microbatches': 2, 'view_count': 1}
    data, plain = (by_index(folder, make=make, **shared) for make in (TrainData, plain_data))
    assert_same(list(data.epoch(1, start=1)), list(plain.epoch(1, start=1)))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('channels', [{}, RGB], ids=['gray', 'colour'])
def test_the_same_batches_of_a_stream(shards, workers, channels):
    data, plain = (stream(shards, workers, make, **channels) for make in (TrainData, plain_data))
    for epoch in range(2):
        whole = list(plain.epoch(epoch))
        assert_same(list(data.epoch(epoch)), whole)
        assert_same(list(data.epoch(epoch, 3, whole[2].position)), whole[3:])


def test_workers_return_bytes(folder, shards):
    for data in by_index(folder), stream(shards):
        chunk, _ = next(data.feed.chunks(0, 0, None))
        assert [view.dtype for view in chunk['views']] == [torch.uint8] * 2
        assert [view.shape[2:] for view in chunk['views']] == [(20, 20), (12, 12)]


# Normalisation


@pytest.mark.parametrize('side', [16, 17])  # the second leaves a rest to vectorised loops
def test_normalisation_is_torchvisions(side):
    mean, std = RGB['mean'], RGB['std']
    views = torch.randint(256, (5, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    result = Normalize(mean, std, CPU)(views)
    assert result.equal(torch.stack([plain(view) for view in views]))
    formula = (views.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert np.allclose(result, formula, atol=1e-6)


def test_normalisation_leaves_what_it_is_given():
    views = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    before = views.clone()
    Normalize((0.5,), (0.5,), CPU)(views)
    assert views.equal(before)


# The way to the device


def test_nothing_is_copied_on_the_cpu():
    tensors = torch.zeros(3), torch.ones(2, dtype=torch.uint8)
    assert all(placed is tensor for placed, tensor in zip(ToDevice(CPU)(tensors), tensors, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_copies_beside_computation(folder):
    """While the device is busy with each batch, the next ones come, into memory of those that have been dropped."""
    data = by_index(folder, workers=2, device='cuda')
    expected = [batch.views[0] for batch in by_index(folder, make=plain_data).epoch(0)]
    busy = torch.randn(2000, 2000, device='cuda')
    for _ in range(5):
        seen = []
        for batch in data.epoch(0):
            for _ in range(50):
                busy = torch.tanh(busy @ busy)
            seen.append(batch.views[0].clone())
            del batch
        assert all(a.cpu().equal(b) for a, b in zip(seen, expected, strict=True))


# Transforms on one image


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_direct_transforms_are_torchvisions(mode, name):
    channels = {'L': 1, 'RGB': 3}[mode]
    image = Image.fromarray(some_images('train', 1)[0][0]).convert(mode)
    assert_direct(make_view(DISTRIBUTIONS[name], 20, channels), image)


def test_direct_crop_is_torchvisions():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 14, 3), dtype=np.uint8))
    # Such that few crops fit, and often none of ten.
    assert_direct(make_crop(ViewConfig(crop_min=0.9), 16), image)


def test_transforms_that_are_not_known_are_called():
    image = Image.fromarray(some_images('train', 1)[0][0])
    assert_direct(v2.Compose([v2.RandomVerticalFlip(0.5), v2.PILToTensor()]), image)


def assert_direct(view: v2.Compose, image: Image.Image) -> None:
    direct = SingleImageTransform(view)
    seen = set()
    with torch.random.fork_rng(devices=()):
        for seed in range(40):
            results = []
            for each in direct, view:
                torch.manual_seed(seed)
                results.append((each(image), torch.get_rng_state()))
            (result, state), (expected, expected_state) = results
            assert result.dtype == expected.dtype == torch.uint8
            assert result.equal(expected)
            assert state.equal(expected_state)
            seen.add(result.numpy().tobytes())
    assert len(seen) > 1
