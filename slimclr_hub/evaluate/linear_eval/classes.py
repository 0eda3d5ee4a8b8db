"""The classes of a data set: what they are called, and whether labels are among them."""

from typing import Any

import torch

from slimclr_hub.errors import InputError

GARMENTS = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)
"""Classes of Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747, table 1)."""


def class_names(name: str, dataset: Any) -> list[str] | None:
    """Names of the classes of a data set in their order, where it knows them.

    Args:
        name: As `data.name`.
        dataset: From `make_dataset`.
    """
    if name.startswith('fashion-mnist'):
        return list(GARMENTS)
    reader = getattr(dataset, 'reader', None)
    numbered = getattr(reader, 'class_to_idx', None)
    if isinstance(numbered, dict) and numbered and sorted(numbered.values()) == list(range(len(numbered))):
        return [str(label) for label in sorted(numbered, key=numbered.__getitem__)]
    classes = getattr(dataset, 'classes', None)
    return [str(label) for label in classes] if isinstance(classes, list | tuple) else None


def check_labels(labels: torch.Tensor, num_classes: int, split: str) -> None:
    """Find out whether all images have a label that the probe can learn.

    Raises:
        InputError: One has none, or one beyond the classes.
    """
    least, most = labels.min().item(), labels.max().item()
    if least < 0:
        raise InputError(f'split {split} has images without a label; a linear evaluation needs one for each')
    if most >= num_classes:
        raise InputError(
            f'split {split} has class {most}, and there are {num_classes}; give --probe.num_classes {most + 1} or more'
        )
