"""Columns of a Hub data set: which one holds the images, which one the labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from slimclr_hub.data.config import DataConfig
from slimclr_hub.errors import InputError
from slimclr_hub.images import reason


def find_columns(
    columns: Sequence[str], features: Mapping[str, Any], config: DataConfig, where: str
) -> tuple[str, str | None]:
    """Names of the column of images, and of that of labels if there is one.

    Where the configuration names none, it is the only one of its type, or the one called `image` or `label`.

    Args:
        columns: All columns.
        features: Their types as `datasets` has them, as far as they are known.
        config: Names the columns, or not.
        where: Beginning of error messages.

    Raises:
        InputError: There is no such column, or the images could be in several.
    """
    import datasets

    listed = ', '.join(columns)
    for key, column in ('image_key', config.image_key), ('label_key', config.label_key):
        if column is not None and column not in columns:
            raise InputError(f'{where}: no column {column}, data.{key}; there are {listed}')
    possible = [name for name in columns if name not in features or _may_be_images(features[name])]
    of_images = [name for name in columns if isinstance(features.get(name), datasets.Image)]
    image = config.image_key or _only(of_images, 'image') or _only(possible, 'image')
    if image is None:
        raise InputError(f'{where}: no column is plainly that of the images; give --data.image_key, one of {listed}')
    if image not in possible:
        raise InputError(f'{where}: the column {image} holds no images; give --data.image_key, one of {listed}')
    classes = [name for name in columns if isinstance(features.get(name), datasets.ClassLabel)]
    others = [name for name in columns if name != image]
    label = config.label_key or ('label' if 'label' in others else _only(classes, 'label'))
    return image, label


def is_text(feature: Any) -> bool:
    """True for the type of a column of texts."""
    return getattr(feature, 'dtype', None) in ('string', 'large_string')


def outside_error(where: str, error: Exception) -> InputError:
    """The error of a data set that cannot be opened, on one line with its cause."""
    causes = [error, error.__cause__] if error.__cause__ is not None else [error]
    return InputError(f'{where}: {"; ".join(reason(each) for each in causes if isinstance(each, Exception))}'[:600])


def _may_be_images(feature: Any) -> bool:
    """True for images, encoded ones, and their paths."""
    import datasets

    stored = isinstance(feature, Mapping) and not {'bytes', 'path'}.isdisjoint(feature)
    return stored or isinstance(feature, datasets.Image) or is_text(feature) or _is_binary(feature)


def _is_binary(feature: Any) -> bool:
    return getattr(feature, 'dtype', None) in ('binary', 'large_binary')


def _only(names: Sequence[str], preferred: str) -> str | None:
    if preferred in names:
        return preferred
    return names[0] if len(names) == 1 else None
