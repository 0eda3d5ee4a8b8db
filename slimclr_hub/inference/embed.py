"""Features of images, by a network at its active width."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.inference.images import Sources
from slimclr_hub.inference.inference import InferenceConfig, run_images
from slimclr_hub.inference.unreadable import Problem


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Args:
        names: Name of each image, as `list_images` names them.
        features: Pooled features, float32 [N, D], on the CPU.
        architecture: Name of the network in timm's registry.
        width: Width it ran at; None for a network that knows no width.
        skipped: Name of each image that was left out, and why.
    """

    names: list[str]
    features: torch.Tensor
    architecture: str
    width: float | None
    skipped: list[Problem]


def embed(
    model: nn.Module,
    images: Sources,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    precision: str = 'no',
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Embeddings:
    """Pooled features of images, by a network at its active width, on the device and in the dtype that it has.

    Images become grey or RGB as the network takes them, then go through timm's evaluation transform for it. Headers of
    all files are read before the first batch, so that a file that is no image does not stop a pass half-way.

    Args:
        model: A network from timm's factory, slimmable or not, with or without a head.
        images: The path of a file or folder, a PIL image, or several of these, such as `dataset['image']`; see
            `list_images`.
        batch_size: Images at a time.
        workers: Processes that decode images; one for each core, but no more than 8, unless given.
        precision: `no` for the network's own, or `fp16` or `bf16` for mixed precision.
        skip_unreadable: Leave out images that cannot be read, and list them on standard error at the end.
        progress: Show a bar with images per second and the time left.

    Raises:
        InputError: An argument does not fit, an image is not there or cannot be read, or the network does not pool.
    """
    config = InferenceConfig(batch_size, workers, precision, skip_unreadable, progress)
    network: Any = model
    if not hasattr(network, 'forward_head'):
        raise InputError(f'a {type(model).__name__} has no pooled features; create the network without features_only')

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor]:
        features = network.forward_head(network.forward_features(batch), pre_logits=True)
        if features.ndim != 2:
            raise InputError(
                f'the network does not pool, its features have shape {list(features.shape)}; create it with '
                "global_pool='avg'"
            )
        return (features.float(),)

    outputs = run_images(model, images, forward, config, 'embedding')
    (features,) = outputs.tensors
    architecture = network.pretrained_cfg.get('architecture', type(model).__name__)
    return Embeddings(outputs.names, features, architecture, getattr(network, 'width', None), outputs.skipped)
