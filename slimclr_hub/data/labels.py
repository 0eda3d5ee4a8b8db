"""Classes of images, by whatever a source has in the place of a label."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.text import natural_key

UNLABELLED = -1
"""Label of an image without a class, or with several."""
UNREADABLE = -2
"""Label of an image of an evaluation that cannot be read."""

_MOST_NAMES = 2**16  # with more, texts are captions or keys
_MOST = 2**63  # labels are int64


def class_number(label: Any, numbers: Mapping[str, int] | None = None) -> int:
    """Number of the class that a label stands for; `UNLABELLED` if it is none, several or a measurement.

    Args:
        label: A number or a text, which may be encoded, as a scalar of any library.
        numbers: Class -> its number, where labels are texts; else a text is to hold a number.
    """
    if getattr(label, 'shape', None) == ():
        label = label.item()
    text = as_text(label)
    if text is not None:
        if numbers is not None:
            return numbers.get(text, UNLABELLED)
        label = int(text) if text.isdecimal() and len(text) < 20 else None
    if isinstance(label, float) and isfinite(label) and label.is_integer():
        label = int(label)
    return int(label) if isinstance(label, int) and 0 <= label < _MOST else UNLABELLED


def numbered(classes: Iterable[str]) -> dict[str, int]:
    """Number classes in the natural order of their names."""
    return {name: number for number, name in enumerate(sorted(set(classes), key=natural_key))}


def number_texts(train: Iterable[Any], others: Iterable[Any] | None, where: str) -> dict[str, int]:
    """Number the classes of labels that are texts; none where there are more than classes are.

    Args:
        train: Labels of the training images.
        others: Labels of another split, if it is to be checked.
        where: Beginning of the error message.

    Raises:
        InputError: The other split has a class that the training images do not have.
    """
    numbers = numbered(_texts(train))
    if len(numbers) > _MOST_NAMES:
        return {}
    if numbers and others is not None:
        check_known(_texts(others), numbers, where)
    return numbers


def check_known(classes: Iterable[str], numbers: Mapping[str, int], where: str) -> None:
    """Raise an InputError if a split has classes that the training images do not have."""
    if unknown := sorted(set(classes) - numbers.keys(), key=natural_key):
        raise InputError(f'{where}: the training images have no class {shorten(unknown)}; name the classes as there')


def class_names(numbers: Mapping[str, int] | None) -> list[str] | None:
    """Names of the classes by their number, if they have any."""
    return sorted(numbers, key=numbers.__getitem__) if numbers else None


def _texts(labels: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for label in labels:
        text = as_text(label)
        if text is not None:
            found.add(text)
        if len(found) > _MOST_NAMES:
            break
    return found


def as_text(label: Any) -> str | None:
    """A label that is a text, encoded or not, without spaces around it; None if it is something else."""
    if isinstance(label, bytes):
        label = label.decode('utf-8', 'replace')
    return label.strip() if isinstance(label, str) else None
