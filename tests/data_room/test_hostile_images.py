"""Images that would take all memory, wait for ever, turn white, or hide others."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.labels import UNREADABLE
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.images import CentreFirst, read_image
from tests.data_room.files import some_images, write_classes

IMAGES, LABELS = some_images('train', 24)


def config(root: Path, **values) -> DataConfig:
    return DataConfig(**{'name': 'folder', 'root': str(root), 'batch_size': 8, 'num_workers': 0, **values})


def bomb(path: Path) -> None:
    """A PNG of a few kilobytes that says it has 400 million pixels."""
    Image.new('1', (20_000, 20_000)).save(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> tuple[Path, set[str]]:
    """24 images that can be read, and four that cannot."""
    root = write_classes(tmp_path_factory.mktemp('hostile'), IMAGES, LABELS)
    bad = [root / f'class{LABELS[0]}' / name for name in ('0-bomb.png', '0-cut.png', '0-pipe.png', '0-float.tif')]
    bomb(bad[0])
    whole = next(root.rglob('0000.png')).read_bytes()
    bad[1].write_bytes(whole[: len(whole) // 2])
    os.mkfifo(bad[2])
    Image.fromarray(np.linspace(0, 5, 784, dtype=np.float32).reshape(28, 28)).save(bad[3])
    return root, set(map(str, bad))


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_leaves_them_out_and_names_them(folder, workers, caplog):
    root, bad = folder
    loader = eval_loader(config(root, num_workers=workers), 'train', None, 0)
    with caplog.at_level(logging.WARNING, 'slimclr_hub'):
        for _ in range(2):
            batches = list(loader)
    assert set(loader.corrupt.reasons) == bad
    messages = [record.getMessage() for record in caplog.records if record.name.startswith('slimclr_hub')]
    assert len(messages) == 4
    assert all(message.startswith('left out an image that cannot be read: ') for message in messages)
    # Batches keep their size, since several processes share one.
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 4]
    labels = torch.cat([labels for _, labels in batches])
    assert (labels == UNREADABLE).sum() == 4
    images = torch.cat([images for images, _ in batches])
    assert not images[labels == UNREADABLE].any()
    readable = list(loader.readable())
    assert sum(len(labels) for _, labels in readable) == 24
    assert torch.cat([images for images, _ in readable]).equal(images[labels != UNREADABLE])
    with pytest.raises(DataError, match=r'[45] images cannot be read|4 images cannot be read'):
        list(eval_loader(config(root, num_workers=workers, max_corrupt=3), 'train', None, 0))


def test_training_replaces_them(folder):
    root, bad = folder
    data = TrainData(config(root), ViewConfig(size=8), seed=0)
    for epoch in range(2):
        assert [len(batch.labels) for batch in data.epoch(epoch)] == [8] * 3
    assert set(data.corrupt.reasons) <= bad
    reasons = ' '.join(data.corrupt.reasons.values())
    assert 'not a file' in reasons
    assert 'decompression bomb' in reasons


def test_source_of_which_none_can_be_read(tmp_path):
    for name in 'a', 'b':
        (tmp_path / f'{name}.png').write_bytes(b'')
    with pytest.raises(InputError, match=r'the first 2 images cannot be read, as .*a\.png \(not an image'):
        TrainData(config(tmp_path, batch_size=2), ViewConfig(size=8), seed=0)


# Depth


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_16_bits_are_scaled(tmp_path, ending, mode):
    """Clipped, all but the darkest 0.4 % would be white."""
    ramp = np.linspace(0, 65_535, 784).astype(np.uint16).reshape(28, 28)
    Image.fromarray(ramp).save(tmp_path / f'ramp.{ending}')
    image = np.asarray(read_image(tmp_path / f'ramp.{ending}', mode))
    expected = (ramp >> 8).astype(np.uint8)
    assert np.array_equal(image if mode == 'L' else image[..., 1], expected)


def test_depth_without_a_range_is_refused(tmp_path):
    for pixels in np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70_000, np.int32):
        Image.fromarray(pixels).save(tmp_path / 'image.tif')
        with pytest.raises(ValueError, match='32 bits have no range that is known; convert them'):
            read_image(tmp_path / 'image.tif', 'L')


# Aspect


def test_long_image_is_cropped_before_it_is_resized():
    sizes = []
    transform = CentreFirst(lambda image: sizes.append(image.size))
    for size in (20_000, 1), (3, 9_000), (80, 10), (81, 10), (28, 28):
        transform(Image.new('L', size))
    assert sizes == [(8, 1), (3, 24), (80, 10), (80, 10), (28, 28)]


def test_long_image_shows_its_centre(tmp_path):
    """As resizing the whole and cropping it would."""
    colours = np.zeros((10, 1000), np.uint8)
    colours[:, 495:505] = 255
    Image.fromarray(colours).save(tmp_path / 'long.png')
    ((images, _),) = eval_loader(config(tmp_path, size=16, mean=(0.0,), std=(1.0,)), 'train', None, 0)
    assert images.mean() > 0.95  # at its edges black shines through


# Sizes


@pytest.mark.parametrize('size', [5000, 1_000_000])
def test_sizes_have_a_bound(size):
    with pytest.raises(InputError, match=rf'data\.size is {size}; give 4096 or less'):
        DataConfig(size=size)
    with pytest.raises(InputError, match=rf'views\.size is {size}; give 4096 or less'):
        ViewConfig(size=size)


# Programs


@pytest.mark.parametrize('name', ['photo.jpg', 'photo.eps'])
def test_postscript_is_not_run(tmp_path, monkeypatch, name):
    """Pillow would hand it to Ghostscript, whatever the ending, and wait for its end."""
    ghostscript = tmp_path / 'gs'
    ghostscript.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    (tmp_path / name).write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n')
    with pytest.raises(OSError, match='PostScript, which is a program and is not run'):
        read_image(tmp_path / name, 'RGB')
    assert not (tmp_path / 'ran').exists()
