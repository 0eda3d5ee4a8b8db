"""Augmented views of an image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms import v2

from slimclr_hub.errors import InputError

BACKENDS = ('cpu', 'kornia')
BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class ViewConfig:
    """One distribution of augmentations; the defaults are those of MoCo v2 (Chen et al. 2020).

    Args:
        size: Height and width of a view in pixels; data.size where null. A view smaller than the images that are
            evaluated is faster, and offsets that random crops show objects larger (Touvron et al. 2019, FixRes).
        crop_min: Smallest share of the image's area that a random crop takes.
        brightness: Strength of the jitter of brightness.
        contrast: Strength of the jitter of contrast.
        saturation: Strength of the jitter of saturation.
        hue: Strength of the jitter of hue, at most 0.5.
        jitter_prob: Probability of any jitter.
        gray_prob: Probability of turning to gray.
        blur_prob: Probability of Gaussian blur, with sigma from 0.1 to 2 pixels.
        flip_prob: Probability of a horizontal flip.
        solarize_prob: Probability of inverting the upper half of the range; BYOL and MoCo v3 do so to their second
            view, with 0.2.
        backend: What computes the views of training: `cpu`, in the workers on 8-bit images, or `kornia`, where the
            workers only decode and crop, and the device does the rest for a batch at a time. That of the first view
            holds for both.
    """

    size: int | None = None
    crop_min: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    flip_prob: float = 0.5
    solarize_prob: float = 0.0
    backend: str = 'cpu'

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 2:
            raise InputError(f'views.size is {self.size}; give 2 or more')
        for name in ('jitter_prob', 'gray_prob', 'blur_prob', 'flip_prob', 'solarize_prob'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'views.{name} is {getattr(self, name)}; give a probability between 0 and 1')
        for name in ('brightness', 'contrast', 'saturation'):
            if getattr(self, name) < 0:
                raise InputError(f'views.{name} is {getattr(self, name)}; give 0 or more')
        if not 0 <= self.hue <= 0.5:
            raise InputError(f'views.hue is {self.hue}; give 0 to 0.5')
        if not 0 < self.crop_min <= 1:
            raise InputError(f'views.crop_min is {self.crop_min}; give a share of the area in (0, 1]')
        if self.backend not in BACKENDS:
            raise InputError(f'views.backend is {self.backend!r}; give {" or ".join(BACKENDS)}')


def make_crop(config: ViewConfig, size: int) -> v2.Compose:
    """PIL image -> uint8 tensor [C, size, size]: the part of `make_view` that has to come before batching."""
    return v2.Compose([_crop(config, size), v2.PILToTensor()])


def blur_kernel(size: int) -> int:
    """Pixels of the blur's kernel: a tenth of the view, as in SimCLR; odd, as both libraries ask."""
    return max(size // 10, 2) // 2 * 2 + 1


def make_view(config: ViewConfig, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Transform:
    """PIL image -> normalised float tensor [C, size, size], drawn from `config`."""
    pixels = make_pixels(config, size, len(mean))
    return v2.Compose([*pixels.transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def make_pixels(config: ViewConfig, size: int, channels: int) -> v2.Compose:
    """PIL image -> uint8 tensor [C, size, size]: `make_view` but for its normalisation."""
    steps: list[Any] = [_crop(config, size)]
    jitter = [config.brightness, config.contrast]
    if channels == 3:
        jitter += [config.saturation, config.hue]
    if config.jitter_prob and any(jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*jitter)], config.jitter_prob))
    if config.gray_prob and channels == 3:
        steps.append(v2.RandomGrayscale(config.gray_prob))
    if config.blur_prob:
        steps.append(v2.RandomApply([v2.GaussianBlur(blur_kernel(size), BLUR_SIGMA)], config.blur_prob))
    if config.solarize_prob:
        steps.append(v2.RandomSolarize(threshold=128, p=config.solarize_prob))
    if config.flip_prob:
        steps.append(v2.RandomHorizontalFlip(config.flip_prob))
    return v2.Compose([*steps, v2.PILToTensor()])


def _crop(config: ViewConfig, size: int) -> v2.Transform:
    return v2.RandomResizedCrop(size, scale=(config.crop_min, 1.0))


class Views:
    """Transform that gives several views of an image, each drawn after the one before it.

    Args:
        transforms: Transform of each view.
    """

    def __init__(self, *transforms: Callable[[Any], torch.Tensor]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> tuple[torch.Tensor, ...]:
        """PIL image -> a tensor [C, size, size] for each transform."""
        return tuple(transform(image) for transform in self.transforms)
