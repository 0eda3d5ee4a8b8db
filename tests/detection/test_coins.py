"""The coins: annotations are round and bright, no coin is in both splits, and files are written atomically."""

import json
import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from skimage import data, measure, morphology

from slimclr_hub.detection.coins import WINDOWS, coin_masks, write_coins
from slimclr_hub.errors import InputError

IMAGES = {'train': 12, 'val': 2}
INSTANCES = {'train': 78, 'val': 12}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coins') / 'below' / 'coins'
    write_coins(folder)
    return folder


@pytest.fixture(scope='module')
def masks():
    return coin_masks(data.coins())


@pytest.fixture(scope='module', params=['train', 'val'])
def split(request, folder):
    """Name, annotations read by pycocotools, and images by id."""
    coco = COCO(str(folder / 'annotations' / f'{request.param}.json'))
    return request.param, coco, images(folder, request.param, coco)


def images(folder, name, coco):
    return {i: np.asarray(Image.open(folder / name / coco.imgs[i]['file_name'])) for i in coco.getImgIds()}


def place(crop):
    """Find left, top, right and bottom of a crop, which occurs once in the picture."""
    picture = data.coins()
    height, width = crop.shape
    rows = np.lib.stride_tricks.sliding_window_view(picture, width, axis=1)
    tops, lefts = np.nonzero((rows == crop[0]).all(axis=-1))
    assert len(tops) == 1
    left, top = int(lefts[0]), int(tops[0])
    np.testing.assert_array_equal(picture[top : top + height, left : left + width], crop)
    return left, top, left + width, top + height


def test_there_are_24_coins(masks):
    assert masks.shape == (24, 303, 384)
    assert masks.any(axis=0).sum() == masks.sum()  # none on top of another
    centres = [region.centroid for mask in masks for region in measure.regionprops(mask.astype(int))]
    rows = np.sort(np.array([y for y, _ in centres])).reshape(4, 6)
    assert np.ptp(rows, axis=1).max() < 15 < 45 < np.diff(rows.mean(axis=1)).min()


def test_counts(split):
    name, coco, _ = split
    assert len(coco.imgs) == IMAGES[name]
    assert len(coco.anns) == INSTANCES[name]
    assert [category['name'] for category in coco.cats.values()] == ['coin']
    assert {annotation['image_id'] for annotation in coco.anns.values()} == set(coco.imgs)
    assert {annotation['category_id'] for annotation in coco.anns.values()} == set(coco.cats)
    assert {annotation['iscrowd'] for annotation in coco.anns.values()} == {0}


def test_images(split):
    _, coco, pixels = split
    for i, image in pixels.items():
        assert image.shape == (coco.imgs[i]['height'], coco.imgs[i]['width'], 3)
        assert 140 < min(image.shape[:2]) <= max(image.shape[:2]) < 205
        assert (image == image[..., :1]).all()


def test_boxes_and_areas_are_those_of_the_masks(split):
    _, coco, _ = split
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        x, y, width, height = annotation['bbox']
        assert annotation['area'] == mask.sum() == mask[y : y + height, x : x + width].sum()
        box = mask[y : y + height, x : x + width].astype(bool)
        assert all(side.any() for side in (box[0], box[-1], box[:, 0], box[:, -1]))  # no larger than it must be


def test_coins_are_round_filled_and_bright(split):
    name, coco, pixels = split
    whole = 0
    for annotation in coco.anns.values():
        grey = pixels[annotation['image_id']][..., 0]
        mask = coco.annToMask(annotation).astype(bool)
        (region,) = measure.regionprops(mask.astype(int))
        assert region.euler_number == 1  # one piece without a hole
        around = morphology.dilation(mask, morphology.disk(4)) & ~morphology.dilation(mask, morphology.disk(2))
        assert grey[mask].mean() > grey[around].mean() + 30
        top, left, bottom, right = region.bbox
        if min(top, left) == 0 or bottom == mask.shape[0] or right == mask.shape[1]:
            continue
        whole += 1
        assert 0.88 < 4 * np.pi * region.area / region.perimeter**2 < 1.1  # one has a nick
        ellipse = np.pi / 4 * (bottom - top) * (right - left)
        assert 0.9 < region.area / ellipse < 1.1
        assert 0.7 < (bottom - top) / (right - left) < 1.4
    assert whole == {'train': 53, 'val': 12}[name]


def test_every_coin_that_shows_is_annotated_and_at_least_half(folder, masks):
    for name in IMAGES:
        coco = COCO(str(folder / 'annotations' / f'{name}.json'))
        for i, image in images(folder, name, coco).items():
            left, top, right, bottom = place(image[..., 0])
            assert (left, top, right, bottom) == WINDOWS[name][i - 1]
            shown = masks[:, top:bottom, left:right]
            share = shown.sum(axis=(1, 2)) / masks.sum(axis=(1, 2))
            assert share[share > 0].min() >= (0.5 if name == 'train' else 1.0)
            annotated = np.stack([coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(i))])
            assert len(annotated) == (share > 0).sum()
            np.testing.assert_array_equal(annotated.sum(axis=0), shown.any(axis=0))


def test_training_shows_nothing_of_validation(folder, masks):
    """The crops' pixels show which part of the picture each split covers."""
    seen = {}
    for name in IMAGES:
        seen[name] = np.zeros(data.coins().shape, dtype=bool)
        for path in sorted((folder / name).iterdir()):
            left, top, right, bottom = place(np.asarray(Image.open(path))[..., 0])
            seen[name][top:bottom, left:right] = True
    assert not (seen['train'] & seen['val']).any()
    assert [int(masks[:, s].any(axis=1).sum()) for s in seen.values()] == [12, 12]
    assert masks.any(axis=0)[~(seen['train'] | seen['val'])].sum() == 0  # every coin is used


def write_when_all_are_there(target: Path, barrier: Any) -> None:
    barrier.wait()
    write_coins(target)


def test_processes_at_once_write_the_same_bytes(folder, tmp_path):
    target = tmp_path / 'coins'
    context = multiprocessing.get_context('fork')
    barrier = context.Barrier(3)
    processes = [context.Process(target=write_when_all_are_there, args=(target, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert contents(target) == contents(folder)
    assert sorted(contents(target)) == sorted(
        [f'{name}/{i:02}.png' for name, count in IMAGES.items() for i in range(1, count + 1)]
        + [f'annotations/{name}.json' for name in IMAGES]
    )
    assert [path.name for path in tmp_path.iterdir()] == ['coins']  # nothing temporary is left
    (tmp_path / 'usual').mkdir()
    assert target.stat().st_mode == (tmp_path / 'usual').stat().st_mode  # open to whom a folder is open


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    target = tmp_path / 'coins'
    write_coins(target)
    write_coins(target)  # the same again is fine
    path = target / 'annotations' / 'val.json'
    changed = path.read_text().replace('"area": ', '"area": 1')
    path.write_text(changed)
    with pytest.raises(InputError, match=r'annotations/val\.json'):
        write_coins(target)
    assert path.read_text() == changed
    assert json.loads(changed) != json.loads((folder / 'annotations' / 'val.json').read_text())

    image = target / 'train' / '03.png'
    path.write_bytes(contents(folder)['annotations/val.json'])
    Image.open(image).save(image, compress_level=1)  # other bytes, same image
    assert image.read_bytes() != contents(folder)['train/03.png']
    write_coins(target)
    image.unlink()
    with pytest.raises(InputError, match=r'train/03\.png'):
        write_coins(target)
    assert [path.name for path in tmp_path.iterdir()] == ['coins']


@pytest.mark.parametrize(('module', 'name'), [('skimage', 'scikit-image'), ('pycocotools', 'pycocotools')])
def test_what_is_not_installed_is_named(module, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)  # as Python marks what cannot be imported
    with pytest.raises(InputError, match=rf'{name}.*pip install "slimclr-hub\[transfer\]"'):
        write_coins(tmp_path / 'coins')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings('ignore:.*found in sys.modules:RuntimeWarning')
def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, 'argv', ['coins.py', *map(str, arguments)])
        runpy.run_module('slimclr_hub.detection.coins', run_name='__main__')

    run(tmp_path / 'coins')
    assert capsys.readouterr() == (f'{tmp_path}/coins: train 12 images, 78 instances; val 2 images, 12 instances\n', '')
    with pytest.raises(SystemExit, match=r'^usage: python -m slimclr_hub\.detection\.coins FOLDER$'):
        run()
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match=r'^Error: .*file holds something else'):
        run(tmp_path / 'file')
