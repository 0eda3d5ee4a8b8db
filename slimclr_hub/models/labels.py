"""Names of a network's classes."""

from collections.abc import Callable

from timm.data import CustomDatasetInfo, DatasetInfo, DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset
from torch import nn


def class_labels(model: nn.Module) -> Callable[[int], str] | None:
    """Return the function that names a class by its index in the head's output; None if no names are known.

    They are those of the network's configuration (`label_names`, with `label_descriptions`), else ImageNet's if their
    number fits.
    """
    config = getattr(model, 'pretrained_cfg', None) or {}
    names = config.get('label_names')
    subset = infer_imagenet_subset(model)
    info: DatasetInfo
    # A head that was put in later has other classes than the configuration names.
    if names and model.num_classes in (len(names), config.get('num_classes')):
        info = CustomDatasetInfo(names, config.get('label_descriptions'))
    elif subset is not None:
        info = ImageNetInfo(subset)
    else:
        return None
    return DatasetInfoLabelMapper(info, fallback_format='{index}')
