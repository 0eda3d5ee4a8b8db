"""Files of COCO 2017."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from slimclr_hub.errors import InputError, shorten

FILES = (
    'annotations/instances_train2017.json',
    'annotations/instances_val2017.json',
    'train2017',
    'val2017',
)
"""Files of training and evaluation in the folder of COCO."""


def coco_root() -> Path:
    """Folder of COCO as the configs read it: the environment variable `COCO_ROOT`, or `data/coco`."""
    return Path(os.environ.get('COCO_ROOT') or 'data/coco')


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
