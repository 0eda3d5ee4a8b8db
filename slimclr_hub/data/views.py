"""Augmented views of one image, computed by the workers on 8-bit images, and their normalisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from slimclr_hub.errors import InputError
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.settings import at_least, at_most, one_of

BACKENDS = ('cpu', 'kornia')
BLUR_SIGMA = (0.1, 2.0)
_ALWAYS = (v2.RandomResizedCrop, v2.GaussianBlur)
_SOMETIMES = (v2.RandomGrayscale, v2.RandomSolarize, v2.RandomHorizontalFlip)
_Step = Callable[[Any], Any]


@dataclass(frozen=True)
class ViewConfig:
    """One distribution of augmentations; the defaults are those of MoCo v2 (Chen et al. 2020).

    Args:
        size: Height and width of a view in pixels; data.size where null. A view smaller than the images that are
            evaluated is faster, and compensates for random crops that show objects larger (Touvron et al. 2019).
        crop_min: Smallest fraction of the image's area that a random crop takes.
        brightness: Strength of the brightness jitter.
        contrast: Strength of the contrast jitter.
        saturation: Strength of the saturation jitter.
        hue: Strength of the hue jitter, at most 0.5.
        jitter_prob: Probability of any jitter.
        gray_prob: Probability of conversion to gray.
        blur_prob: Probability of Gaussian blur, with sigma from 0.1 to 2 pixels.
        flip_prob: Probability of a horizontal flip.
        solarize_prob: Probability of inverting the upper half of the range; BYOL and MoCo v3 do so to their second
            view, with 0.2.
        backend: `cpu` computes training views in the workers; `kornia` lets workers only decode and crop, and augments
            whole batches on the device. The backend of the first view holds for both.
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
        if self.size is not None:
            at_least('views.size', self.size, 2)
            at_most('views.size', self.size, MAX_IMAGE_SIZE)
        for name in ('jitter_prob', 'gray_prob', 'blur_prob', 'flip_prob', 'solarize_prob'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'views.{name} is {getattr(self, name)}; give a probability between 0 and 1')
        for name in ('brightness', 'contrast', 'saturation'):
            at_least(f'views.{name}', getattr(self, name), 0)
        if not 0 <= self.hue <= 0.5:
            raise InputError(f'views.hue is {self.hue}; give 0 to 0.5')
        if not 0 < self.crop_min <= 1:
            raise InputError(f'views.crop_min is {self.crop_min}; give a fraction of the area in (0, 1]')
        one_of('views.backend', self.backend, BACKENDS)


def make_crop(config: ViewConfig, size: int) -> v2.Compose:
    """Crop and resize: PIL image -> uint8 tensor [C, size, size], for augmentation on the device."""
    return v2.Compose([_crop(config, size), v2.PILToTensor()])


def make_view(config: ViewConfig, size: int, channels: int) -> v2.Compose:
    """Crop and augment: PIL image -> uint8 tensor [C, size, size]."""
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


def blur_kernel(size: int) -> int:
    """Kernel size of the blur: a tenth of the view, as in SimCLR; odd, as torchvision and kornia require."""
    return max(size // 10, 2) // 2 * 2 + 1


def _crop(config: ViewConfig, size: int) -> v2.Transform:
    return v2.RandomResizedCrop(size, scale=(config.crop_min, 1.0))


class Normalize:
    """Scale uint8 images to [0, 1], then subtract the mean and divide by the standard deviation.

    Operations and their order are those of torchvision's `ToDtype(scale=True)` and `Normalize`, so results are equal
    bit for bit. torchvision's would copy mean and std to the device for each batch, and synchronise.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 [b, C, H, W] -> float32 [b, C, H, W]."""
        return v2.functional.to_dtype(views, torch.float32, scale=True).sub_(self.mean).div_(self.std)


class Views:
    """Several views of an image, each drawn after the one before it."""

    def __init__(self, *transforms: Callable[[Any], torch.Tensor]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> tuple[torch.Tensor, ...]:
        """PIL image -> a tensor [C, size, size] for each transform."""
        return tuple(transform(image) for transform in self.transforms)


class SingleImageTransform:
    """Apply v2 transforms to one PIL image without torchvision's search for images in nested inputs.

    For small images that search takes longer than the transforms. Results and random draws are torchvision's. Unknown
    transforms are called as usual.
    """

    def __init__(self, view: v2.Compose) -> None:
        self.steps = [_step(transform) for transform in view.transforms]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """PIL image -> the tensor that `view` returns."""
        result: Any = image
        for step in self.steps:
            result = step(result)
        return result


def _step(transform: Any) -> _Step:
    if isinstance(transform, v2.RandomApply):
        return partial(_sometimes, transform.p, [_step(each) for each in transform.transforms])
    if isinstance(transform, _SOMETIMES):
        return partial(_sometimes, transform.p, [partial(_always, transform)])
    if isinstance(transform, v2.ColorJitter):
        return partial(_jitter, transform)
    if isinstance(transform, v2.PILToTensor):
        return _to_tensor
    return partial(_always, transform) if isinstance(transform, _ALWAYS) else transform


def _always(transform: v2.Transform, image: Image.Image) -> Image.Image:
    return transform.transform(image, transform.make_params([image]))


def _sometimes(probability: float, steps: Sequence[_Step], image: Image.Image) -> Image.Image:
    # Compared as a tensor, hence in float32, as torchvision does: as numbers, 0.7 would lie beyond float32's nearest.
    if torch.rand(1) >= probability:
        return image
    for step in steps:
        image = step(image)
    return image


def _jitter(transform: v2.ColorJitter, image: Image.Image) -> Image.Image:
    params = transform.make_params([image])
    # The order as numbers: torchvision compares each with up to four others, and would do so with tensors.
    return transform.transform(image, {**params, 'fn_idx': params['fn_idx'].tolist()})


def _to_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
