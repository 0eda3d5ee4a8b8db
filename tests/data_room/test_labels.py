"""Whatever stands in the place of a label: numbers and names are classes, all else is none, and ends nothing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.labels import UNREADABLE, class_number, number_texts
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import make_dataset
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError
from tests.data_room.files import png_bytes, some_images, write_tar

pytestmark = pytest.mark.usefixtures('hub_cache')

COUNT = 12
PNGS = [png_bytes(image) for image in some_images('train', COUNT)[0]]
PICTURES = [{'bytes': png, 'path': None} for png in PNGS]
NAMES = ['bee', 'ant', 'cat 10', 'cat 2'] * 3
STORED = datasets.Image(decode=False)


def write_table(root: Path, features: dict[str, Any], split: str = 'train', **columns: list) -> Path:
    """A Parquet file as the Hub has one."""
    root.mkdir(parents=True, exist_ok=True)
    plain = {name: STORED if isinstance(kind, datasets.Image) else kind for name, kind in features.items()}
    table = datasets.Dataset.from_dict(columns, datasets.Features(plain)).cast(datasets.Features(features))
    table.to_parquet(str(root / f'{split}.parquet'))
    return root


def hub(kind: str, root: Path, **values) -> DataConfig:
    return DataConfig(name=f'{kind}/{root}', batch_size=4, num_workers=0, shuffle_buffer=0, **values)


def shards(root: Path, members: list[tuple[str, bytes]], name: str = 'train-0.tar', **values) -> DataConfig:
    write_tar(root / name, members)
    return DataConfig(
        **{'name': 'wds/', 'root': str(root), 'batch_size': 4, 'num_workers': 0, 'shuffle_buffer': 0, **values}
    )


def seen(of: DataConfig, split: str = 'train') -> list[int]:
    """Labels in evaluation."""
    return [label for _, labels in eval_loader(of, split, None, 0) for label in labels.tolist()]


def trained_on(of: DataConfig) -> list[int]:
    """Labels in training, sorted."""
    data = TrainData(of, ViewConfig(size=8), seed=0)
    return sorted(label for batch in data.epoch(0) for label in batch.labels.tolist())


@pytest.mark.parametrize(
    ('label', 'number'),
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (True, 1),
        (2.0, 2),
        ('7', 7),
        (b'7\n', 7),
        (np.float32(2), 2),
        *[
            (none, -1)
            for none in (None, -1, 0.5, math.nan, math.inf, 'cat', '', [1], [1, 2], {'a': 1}, np.array([1, 2]), 2**63)
        ],
    ],
)
def test_number_of_a_label(label, number):
    assert class_number(label) == number


def test_names_are_numbered_in_natural_order():
    numbers = number_texts(['b 10', 'b 2', None, b'a'], ['a'], '')
    assert numbers == {'a': 0, 'b 2': 1, 'b 10': 2}
    assert class_number('b 2\n', numbers) == 1
    assert class_number('7', numbers) == -1
    with pytest.raises(InputError, match='split val: the training images have no class c; name the classes as there'):
        number_texts(['a'], ['c'], 'split val')
    assert number_texts(map(str, range(70_000)), ['c'], '') == {}  # captions


LABELS = {
    'names': (datasets.Value('string'), NAMES, [1, 0, 3, 2] * 3),
    'floats': (datasets.Value('float64'), [0.0, 1.0, math.nan, 0.5] * 3, [0, 1, -1, -1] * 3),
    'some': (datasets.Value('int64'), [0, None, 2, -1] * 3, [0, -1, 2, -1] * 3),
    'several': (datasets.List(datasets.Value('int64')), [[0], [], [1, 2], [3]] * 3, [-1] * COUNT),
    'several names': (datasets.List(datasets.Value('string')), [['a'], ['a', 'b']] * 6, [-1] * COUNT),
    'none': (datasets.Value('string'), [None] * COUNT, [-1] * COUNT),
}


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
@pytest.mark.parametrize('labels', LABELS)
def test_labels_of_a_hub_data_set(tmp_path, kind, labels):
    feature, values, expected = LABELS[labels]
    root = write_table(tmp_path, {'image': datasets.Image(), 'label': feature}, image=PICTURES, label=values)
    of = hub(kind, root)
    assert seen(of) == expected
    assert trained_on(of) == sorted(expected)
    names = eval_loader(of, 'train', None, 0).source.class_names
    assert names == (['ant', 'bee', 'cat 2', 'cat 10'] if labels == 'names' else None)


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_names_are_those_of_the_training_images(tmp_path, kind):
    features = {'image': datasets.Image(), 'species': datasets.Value('string')}
    root = write_table(tmp_path / 'data', features, image=PICTURES, species=NAMES)
    write_table(root, features, 'validation', image=PICTURES[:2], species=['cat 10', 'cat 2'])
    assert seen(hub(kind, root, label_key='species'), 'validation') == [3, 2]
    write_table(root, features, 'validation', image=PICTURES[:2], species=['cat 10', 'dog'])
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    with pytest.raises(InputError, match='split validation: the training images have no class dog'):
        eval_loader(hub(kind, root, label_key='species'), 'validation', None, 0)


COLUMNS = {
    'bytes': ({'picture': datasets.Value('binary'), 'id': datasets.Value('int64')}, PNGS),
    'dicts of bytes': ({'picture': {'bytes': datasets.Value('binary')}}, [{'bytes': png} for png in PNGS]),
    'dicts': ({'img': {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')}}, PICTURES),
    'images': ({'photo': datasets.Image(), 'caption': datasets.Value('string')}, PICTURES),
}


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
@pytest.mark.parametrize('column', COLUMNS)
def test_column_of_images_is_found(tmp_path, kind, column):
    """Labels are not needed for it."""
    features, values = COLUMNS[column]
    name, *others = features
    root = write_table(
        tmp_path, features, **{name: values, **{other: list(map(str, range(COUNT))) for other in others}}
    )
    of = hub(kind, root)
    assert trained_on(of) == seen(of) == [-1] * COUNT


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_column_of_images_is_asked_for(tmp_path, kind):
    features = {'left': datasets.Image(), 'right': datasets.Image(), 'label': datasets.Value('int64')}
    root = write_table(tmp_path, features, left=PICTURES, right=PICTURES, label=list(range(COUNT)))
    with pytest.raises(InputError, match=r'give --data\.image_key, one of left, right, label'):
        TrainData(hub(kind, root), ViewConfig(size=8), seed=0)
    with pytest.raises(InputError, match=r'the column label holds no images; give --data\.image_key'):
        TrainData(hub(kind, root, image_key='label'), ViewConfig(size=8), seed=0)
    assert trained_on(hub(kind, root, image_key='right')) == list(range(COUNT))


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_images_that_are_none_or_cut(tmp_path, kind):
    """In evaluation as in training; the first of all among them."""
    values = [None, *PICTURES[1:5], {'bytes': PNGS[5][:60], 'path': None}, *PICTURES[6:]]
    features = {'image': datasets.Image(), 'label': datasets.Value('int64')}
    root = write_table(tmp_path, features, image=values, label=list(range(COUNT)))
    of = hub(kind, root)
    loader = eval_loader(of, 'train', None, 0)
    labels = [label for _, each in loader for label in each.tolist()]
    assert labels == [UNREADABLE, 1, 2, 3, 4, UNREADABLE, *range(6, COUNT)]
    assert [label for _, each in loader.readable() for label in each.tolist()] == [1, 2, 3, 4, *range(6, COUNT)]
    assert len(loader.corrupt.reasons) == 2
    assert 'no image' in loader.corrupt.reasons.values()
    few = DataConfig(**{**vars(of), 'max_corrupt': 1})
    with pytest.raises(DataError, match=r'2 images cannot be read: .*row 0 \(no image\).*data\.max_corrupt 1'):
        list(eval_loader(few, 'train', None, 0))


@pytest.mark.parametrize(('label', 'what'), [(9, 'has class 9, and there are 9'), (None, 'has no label')])
def test_labels_that_something_learns_from_are_classes(tmp_path, label, what):
    features = {'image': datasets.Image(), 'label': datasets.Value('int64')}
    write_table(tmp_path, features, image=PICTURES, label=[*range(9), 0, 1, label])
    data = TrainData(hub('hfds', tmp_path), ViewConfig(size=8), seed=0, num_classes=9)
    with pytest.raises(DataError, match=f'an image {what}'):
        list(data.epoch(0))
    assert len(list(TrainData(hub('hfds', tmp_path), ViewConfig(size=8), seed=0).epoch(0))) == 3


# Shards


def labelled(name: str = '{}', ending: str = 'png', labels=NAMES) -> list[tuple[str, bytes]]:
    pairs = zip(PNGS, labels, strict=True)
    return [
        member
        for i, (png, label) in enumerate(pairs)
        for member in ((f'{name.format(i)}.{ending}', png), (f'{name.format(i)}.cls', str(label).encode()))
    ]


@pytest.mark.parametrize('workers', [0, 2])
def test_names_in_shards(tmp_path, workers):
    of = shards(tmp_path, labelled(), num_workers=workers)
    assert trained_on(of) == sorted([1, 0, 3, 2] * 3)
    assert sorted(seen(of)) == sorted([1, 0, 3, 2] * 3)
    write_tar(tmp_path / 'validation.tar', labelled()[:2])
    assert seen(of, 'validation') == [1]
    write_tar(tmp_path / 'validation.tar', [('0.png', PNGS[0]), ('0.cls', b'dog')])
    with pytest.raises(InputError, match='the training images have no class dog'):
        eval_loader(of, 'validation', None, 0)


def test_names_in_json(tmp_path):
    members = []
    for i, name in enumerate(NAMES):
        about = b'not json' if i == 5 else json.dumps({'kind': name} if i != 6 else {}).encode()
        members += [(f'{i}.png', PNGS[i]), (f'{i}.json', about)]
    assert seen(shards(tmp_path, members, label_key='kind')) == [1, 0, 3, 2, 1, -1, -1, 2, 1, 0, 3, 2]


def test_shards_without_classes(tmp_path):
    """As img2dataset writes them."""
    members = []
    for i, png in enumerate(PNGS):
        members += [(f'{i:05d}.png', png), (f'{i:05d}.json', b'{"caption": "x"}'), (f'{i:05d}.txt', b'x')]
    of = shards(tmp_path, members)
    assert trained_on(of) == seen(of) == [-1] * COUNT


@pytest.mark.parametrize('name', ['2021.01.{}', 'a.b/v1.0.{}', './photo.{}', 'class.x/deep/{}'])
def test_dots_and_folders_in_keys(tmp_path, name):
    of = shards(tmp_path, labelled(name, labels=range(COUNT)))
    assert trained_on(of) == seen(of) == list(range(COUNT))


def test_what_lies_beside_an_image_is_no_image(tmp_path):
    """By webdataset's convention a base name ends at the first dot."""
    members = [(f'{i}.{ending}', PNGS[i]) for i in range(COUNT) for ending in ('seg.png', 'png')]
    assert len(seen(shards(tmp_path, members))) == COUNT
    assert len(seen(shards(tmp_path, members, image_key='seg.png'))) == COUNT


@pytest.mark.parametrize('ending', ['tif', 'JPEG', 'webp', 'bmp'])
def test_endings_in_shards(tmp_path, ending):
    of = shards(tmp_path, labelled(ending=ending, labels=range(COUNT)))
    assert trained_on(of) == seen(of) == list(range(COUNT))


def test_shards_in_a_folder_of_their_split(tmp_path):
    of = shards(tmp_path, labelled(labels=range(COUNT)), name='train/deep/0.tar')
    write_tar(tmp_path / 'validation' / '0.tar', labelled(labels=range(COUNT))[:4])
    assert trained_on(of) == list(range(COUNT))
    assert seen(of, 'validation') == [0, 1]


def test_folder_of_unlabelled_and_labelled(tmp_path):
    """Torchvision's, too, may have other labels than one number."""
    for i, png in enumerate(PNGS):
        (tmp_path / f'{i}.png').write_bytes(png)
    of = DataConfig(name='folder', root=str(tmp_path), batch_size=4, num_workers=0)
    assert trained_on(of) == [-1] * COUNT
    assert make_dataset(of, 'train').class_names is None
