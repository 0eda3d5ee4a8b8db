"""Write a small data set of real images in COCO's format without a download: the 24 coins of scikit-image.

    python -m slimclr_hub.detection.coins data/coins

The picture (`skimage.data.coins`, 303x384, from the Brooklyn Museum, no known copyright restrictions) shows four rows
of six coins under uneven light. Crops of the lower two rows are for training, crops of the upper two for validation, so
no coin is in both. The set shows within minutes that fine-tuning works; the quality of a detector takes COCO.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimclr_hub.errors import InputError
from slimclr_hub.files import temporary_folder, write_text

# Left, top, right, bottom. Row 150 has no coin. The sides of training crops leave at least half of each coin that they
# cut, so that no coin shows without an annotation; those of validation crops cut none.
WINDOWS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    'train': (
        (0, 150, 176, 303),
        (13, 154, 189, 296),
        (20, 150, 180, 300),
        (16, 152, 216, 303),
        (40, 150, 216, 295),
        (84, 150, 276, 303),
        (100, 155, 304, 299),
        (96, 150, 275, 297),
        (140, 150, 304, 303),
        (152, 153, 312, 298),
        (202, 150, 378, 303),
        (208, 155, 384, 303),
    ),
    'val': ((0, 0, 182, 150), (182, 0, 384, 150)),
}


def coin_masks(grey: np.ndarray) -> np.ndarray:
    """Segment the coins: one mask each, bool [24, H, W], from the picture [H, W], without holes or overlap.

    A threshold fails, since the background at the upper left is as bright as the dark coins. A watershed of Sobel's
    gradient finds the edges, flooded from certain background and certain coin as in scikit-image's gallery. Holes are
    then filled, and specks and nicks smoothed away.
    """
    from skimage import filters, measure, morphology, segmentation

    certain = np.zeros(grey.shape, dtype=np.int32)
    certain[grey < 30] = 1
    certain[grey > 150] = 2
    inside = segmentation.watershed(filters.sobel(grey), certain) == 2
    for region in measure.regionprops(measure.label(inside)):
        inside[region.slice] |= region.image_filled
    smooth = morphology.opening(morphology.closing(inside, morphology.disk(3)), morphology.disk(7))
    labels = measure.label(smooth)
    return np.stack([labels == i for i in range(1, labels.max() + 1)])


def write_coins(folder: Path) -> None:
    """Write `train/*.png`, `val/*.png`, `annotations/train.json` and `annotations/val.json` atomically.

    The bytes are the same each time, several processes may write at once, and a folder with the same set is left alone.

    Raises:
        InputError: scikit-image or pycocotools is not installed, or the folder holds something else.
    """
    try:
        import pycocotools.mask  # noqa: F401
        from skimage import data
    except ModuleNotFoundError as error:
        lacking = 'scikit-image' if error.name == 'skimage' else error.name
        message = f'the coins need {lacking}, which is not installed: pip install "slimclr-hub[transfer]"'
        raise InputError(message) from error
    grey = data.coins()
    masks = coin_masks(grey)
    with temporary_folder(folder.parent) as partial:
        made = partial / 'coins'  # a temporary folder itself stays private to its owner, even after a move
        (made / 'annotations').mkdir(parents=True)
        for split in WINDOWS:
            _write_split(made, split, grey, masks)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():
                raise
            for path in sorted(made.rglob('*.*')):
                other = folder / path.relative_to(made)
                if not other.is_file() or not _same(path, other):
                    message = f'{folder} holds something else (see {other}): delete it or name another folder'
                    raise InputError(message) from None


def _write_split(folder: Path, split: str, grey: np.ndarray, masks: np.ndarray) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (left, top, right, bottom) in enumerate(WINDOWS[split], start=1):
        crop = grey[top:bottom, left:right]
        file_name = f'{number:02}.png'
        Image.fromarray(crop).convert('RGB').save(folder / split / file_name)
        images.append({'id': number, 'file_name': file_name, 'height': bottom - top, 'width': right - left})
        for mask in masks[:, top:bottom, left:right]:
            if mask.any():
                annotations.append({'id': len(annotations) + 1, 'image_id': number, **_annotation(mask)})
    content = {
        'info': {'description': f'Coins of scikit-image, {split}', 'url': 'https://scikit-image.org'},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 1, 'name': 'coin', 'supercategory': 'coin'}],
    }
    write_text(folder / 'annotations' / f'{split}.json', json.dumps(content, indent=1) + '\n')


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        'category_id': 1,
        'bbox': [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        'area': int(mask.sum()),
        'iscrowd': 0,
        'segmentation': {'size': [*mask.shape], 'counts': encoded['counts'].decode()},
    }


def _same(path: Path, other: Path) -> bool:
    if path.suffix != '.png':
        return path.read_bytes() == other.read_bytes()
    # Versions of the library compress differently.
    with Image.open(path) as image, Image.open(other) as there:
        return np.array_equal(np.asarray(image), np.asarray(there))


def _main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith('-'):
        raise SystemExit('usage: python -m slimclr_hub.detection.coins FOLDER')
    folder = Path(arguments[0])
    try:
        write_coins(folder)
    except (InputError, OSError) as error:
        raise SystemExit(f'Error: {error}') from None
    counts = []
    for split in WINDOWS:
        content = json.loads((folder / 'annotations' / f'{split}.json').read_text(encoding='utf-8'))
        counts.append(f'{split} {len(content["images"])} images, {len(content["annotations"])} instances')
    print(f'{folder}: {"; ".join(counts)}')


if __name__ == '__main__':
    _main(sys.argv[1:])
