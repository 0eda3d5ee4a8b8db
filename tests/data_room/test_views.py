from math import sqrt

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from slimclr_hub.data import ViewConfig
from slimclr_hub.data.indexed import IndexedImages
from slimclr_hub.data.sources import ArrayImages
from slimclr_hub.data.views import Views
from slimclr_hub.errors import InputError
from tests.data_room.files import some_images
from tests.data_room.plain import normalised_view

PLAIN = ViewConfig(
    crop_min=1.0, brightness=0, contrast=0, saturation=0, hue=0, jitter_prob=0, gray_prob=0, blur_prob=0, flip_prob=0
)
RGB = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
DRAWS = 600


def plain_but(**values) -> ViewConfig:
    return ViewConfig(**{**vars(PLAIN), **values})


def draws(config: ViewConfig, image: Image.Image, size: int, count: int = DRAWS) -> torch.Tensor:
    view = normalised_view(config, size, **RGB)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return torch.stack([view(image) for _ in range(count)])


def near(share: float, probability: float, count: int = DRAWS) -> bool:
    return abs(share - probability) < 4 * sqrt(probability * (1 - probability) / count) + 1e-9


@pytest.fixture(scope='module')
def coordinates() -> Image.Image:
    """An image whose red is the horizontal and whose green is the vertical position, so that a crop shows its place."""
    ramp = np.arange(128, dtype=np.uint8) * 2
    red, green = np.broadcast_to(ramp, (128, 128)), np.broadcast_to(ramp[:, None], (128, 128))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], 2))


class Seeded:
    """(views, label) by (epoch, index)."""

    def __init__(self, dataset, transform, seed: int) -> None:
        self.transform = transform
        self.images = IndexedImages(dataset, transform, seed, max_corrupt=0)

    def __getitem__(self, key: tuple[int, int]):
        sample, problems = self.images[key]
        assert sample is not None
        assert not problems
        return sample.views, sample.label


def seeded(count: int = 12, config: ViewConfig | None = None, seed: int = 3) -> Seeded:
    view = normalised_view(config or ViewConfig(), 20, (0.286,), (0.353,))
    return Seeded(ArrayImages(*some_images('train', count), 'L'), Views(view, view), seed)


# Determinism


def test_two_views_differ():
    for i in range(12):
        (query, key), _ = seeded()[0, i]
        assert query.shape == key.shape == (1, 20, 20)
        assert query.dtype == torch.float32
        assert not query.equal(key)


def test_a_view_follows_from_seed_epoch_and_index():
    (query, key), label = seeded()[4, 7]
    again, again_label = seeded()[4, 7]
    assert query.equal(again[0])
    assert key.equal(again[1])
    assert label == again_label == some_images('train', 8)[1][7]
    assert not query.equal(seeded()[5, 7][0][0])
    assert not query.equal(seeded(seed=4)[4, 7][0][0])
    # The image is another one as well, so compare what was drawn: on one and the same image, by two indices.
    images = np.repeat(some_images('train', 1)[0], 2, axis=0)
    same_image = Seeded(ArrayImages(images, np.zeros(2, int), 'L'), seeded().transform, 3)
    assert not same_image[0, 0][0][0].equal(same_image[0, 1][0][0])


def test_views_do_not_depend_on_the_global_generator_and_leave_it():
    dataset = seeded()
    results = []
    for seed in 0, 1:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(dataset[0, 5][0][0])
        assert torch.get_rng_state().equal(before)
    assert results[0].equal(results[1])


def test_views_do_not_depend_on_numpy_or_pythons_generator():
    import random

    dataset = seeded()
    results = []
    for seed in 0, 1:
        random.seed(seed)
        np.random.seed(seed)
        results.append(dataset[0, 5][0][0])
    assert results[0].equal(results[1])


def test_seeds_of_neighbouring_images_do_not_coincide():
    """Each (seed, epoch, index) draws its own numbers; a sum of the three would make diagonals equal."""

    class Blank(Dataset):
        def __getitem__(self, index):
            return Image.new('L', (1, 1)), 0

        def __len__(self):
            return 20

    drawn = set()
    for seed in range(4):
        dataset = Seeded(Blank(), lambda _: torch.rand(1, dtype=torch.float64).item(), seed)
        drawn |= {dataset[epoch, index][0] for epoch in range(20) for index in range(20)}
    assert len(drawn) == 4 * 20 * 20


# Distribution


def test_nothing_asked_for_leaves_the_image(coordinates):
    view = draws(PLAIN, coordinates, 128, count=3)
    expected = torch.from_numpy(np.asarray(coordinates).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(view, expected.expand(3, -1, -1, -1), atol=1e-6)


@pytest.mark.parametrize('crop_min', [0.08, 0.3])
def test_area_and_shape_of_crops(coordinates, crop_min):
    views = draws(plain_but(crop_min=crop_min), coordinates, 64)
    # From the centre of the first pixel to that of the last there are 63 of the crop's 64 parts.
    sides = [(view.amax() - view.amin()) * 255 / 2 / 128 * 64 / 63 for pair in views for view in pair[:2]]
    width, height = torch.tensor(sides).view(-1, 2).T
    areas, ratios = width * height, width / height
    assert areas.min() > crop_min - 0.05
    assert areas.min() < crop_min + 0.05
    assert 0.85 < areas.max() < 1.02
    assert ratios.min() > 0.75 * 0.9
    assert ratios.max() < 4 / 3 * 1.1
    # Crops of the whole range rather than of its ends.
    assert torch.histc(areas, 5, crop_min, 1.0).min() > 0.05 * DRAWS


@pytest.mark.parametrize('flip_prob', [0.0, 0.2, 0.5, 1.0])
def test_flip_probability(coordinates, flip_prob):
    views = draws(plain_but(flip_prob=flip_prob, crop_min=0.3), coordinates, 16)
    flipped = views[:, 0, :, 0].mean(1) > views[:, 0, :, -1].mean(1)
    assert near(flipped.float().mean().item(), flip_prob)
    # Never upside down.
    assert (views[:, 1, 0].mean(1) < views[:, 1, -1].mean(1)).all()


def test_jitter_probability_and_strength():
    gray = Image.new('RGB', (8, 8), (128, 128, 128))
    # Of an even gray image brightness alone changes the value, by a factor of 0.6 to 1.4.
    values = draws(plain_but(jitter_prob=0.8, brightness=0.4, contrast=0.4, hue=0.1, saturation=0.4), gray, 8)
    factors = values.mean((1, 2, 3)) * 255 / 128
    assert near((factors != 1).float().mean().item(), 0.8)
    assert 0.59 < factors.min() < 0.65
    assert 1.35 < factors.max() < 1.41


def test_gray_probability():
    red = Image.new('RGB', (8, 8), (200, 30, 60))
    views = draws(plain_but(gray_prob=0.2), red, 8)
    gray = (views[:, 0] == views[:, 1]).all(2).all(1)
    assert near(gray.float().mean().item(), 0.2)


def test_blur_probability():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    original = draws(PLAIN, noise, 32, count=1)
    deviations = draws(plain_but(blur_prob=0.5), noise, 32).std((1, 2, 3))
    blurred = deviations < 0.99 * original.std()
    # The weakest sigmas, below a quarter of a pixel or so, leave the image as it is.
    assert 0.38 < blurred.float().mean() < 0.54
    assert deviations.min() < 0.6 * original.std()
    assert deviations.max() == pytest.approx(original.std().item(), rel=1e-4)


def test_solarize_probability(coordinates):
    views = draws(plain_but(solarize_prob=0.2), coordinates, 16)
    inverted = views[:, 0].amax((1, 2)) < 0.5
    assert near(inverted.float().mean().item(), 0.2)
    # The upper half alone: what is dark stays.
    assert torch.allclose(views[inverted][0, 0, :, 1], views[~inverted][0, 0, :, 1])


def test_normalisation():
    view = normalised_view(PLAIN, 4, (0.2,), (0.5,))(Image.new('L', (4, 4), 255))
    assert view.shape == (1, 4, 4)
    assert torch.allclose(view, torch.tensor(1.6))


@pytest.mark.parametrize('size', [2, 8, 28, 224])
def test_blur_at_any_size(size):
    view = normalised_view(plain_but(blur_prob=1.0), size, **RGB)
    assert view(Image.new('RGB', (40, 30), (10, 200, 30))).shape == (3, size, size)


# Configuration


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('crop_min', 0.0),
        ('crop_min', 1.1),
        ('crop_min', float('nan')),
        ('brightness', -0.1),
        ('contrast', -0.1),
        ('saturation', -0.1),
        ('hue', 0.6),
        ('hue', -0.1),
        ('jitter_prob', 1.1),
        ('gray_prob', -0.1),
        ('blur_prob', 2.0),
        ('flip_prob', float('nan')),
        ('solarize_prob', 1.5),
    ],
)
def test_wrong_value(name, value):
    with pytest.raises(InputError) as error:
        ViewConfig(**{name: value})
    assert f'views.{name} is {value}' in str(error.value)
