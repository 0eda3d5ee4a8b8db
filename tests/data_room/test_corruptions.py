"""Corruptions: severity 0 is the identity, strength grows with severity, and draws follow from the seed."""

import itertools

import numpy as np
import pytest
from PIL import Image

from slimclr_hub.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from slimclr_hub.errors import InputError
from tests.data_room.files import some_images

IMAGES = [Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC) for image in some_images('train', 8)[0]]
COLOURED = [image.convert('RGB') for image in IMAGES]


def distance(image: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.parametrize('images', [IMAGES, COLOURED], ids=['L', 'RGB'])
@pytest.mark.parametrize('name', CORRUPTIONS)
def test_strength_grows_with_severity(name, images):
    means = []
    for severity in (0, *SEVERITIES):
        found = [Corruption(name, severity)(image) for image in images]
        assert all(a.size == b.size and a.mode == b.mode for a, b in zip(found, images, strict=True))
        means.append(np.mean([distance(a, b) for a, b in zip(found, images, strict=True)]))
    assert means[0] == 0
    assert all(less < more for less, more in itertools.pairwise(means)), means


@pytest.mark.parametrize('name', ['gaussian_noise', 'shot_noise', 'impulse_noise', 'fog'])
def test_draws_follow_from_seed_and_image(name):
    first, again, other = (np.asarray(Corruption(name, 3, seed)(IMAGES[0])) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_closed_forms():
    """Of a gray ramp, whose values are known."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    image = Image.fromarray(ramp)
    brighter = np.asarray(Corruption('brightness', 2)(image), dtype=int)
    np.testing.assert_allclose(brighter, np.clip(ramp.astype(int) + 51, 0, 255), atol=1)
    flat = np.asarray(Corruption('contrast', 4)(image), dtype=float)
    np.testing.assert_allclose(flat, 126 + 0.1 * (ramp.astype(float) - 126), atol=1)
    salted = np.asarray(Corruption('impulse_noise', 5)(Image.new('L', (256, 256), 128)))
    assert set(np.unique(salted)) == {0, 128, 255}
    assert (salted != 128).mean() == pytest.approx(0.27, abs=0.01)
    noisy = np.asarray(Corruption('gaussian_noise', 1)(Image.new('L', (256, 256), 128)), dtype=float)
    assert noisy.std() / 255 == pytest.approx(0.08, rel=0.05)


@pytest.mark.parametrize(('name', 'severity'), [('rain', 1), ('fog', 6), ('fog', -1)])
def test_refusals(name, severity):
    with pytest.raises(InputError, match='is not one of'):
        Corruption(name, severity)
