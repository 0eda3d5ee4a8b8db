"""Names of a network's classes."""

from collections.abc import Callable

from timm.data import CustomDatasetInfo, DatasetInfo, DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset
from torch import nn


def class_info(model: nn.Module) -> DatasetInfo | None:
    """Names of the classes of a network's head, in the order of its output; None if they are not known.

    They are those of the network's configuration (`label_names`, with `label_descriptions`), else ImageNet's if their
    number fits.
    """
    config = getattr(model, 'pretrained_cfg', None) or {}
    names = config.get('label_names')
    subset = infer_imagenet_subset(model)
    # A head that was put in later has other classes than the configuration names.
    if names and model.num_classes in (len(names), config.get('num_classes')):
        return CustomDatasetInfo(names, config.get('label_descriptions'))
    return None if subset is None else ImageNetInfo(subset)


def class_labels(model: nn.Module) -> Callable[[int], str] | None:
    """Return the function that names a class by its index in the head's output; None if no names are known."""
    info = class_info(model)
    return None if info is None else DatasetInfoLabelMapper(info, fallback_format='{index}')
