"""A sample of images as a network takes them."""

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.inference.images import ImageList, Sources, list_images
from slimclr_hub.inference.runner import InferenceConfig, run_images


def read_sample(model: nn.Module, images: Sources, *, at_least: int, at_most: int) -> torch.Tensor:
    """Read images [N, C, H, W] with a network's preprocessing, on the CPU.

    Args:
        model: A network with a preprocessing configuration.
        images: Files or folders, as for `embed`.
        at_least: The fewest images to accept.
        at_most: The most to read; of more, that many at equal distances.

    Raises:
        InputError: There are fewer images, or one cannot be read.
    """
    listed = list_images(images)
    if len(listed) < at_least:
        raise InputError(f'{len(listed)} of the {at_least} images that are needed at least are there; give more')
    step = max(1.0, len(listed) / at_most)
    chosen = [int(step * i) for i in range(min(len(listed), at_most))]
    listed = ImageList([listed.names[i] for i in chosen], [listed.items[i] for i in chosen])

    def keep(batch: torch.Tensor) -> tuple[torch.Tensor]:
        return (batch.float().cpu(),)

    return run_images(model, listed, keep, InferenceConfig(), 'reading').tensors[0]
