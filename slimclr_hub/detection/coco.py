"""Files of COCO 2017."""

import os
from collections.abc import Iterable
from pathlib import Path

from slimclr_hub.errors import InputError

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
