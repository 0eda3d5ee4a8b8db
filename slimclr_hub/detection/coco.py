"""Files of COCO 2017, and what has to be in files of its format."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError, shorten

FILES = (
    'annotations/instances_train2017.json',
    'annotations/instances_val2017.json',
    'train2017',
    'val2017',
)
"""Files of training and evaluation in the folder of COCO."""

_LISTS = {'image': 'images', 'category': 'categories'}


def coco_root() -> Path:
    """Folder of COCO as the configs read it: the environment variable `COCO_ROOT`, or `data/coco`."""
    return Path(os.environ.get('COCO_ROOT') or 'data/coco')


@contextmanager
def in_format(annotations: Path | str) -> Iterator[None]:
    """Turn what reading a malformed file of annotations raises into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = f'{type(error).__name__} {error}'.strip()
        raise InputError(f"{annotations} is not in COCO's format: {reason}") from error


def check_files(root: Path, names: Iterable[str], remedy: str) -> None:
    """Raise an InputError if any of `names` is missing in `root`; the message lists them and ends with `remedy`."""
    if missing := [name for name in names if not (root / name).exists()]:
        raise InputError(f'no {" and no ".join(missing)} in {root}; {remedy}')


def check_classes(annotations: str, names: Sequence[str], classes: Sequence[str], some: bool) -> None:
    """Raise an InputError unless `classes` are the `names` in annotations, or with `some` a part, in their order."""
    problems = []
    if unknown := [name for name in classes if name not in names]:
        problems.append(f'metainfo names {shorten(unknown)}, which it has not')
    left_out = [name for name in names if name not in classes]
    if left_out and not some:
        problems.append(f'metainfo leaves out {shorten(left_out)}; some_classes=True would make these background')
    if not problems and list(classes) != [name for name in names if name in classes]:
        problems.append(f'metainfo names them in another order, {shorten(classes)}, which would swap labels')
    if problems:
        raise InputError(f'{annotations} has the classes {shorten(names)} in this order: {"; ".join(problems)}')


def class_names(root: str | Path) -> tuple[str, ...]:
    """Names of the classes in `annotations/train.json` of a folder, in COCO's format, in their order, that of labels.

    Raises:
        InputError: The file is missing, is not in COCO's format, or names no class or one twice.
    """
    annotations = 'annotations/train.json'
    path = Path(root) / annotations
    check_files(Path(root), (annotations,), 'COCO_ROOT (environment) is the folder of your images and annotations')
    with in_format(path):
        names = tuple(category['name'] for category in json.loads(path.read_bytes())['categories'])
    if not names or len({*names}) != len(names):
        raise InputError(f'{path} names {f"a class twice: {shorten(names)}" if names else "no class"}')
    return names


def check_annotations(annotations: str, content: dict[str, Any], images: Path, masks: bool) -> None:
    """Raise an InputError for what would be left out without a word, or end a run in its middle.

    That is an image or annotation without a key that training or evaluation reads, an annotation of an image or
    category that the file lacks, and an image that is not in its folder.
    """
    for image in content['images']:
        _check_keys(f'{annotations}: image', image, ('id', 'file_name', 'height', 'width'))
    keys = ('image_id', 'category_id', 'bbox', 'area', 'iscrowd', *(['segmentation'] if masks else []))
    known = {f'{kind}_id': {entry['id'] for entry in content[plural]} for kind, plural in _LISTS.items()}
    for annotation in content.get('annotations', []):
        name = _check_keys(f'{annotations}: annotation', annotation, keys)
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise InputError(f'{name} has the {key} {annotation[key]}, which is not among those of the file')
    there = {*os.listdir(images)}
    names = [image['file_name'] for image in content['images']]
    if lost := [name for name in names if name not in there and not (images / name).is_file()]:
        raise InputError(f'{annotations}: {len(lost)} of {len(names)} images are not in {images}: {shorten(lost)}')


def _check_keys(kind: str, entry: dict[str, Any], keys: Sequence[str]) -> str:
    """Name of an entry of a `kind`, for messages; an InputError if it lacks one of `keys`."""
    name = f'{kind} {entry.get("id")}'
    if lacking := [key for key in keys if entry.get(key) in (None, [])]:
        raise InputError(f'{name} has no {", ".join(lacking)}; each needs {", ".join(keys)}')
    return name
