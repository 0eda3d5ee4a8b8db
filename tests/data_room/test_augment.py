"""timm's augmentation of labelled images: it follows from the seed, and disturbs no other generator."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from slimclr_hub.data.augment import AugmentConfig, BatchAugmentation, TimmTransform
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.seeding import drawing
from slimclr_hub.errors import InputError
from tests.data_room.files import some_images

CPU = torch.device('cpu')


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('policy', [None, 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2'])
def test_image_follows_from_the_numbers_alone(channels, policy):
    data = DataConfig(size=20, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    transform = TimmTransform(data, AugmentConfig(auto_augment=policy))
    image = Image.fromarray(some_images('train', 1)[0][0]).convert(data.mode)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = []
    for number in (1, 2, 1):
        with drawing(number):
            found.append(transform(image))
    first, other, again = found
    assert first.shape == (channels, 20, 20)
    assert first.dtype == torch.uint8
    assert first.equal(again)
    assert not first.equal(other)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().equal(states[2])


def test_labels_are_smoothed():
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 2])
    same, shares = BatchAugmentation(AugmentConfig(label_smoothing=0.3), 3, CPU)(images, labels, 0)
    assert same is images
    expected = torch.full((4, 3), 0.1)
    expected[range(4), labels] = 0.8  # 0.7, and a third of what is spread
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize('mixing', [{'mixup': 0.4}, {'cutmix': 1.0}, {'mixup': 0.4, 'cutmix': 1.0}])
def test_images_and_labels_are_mixed_alike(mixing):
    """Images whose every pixel is their class show by their mean what share of it their label has to have."""
    labels = torch.tensor([0, 1, 1, 0])
    images = labels.float().view(4, 1, 1, 1).expand(4, 1, 32, 32)
    augment = BatchAugmentation(AugmentConfig(label_smoothing=0, **mixing), 2, CPU)
    for number in range(8):
        mixed, shares = augment(images.clone(), labels, number)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, 1], rtol=1e-4, atol=1e-4)


def test_batch_follows_from_the_numbers_alone():
    config = AugmentConfig(mixup=0.4, cutmix=1.0, erase_prob=0.5)
    augment = BatchAugmentation(config, 10, CPU)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    state = torch.get_rng_state()
    first, other, again = (augment(images.clone(), labels, 7, number) for number in (1, 2, 1))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'crop_min': 0.0}, r'augment.crop_min is 0.0; give a fraction of the area in \(0, 1\]'),
        ({'flip_prob': 1.1}, 'augment.flip_prob is 1.1; give a probability'),
        ({'mixup': -1.0}, 'augment.mixup is -1.0; give 0 or more'),
        ({'label_smoothing': 1.0}, 'augment.label_smoothing is 1.0'),
        ({'auto_augment': 'mystery'}, "augment.auto_augment 'mystery' is no policy of timm"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(InputError, match=words):
        AugmentConfig(**wrong)
