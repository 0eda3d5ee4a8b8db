"""Augmentation for training with labels, by timm: of single images in the workers, and of batches on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing

from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.seeding import drawing_all
from slimclr_hub.errors import InputError
from slimclr_hub.settings import at_least, check_fraction


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of labelled images; all of it is timm's.

    Args:
        crop_min: Smallest fraction of the image's area that a random crop takes.
        flip_prob: Probability of a horizontal flip.
        color_jitter: Strength of the jitter of brightness, contrast and saturation; 0 for none.
        auto_augment: A policy of timm's instead of the jitter, such as rand-m9-mstd0.5-inc1 (RandAugment); none where
            null.
        erase_prob: Probability that noise takes the place of a rectangle of an image (random erasing).
        mixup: alpha of Mixup, by which pairs of images are averaged; 0 for none.
        cutmix: alpha of CutMix, by which an image gets a rectangle of another one; 0 for none.
        mix_prob: Probability that a batch is mixed, where mixup or cutmix is on.
        label_smoothing: Share of a label that is spread over all classes.
    """

    crop_min: float = 0.35
    flip_prob: float = 0.5
    color_jitter: float = 0.3
    auto_augment: str | None = None
    erase_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= 1:
            raise InputError(f'augment.crop_min is {self.crop_min}; give a fraction of the area in (0, 1]')
        for name in ('flip_prob', 'erase_prob', 'mix_prob'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'augment.{name} is {getattr(self, name)}; give a probability between 0 and 1')
        for name in ('color_jitter', 'mixup', 'cutmix'):
            at_least(f'augment.{name}', getattr(self, name), 0)
        check_fraction('augment.label_smoothing', self.label_smoothing)
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)

    @property
    def mixes(self) -> bool:
        """True if images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def _check_policy(policy: str) -> None:
    try:
        create_transform((3, 8, 8), is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, KeyError, LookupError) as error:
        raise InputError(
            f'augment.auto_augment {policy!r} is no policy of timm; give one such as rand-m9-mstd0.5-inc1, or null'
        ) from error


class TimmTransform:
    """timm's training transform of one image, whose draws follow from torch's global generator."""

    def __init__(self, data: DataConfig, config: AugmentConfig) -> None:
        self._transform = create_transform(
            (data.channels, data.size, data.size),
            is_training=True,
            use_prefetcher=True,  # which leaves normalisation, and erasing, to the device
            scale=(config.crop_min, 1.0),
            hflip=config.flip_prob,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation='bilinear',
            mean=data.mean,
        )

    def __call__(self, image: Any) -> torch.Tensor:
        """PIL image -> uint8 tensor [C, size, size]."""
        with drawing_all(int(torch.randint(2**31, ()))):
            return torch.as_tensor(self._transform(image))


class BatchAugmentation:
    """Random erasing and mixing of the images of a batch, and their labels as shares of the classes.

    Args:
        config: What is done, and how much of it.
        num_classes: Classes C.
        device: Device of the batches.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, device: torch.device) -> None:
        self._classes, self._smoothing = num_classes, config.label_smoothing
        self._erase: Callable[[torch.Tensor], torch.Tensor] | None = None
        if config.erase_prob:
            self._erase = RandomErasing(config.erase_prob, mode='pixel', device=device.type)
        self._mix: Mixup | None = None
        if config.mixes:
            self._mix = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images [B, C, H, W] and classes [B] -> images and shares [B, classes].

        What is drawn on the CPU follows from `numbers`.
        """
        with drawing_all(*numbers):
            if self._erase is not None:
                images = self._erase(images)
            if self._mix is not None:
                return self._mix(images, labels)
        return images, mixup_target(labels, self._classes, smoothing=self._smoothing)
