"""Augmentation of batches on the device: the steps of `make_view` after the crop.

Parameters are drawn for every sample on the CPU, so that they are the same on every device, and copied asynchronously.
`torch.where` over the whole batch keeps samples that an operation skips, as indexing them would synchronise. Operations
are those of torchvision on 8-bit images, without the rounding between them.

Shapes: b samples, C channels (1 or 3), H x W pixels; images are float [b, C, H, W] in [0, 1].
"""

from dataclasses import dataclass, fields, replace
from math import pi

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_hue
from kornia.filters import gaussian_blur2d
from kornia.geometry import hflip

from slimclr_hub.data.seeding import mixed_seed
from slimclr_hub.data.views import BLUR_SIGMA, ViewConfig, blur_kernel

BRIGHTNESS, CONTRAST, SATURATION = range(3)
"""Kinds of blending: with black, with the mean gray of the image, with the gray of each pixel."""


@dataclass(frozen=True)
class Parameters:
    """Random parameters of each sample, [b], or [b, 3] for the three kinds of blending.

    A kind blends with the weight `factors` of the image, 1 leaving it, in the order `kinds`; `hue_place` of them, 0 to
    3, come before the shift of the hue by `hue` turns. `sigma`, in pixels, stays on the CPU, where kornia checks it
    without synchronising.
    """

    factors: torch.Tensor
    kinds: torch.Tensor
    hue: torch.Tensor
    hue_place: torch.Tensor
    gray: torch.Tensor
    blur: torch.Tensor
    sigma: torch.Tensor
    solarize: torch.Tensor
    flip: torch.Tensor

    def to(self, device: torch.device) -> 'Parameters':
        """Copy to a device asynchronously."""
        if device.type == 'cpu':
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != 'sigma'}
        if device.type == 'cuda':
            values = {name: value.pin_memory() for name, value in values.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in values.items()})


def draw(config: ViewConfig, count: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of `count` samples from a CPU generator."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def happens(probability: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) < probability

    jitter = happens(config.jitter_prob)
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = torch.stack([uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths], 1)
    return Parameters(
        factors=torch.where(jitter[:, None], factors, 1.0),
        kinds=torch.rand(count, 3, generator=generator).argsort(1),
        hue=torch.where(jitter, uniform(-config.hue, config.hue), 0.0),
        # With any of the orders of three, four places of the fourth make each order of four equally likely.
        hue_place=torch.randint(4, (count,), generator=generator),
        gray=happens(config.gray_prob),
        blur=happens(config.blur_prob),
        sigma=uniform(*BLUR_SIGMA),
        solarize=happens(config.solarize_prob),
        flip=happens(config.flip_prob),
    )


def make_views(crops: torch.Tensor, config: ViewConfig, *numbers: int) -> torch.Tensor:
    """uint8 crops [b, C, H, W] -> float views in [0, 1], on their device; draws follow from the integers alone."""
    generator = torch.Generator().manual_seed(mixed_seed(*numbers))
    return augment(crops / 255, config, draw(config, len(crops), generator).to(crops.device))


def augment(images: torch.Tensor, config: ViewConfig, parameters: Parameters) -> torch.Tensor:
    """Apply the parameters in the order of `make_view`, without operations that the distribution never uses."""
    colour = images.shape[1] == 3
    if config.jitter_prob:
        images = _jitter(images, config, parameters)
    if config.gray_prob and colour:
        images = _where(parameters.gray, rgb_to_grayscale(images).expand_as(images), images)
    if config.blur_prob:
        images = _where(parameters.blur, blur(images, parameters.sigma), images)
    if config.solarize_prob:
        images = _where(parameters.solarize, solarize(images), images)
    if config.flip_prob:
        images = _where(parameters.flip, hflip(images), images)
    return images


def blend(images: torch.Tensor, factors: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Jitter the brightness, contrast or saturation of each sample; `factors` and `kinds` are [b]."""
    gray = rgb_to_grayscale(images) if images.shape[1] == 3 else images
    others = _where(kinds == CONTRAST, gray.mean((2, 3), keepdim=True), _where(kinds == SATURATION, gray, 0.0))
    return torch.lerp(others, images, factors[:, None, None, None]).clamp(0, 1)


def shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue of each sample by a fraction [b] of the circle."""
    return adjust_hue(images, 2 * pi * turns)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each sample by its own sigma [b] in pixels, a CPU tensor."""
    kernel = blur_kernel(images.shape[-1])
    return gaussian_blur2d(images, (kernel, kernel), sigma[:, None].expand(-1, 2), border_type='reflect')


def solarize(images: torch.Tensor) -> torch.Tensor:
    """Invert the upper half of the range."""
    return torch.where(images >= 0.5, 1 - images, images)


def _jitter(images: torch.Tensor, config: ViewConfig, parameters: Parameters) -> torch.Tensor:
    # Shifting the hue costs by far the most. So it is done once, between all blending that a sample has before it and
    # all that it has after it, rather than at each of four places.
    shifts = config.hue > 0 and images.shape[1] == 3
    for before in (True, False) if shifts else (False,):
        for slot in range(3):
            kinds = parameters.kinds[:, slot]
            factors = parameters.factors.gather(1, kinds[:, None])[:, 0]
            if shifts:
                factors = torch.where((slot < parameters.hue_place) == before, factors, 1.0)
            images = blend(images, factors, kinds)
        if before:
            images = _where(parameters.hue != 0, shift_hue(images, parameters.hue), images)
    return images


def _where(chosen: torch.Tensor, one: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    return torch.where(chosen[:, None, None, None], one, other)
