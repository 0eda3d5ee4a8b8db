"""Transforms of torchvision's v2 on one PIL image, without their search for images in nested inputs.

For small images that search takes longer than the transforms themselves.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

Step = Callable[[Any], Any]

_ALWAYS = (v2.RandomResizedCrop, v2.GaussianBlur)
_SOMETIMES = (v2.RandomGrayscale, v2.RandomSolarize, v2.RandomHorizontalFlip)


class Direct:
    """The same results and the same draws as of the transforms, which make both themselves.

    Args:
        view: Transforms of a PIL image that end with a tensor. Those that are not known here are called as usual.
    """

    def __init__(self, view: v2.Compose) -> None:
        self.steps = [_step(transform) for transform in view.transforms]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """PIL image -> what `view` makes of it."""
        result: Any = image
        for step in self.steps:
            result = step(result)
        return result


def _step(transform: Any) -> Step:
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


def _sometimes(probability: float, steps: Sequence[Step], image: Image.Image) -> Image.Image:
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
