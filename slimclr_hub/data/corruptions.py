"""Common corruptions of images at five severities, after Hendrycks & Dietterich 2019, made on the fly.

Kinds and strengths follow ImageNet-C (https://arxiv.org/abs/1903.12261), whose images are 224 pixels wide; what has a
length in pixels is scaled with the image. The draws are our own, so accuracies do not compare with those published on
its files. An image of severity 0 is the image.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from slimclr_hub.data.seeding import mixed_seed
from slimclr_hub.settings import one_of

SEVERITIES = (1, 2, 3, 4, 5)
_WIDTH = 224  # pixels of the images that the strengths are for
_ROUGHNESS = 1.0  # exponent by which fog loses amplitude with frequency

Pixels = np.ndarray
"""Values in [0, 1], float64 [H, W, C]."""


def _gaussian_noise(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(0, strength, x.shape)


def _shot_noise(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    return rng.poisson(x * strength) / strength


def _impulse_noise(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    changed, white = rng.random((2, *x.shape))
    return np.where(changed < strength, (white < 0.5).astype(x.dtype), x)


def _gaussian_blur(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    blurred = _image(x).filter(ImageFilter.GaussianBlur(strength * min(x.shape[:2]) / _WIDTH))
    return _pixels(blurred)


def _contrast(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * strength + mean


def _brightness(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    return x + strength


def _fog(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    fog = _clouds(x.shape[0], x.shape[1], rng)[..., None]
    brightest = x.max()
    return (x + strength * fog) * brightest / (brightest + strength)


def _jpeg(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    file = BytesIO()
    _image(x).save(file, 'JPEG', quality=int(strength))
    with Image.open(file) as image:
        image.load()
        return _pixels(image)


def _pixelate(x: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    height, width = x.shape[:2]
    few = (max(1, round(width * strength)), max(1, round(height * strength)))
    image = _image(x).resize(few, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)
    return _pixels(image)


def _clouds(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Random clouds in [0, 1], [H, W], whose amplitudes fall with frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(2, *frequency.shape)) / frequency ** (1 + _ROUGHNESS)
    clouds = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
    clouds -= clouds.min()
    return clouds / max(clouds.max(), np.finfo(float).tiny)


_Corrupt = Callable[[Pixels, float, np.random.Generator], Pixels]

CORRUPTIONS: Mapping[str, tuple[_Corrupt, tuple[float, ...]]] = {
    'gaussian_noise': (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    'shot_noise': (_shot_noise, (60, 25, 12, 5, 3)),
    'impulse_noise': (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    'gaussian_blur': (_gaussian_blur, (1, 2, 3, 4, 6)),
    'contrast': (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    'brightness': (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    'fog': (_fog, (1.5, 2, 2.5, 3, 3.5)),
    'jpeg': (_jpeg, (25, 18, 15, 10, 7)),
    'pixelate': (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""Name -> what it does to pixels, and its strength at each severity."""


@dataclass(frozen=True)
class Corruption:
    """A corruption at a severity; what it draws follows from the seed and the image alone.

    Args:
        name: One of `CORRUPTIONS`.
        severity: 0 for none, to 5.
        seed: Seed.

    Raises:
        InputError: There is no such corruption or severity.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        one_of('corruption', self.name, CORRUPTIONS)
        one_of('severity', self.severity, (0, *SEVERITIES))

    def __call__(self, image: Image.Image) -> Image.Image:
        """A PIL image of mode L or RGB -> one of the same size and mode."""
        if not self.severity:
            return image
        corrupt, strengths = CORRUPTIONS[self.name]
        # By all severities alike, so that they differ in strength alone.
        rng = np.random.default_rng(mixed_seed(self.seed, zlib.crc32(image.tobytes())))
        return _image(corrupt(_pixels(image), strengths[self.severity - 1], rng)).convert(image.mode)


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image, dtype=np.float64) / 255
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _image(x: Pixels) -> Image.Image:
    pixels = np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
