"""Synthetic photos: JPEG files that are as expensive to read and decode as those of ImageNet."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
_QUALITY = 90
_FINEST = 9  # standard deviation of the noise of single pixels, which determines the size of a file


def make_photos(folder: Path, count: int) -> float:
    """Write `count` photos of one class into the split `train` of an image folder.

    They are noise at every scale, stronger at larger scales, roughly like natural images.

    Returns:
        Mean size of a file in kB, between 50 and 100 as in ImageNet.
    """
    rng = np.random.default_rng(0)
    photos = folder / 'train' / 'photos'
    photos.mkdir(parents=True)
    for number in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for cells in 3, 6, 12, 24, 48, 96:
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
            pixels += (smooth - 128) * min(1.0, 4 / cells)
        pixels += rng.normal(0, _FINEST, pixels.shape)
        file = photos / f'{number:06d}.jpg'
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=_QUALITY)
    return sum(file.stat().st_size for file in photos.iterdir()) / count / 1000
