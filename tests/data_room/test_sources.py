import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from slimclr_hub.data import DataConfig, sources
from slimclr_hub.data.sources import EMBEDDED_FILE, has_validation, make_dataset, read_embedded
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.network import check_images
from slimclr_hub.settings import differences
from tests.data_room.files import idx_bytes, some_images, write_classes, write_idx, write_pngs, write_shards
from tests.data_room.make_fashion_mnist_6k import first_of_each_class
from tests.scripts import Script

pytestmark = pytest.mark.usefixtures('hub_cache')


def pixels(dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image, _ in (dataset[i] for i in range(len(dataset)))])


def targets(dataset) -> list[int]:
    return [dataset[i][1] for i in range(len(dataset))]


# The embedded set


@pytest.mark.parametrize(('split', 'count'), [('train', 6000), ('test', 1000)])
def test_embedded_is_stratified(split, count):
    images, labels = read_embedded(split)
    assert images.shape == (count, 28, 28)
    assert images.dtype == np.uint8
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), count // 10)
    # Real garments rather than noise or padding: every image has dark ground and something bright on it.
    assert images.reshape(count, -1).min(1).max() < 30
    assert images.reshape(count, -1).max(1).min() > 60


def test_embedded_splits_share_no_image():
    digests = [{hashlib.md5(image).digest() for image in read_embedded(split)[0]} for split in ('train', 'test')]
    assert not digests[0] & digests[1]


def test_embedded_through_make_dataset():
    validation = make_dataset(DataConfig(), 'validation')
    images, labels = read_embedded('test')
    assert np.array_equal(pixels(validation), images)
    assert targets(validation) == labels.tolist()
    image, _ = make_dataset(DataConfig(channels=3, mean=(0.3,) * 3, std=(0.4,) * 3), 'train')[0]
    assert image.mode == 'RGB'


@pytest.mark.parametrize('damage', ['flip', 'truncate'])
def test_damaged_embedded_file_is_refused(tmp_path, monkeypatch, damage):
    data = bytearray(EMBEDDED_FILE.read_bytes())
    if damage == 'flip':
        data[len(data) // 2] ^= 1
    else:
        del data[-1]
    copy = tmp_path / EMBEDDED_FILE.name
    copy.with_suffix('.sha256').write_text(EMBEDDED_FILE.with_suffix('.sha256').read_text())
    monkeypatch.setattr(sources, 'EMBEDDED_FILE', copy)
    copy.write_bytes(EMBEDDED_FILE.read_bytes())
    read_embedded('train')  # the undamaged copy is read, so it is the damage that is refused below
    copy.write_bytes(data)
    with pytest.raises(InputError, match=r'damaged.*install'):
        read_embedded('train')


def test_subset_takes_the_first_of_each_class():
    labels = np.array([3, 1, 3, 3, 1, 1, 3])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4]


def test_unknown_split_of_embedded():
    with pytest.raises(InputError, match='nosuch'):
        make_dataset(DataConfig(), 'nosuch')


# IDX files


@pytest.mark.parametrize('gzipped', [True, False], ids=['gzipped', 'plain'])
@pytest.mark.parametrize('layout', ['', 'FashionMNIST/raw'], ids=['debian', 'torchvision'])
def test_idx_files(tmp_path, gzipped, layout):
    train, test = some_images('train', 12), some_images('test', 5)
    write_idx(tmp_path / layout, 'train', *train, gzipped)
    write_idx(tmp_path / layout, 'test', *test, gzipped)
    config = DataConfig(name='fashion-mnist', root=str(tmp_path))
    for split, (images, labels) in ('train', train), ('validation', test), ('test', test):
        dataset = make_dataset(config, split)
        assert np.array_equal(pixels(dataset), images)
        assert targets(dataset) == labels.tolist()


def damaged(kind: str, images: bytes) -> bytes:
    return {
        'truncated': images[:-1],
        'header only': images[:3],
        'empty': b'',
        'other type': images[:2] + b'\x0d' + images[3:],
        'text': b'<html>Not Found</html>',
    }[kind]


@pytest.mark.parametrize('kind', ['truncated', 'header only', 'empty', 'other type', 'text'])
def test_damaged_idx_file(tmp_path, kind):
    images, labels = some_images('train', 4)
    write_idx(tmp_path, 'train', images, labels)
    path = tmp_path / 'train-images-idx3-ubyte'
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(InputError, match=r'train-images-idx3-ubyte.*fetch'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train')


def test_truncated_gzip(tmp_path):
    write_idx(tmp_path, 'train', *some_images('train', 4), gzipped=True)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r'train-images-idx3-ubyte\.gz'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train')


def test_idx_with_fewer_labels_than_images(tmp_path):
    images, labels = some_images('train', 4)
    write_idx(tmp_path, 'train', images, labels)
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(idx_bytes(labels[:3]))
    with pytest.raises(InputError, match='4 train images but 3 labels'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train')


def test_idx_missing(tmp_path):
    with pytest.raises(InputError, match=r'no train-images-idx3-ubyte.*apt-get install'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train')
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='fashion-mnist'), 'train')


# Image folders


def folder(path, **kwargs) -> DataConfig:
    return DataConfig(name='folder', root=str(path), **kwargs)


@pytest.mark.parametrize('validation', ['val', 'validation'])
def test_folder_with_splits(tmp_path, validation):
    train, held_out = some_images('train', 30), some_images('test', 20)
    write_classes(tmp_path / 'train', *train)
    write_classes(tmp_path / validation, *held_out)
    config = folder(tmp_path)
    assert has_validation(config)
    for split, (images, labels) in ('train', train), ('validation', held_out):
        dataset = make_dataset(config, split)
        assert len(dataset) == len(images)
        # The files keep their order within a class, and classes are numbered in the order of their names.
        order = np.argsort(labels, kind='stable')
        assert np.array_equal(pixels(dataset), images[order])
        numbers = {label: number for number, label in enumerate(np.unique(train[1]))}
        assert targets(dataset) == [numbers[label] for label in labels[order]]


def test_classes_are_numbered_by_the_training_images(tmp_path):
    """Held-out images lack one; and are at any depth below their class."""
    for path in 'train/ant/a', 'train/bee/a', 'train/cat/a', 'val/cat/deep/er/a', 'val/ant/a':
        write_pngs(tmp_path / path, some_images('train', 2)[0])
    dataset = make_dataset(folder(tmp_path), 'validation')
    assert targets(dataset) == [0, 0, 2, 2]
    assert dataset.class_names == ['ant', 'bee', 'cat']
    write_pngs(tmp_path / 'val' / 'dog', some_images('train', 1)[0])
    with pytest.raises(InputError, match='the training images have no class dog; name the classes as there'):
        make_dataset(folder(tmp_path), 'validation')


def test_hidden_names_and_loops_of_links_are_left_out(tmp_path):
    for path in 'train/ant', 'train/bee', 'train/.ipynb_checkpoints', 'train/bee/._hidden', 'val/bee':
        write_pngs(tmp_path / path, some_images('train', 3)[0])
    (tmp_path / 'train/ant/._0000.png').write_bytes(b'resource fork')
    (tmp_path / 'train/ant/up').symlink_to(tmp_path / 'train')
    (tmp_path / 'train/ant/round').symlink_to(tmp_path / 'train/ant')
    dataset = make_dataset(folder(tmp_path), 'train')
    assert targets(dataset) == [0, 0, 0, 1, 1, 1]
    assert targets(make_dataset(folder(tmp_path), 'validation')) == [1, 1, 1]


def test_endings_of_torchvision(tmp_path):
    image = Image.fromarray(some_images('train', 1)[0][0])
    for ending in 'webp', 'tif', 'bmp', 'PNG', 'jpeg':
        image.save(tmp_path / f'image.{ending}')
    image.save(tmp_path / 'image.gif')
    (tmp_path / 'notes').write_text('no image')
    with pytest.warns(UserWarning, match=r'left out: 1 \.gif, 1 without'):
        dataset = make_dataset(folder(tmp_path), 'train')
    assert len(dataset) == 5
    assert targets(dataset) == [-1] * 5


def test_folder_of_classes_without_splits(tmp_path):
    images, labels = some_images('train', 20)
    write_classes(tmp_path, images, labels)
    config = folder(tmp_path)
    assert len(make_dataset(config, 'train')) == 20
    assert not has_validation(config)


def test_flat_folder_of_unlabelled_images(tmp_path):
    images, _ = some_images('train', 7)
    write_pngs(tmp_path, images)
    config = folder(tmp_path)
    dataset = make_dataset(config, 'train')
    assert np.array_equal(pixels(dataset), images)
    assert not has_validation(config)


def test_folder_converts_to_the_wanted_channels(tmp_path):
    write_pngs(tmp_path, some_images('train', 1)[0])
    image, _ = make_dataset(folder(tmp_path, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3), 'train')[0]
    assert image.mode == 'RGB'
    Image.new('RGBA', (9, 5), (255, 0, 0, 40)).save(tmp_path / '0000.png')
    image, _ = make_dataset(folder(tmp_path), 'train')[0]
    assert (image.mode, image.size) == ('L', (9, 5))


def test_folder_without_images(tmp_path):
    with pytest.raises(InputError, match='no images found; endings of images are'):
        make_dataset(folder(tmp_path), 'train')
    (tmp_path / 'notes.txt').write_text('no image')
    with pytest.raises(InputError, match='no images found; endings of images are'):
        make_dataset(folder(tmp_path), 'train')


def test_folder_that_is_not_there(tmp_path):
    missing = tmp_path / 'missing'
    with pytest.raises(InputError, match=f'data.root {missing} does not exist'):
        make_dataset(folder(missing), 'train')
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='folder'), 'train')


def test_no_validation_where_none_is_asked_for(tmp_path):
    write_classes(tmp_path / 'train', *some_images('train', 10))
    write_classes(tmp_path / 'val', *some_images('test', 10))
    assert not has_validation(folder(tmp_path, val_split=None))
    assert not has_validation(DataConfig(val_split=None))
    assert has_validation(DataConfig())


def test_unknown_split_is_not_the_whole_folder(tmp_path):
    """A misspelt split must not quietly bring training and held-out images together."""
    write_classes(tmp_path / 'train', *some_images('train', 10))
    write_classes(tmp_path / 'val', *some_images('test', 10))
    with pytest.raises(InputError, match='trian'):
        make_dataset(folder(tmp_path), 'trian')


def test_validation_split_that_is_not_there_is_not_the_whole_folder(tmp_path):
    """`val` is there but `test` is asked for, which timm would answer with the images of all sub-folders."""
    write_classes(tmp_path / 'train', *some_images('train', 10))
    write_classes(tmp_path / 'val', *some_images('test', 10))
    config = folder(tmp_path, val_split='test')
    if has_validation(config):
        with pytest.raises(InputError, match='test'):
            make_dataset(config, 'test')


# Splits that share images


def test_folder_that_serves_both_splits(tmp_path):
    for split in 'train/ant', 'train/bee', 'val/ant', 'apart/ant':
        write_pngs(tmp_path / split, some_images('train', 1)[0])
    (tmp_path / 'link').symlink_to(tmp_path / 'train')
    for split, apart in ('val', True), ('apart', True), ('train', False), ('training', False), ('link', False):
        assert has_validation(folder(tmp_path, val_split=split)) == apart, split
    assert not has_validation(folder(tmp_path, val_split='train/ant'))


@pytest.mark.parametrize(
    ('train', 'val', 'apart'),
    [
        ('train', 'test', True),
        ('train', 'train', False),
        ('train', 'train[:10%]', False),
        ('train[:90%]', 'train[90%:]', True),
        ('train[:90%]', 'train[80%:]', False),
        ('train[:1000]', 'train[1000:]', True),
        ('train[:-100]', 'train[-100:]', True),
        ('train+extra', 'extra', False),
        ('train + extra[:50%]', 'extra[50%:]+test', True),
    ],
)
def test_slices_of_a_split(train, val, apart):
    for name in 'hfds/USER/NAME', 'hfids/USER/NAME', 'tfds/NAME':
        assert has_validation(DataConfig(name=name, train_split=train, val_split=val)) == apart


@pytest.mark.parametrize('name', ['fashion-mnist-6k', 'fashion-mnist', 'torch/cifar10'])
def test_synonyms_of_a_split(name):
    for split, apart in ('validation', True), ('train', False), ('training', False):
        assert has_validation(DataConfig(name=name, val_split=split)) == apart


def test_shards_that_serve_both_splits(tmp_path):
    write_shards(tmp_path, (2, 2, 2))
    of = DataConfig(name='wds/', root=str(tmp_path), train_split='train-{0000..0001}.tar', val_split='train-0002.tar')
    assert has_validation(of)
    assert not has_validation(replace(of, train_split='train'))
    assert not has_validation(replace(of, val_split='train-{0001..0002}.tar|3'))


def test_evaluation_on_the_training_images_is_refused():
    with pytest.raises(InputError, match=r'data\.val_split train is not apart from the training images; give another'):
        check_images(DataConfig(val_split='train'))


# Hub data sets


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    """A data set as the Hub stores one: parquet files by split."""
    root = tmp_path_factory.mktemp('hub')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
    for split, name, count in ('train', 'train', 20), ('test', 'validation', 6):
        images, labels = some_images(split, count)
        rows = {'image': [Image.fromarray(image) for image in images], 'label': labels.tolist()}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / 'data' / f'{name}-00000-of-00001.parquet'))
    return root


def test_hub_data_set(hub_folder):
    config = DataConfig(name=f'hfds/{hub_folder}')
    for split, held, count in ('train', 'train', 20), ('validation', 'test', 6):
        dataset = make_dataset(config, split)
        images, labels = some_images(held, count)
        assert np.array_equal(pixels(dataset), images)
        assert targets(dataset) == labels.tolist()
    assert has_validation(config)


def test_hub_data_set_with_other_columns(tmp_path):
    images, labels = some_images('train', 5)
    features = datasets.Features({'picture': datasets.Image(), 'kind': datasets.Value('int64')})
    rows = {'picture': [Image.fromarray(image) for image in images], 'kind': labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / 'train.parquet'))
    config = DataConfig(name=f'hfds/{tmp_path}', image_key='picture', label_key='kind')
    dataset = make_dataset(config, 'train')
    assert np.array_equal(pixels(dataset), images)
    assert targets(dataset) == labels.tolist()


def test_hub_data_set_unknown(hub_folder, tmp_path):
    with pytest.raises(InputError, match='nosuch'):
        make_dataset(DataConfig(name=f'hfds/{hub_folder}'), 'nosuch')
    with pytest.raises(InputError, match=f'{tmp_path}/missing'):
        make_dataset(DataConfig(name=f'hfds/{tmp_path}/missing'), 'train')


@pytest.mark.parametrize('key', ['image_key', 'label_key'])
def test_hub_data_set_without_the_column(hub_folder, key):
    """A wrong column is found when the data set is opened, not by a worker in the middle of an epoch."""
    config = DataConfig(name=f'hfds/{hub_folder}', **{key: 'nosuch'})
    with pytest.raises(InputError, match='nosuch'):
        make_dataset(config, 'train')


def test_hub_data_set_without_labels(tmp_path):
    """Pre-training asks for images alone."""
    images, _ = some_images('train', 5)
    features = datasets.Features({'image': datasets.Image()})
    rows = {'image': [Image.fromarray(image) for image in images]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / 'train.parquet'))
    dataset = make_dataset(DataConfig(name=f'hfds/{tmp_path}', val_split=None), 'train')
    assert np.array_equal(pixels(dataset), images)


# Names


@pytest.mark.parametrize('name', ['cifar10', 'fashion', 'hfds', 'imagenet', ''])
def test_unknown_name(name):
    with pytest.raises(InputError, match=r'data\.name.*fashion-mnist-6k'):
        DataConfig(name=name)


def test_torchvision_data_set_that_is_not_there(tmp_path):
    config = DataConfig(name='torch/cifar10', root=str(tmp_path))
    with pytest.raises(InputError, match=r'torch/cifar10.*not found'):
        make_dataset(config, 'train')
    with pytest.raises(InputError, match='torch/nosuch'):
        make_dataset(DataConfig(name='torch/nosuch', root=str(tmp_path)), 'train')
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='torch/cifar10'), 'train')


def test_root_of_the_embedded_set_is_refused_by_the_recipe(tmp_path):
    """Were the folder passed over, the run would train on other images than its user's."""
    script = Path(__file__).parents[2] / 'recipes' / 'pretrain.py'
    done = Script(script, '--data.root', tmp_path, folder=tmp_path)
    assert done.end() == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'error: data.root {tmp_path}: data.name fashion-mnist-6k')
    assert '--data.name folder' in line
    assert not any(tmp_path.iterdir())
    assert DataConfig(name='folder', root=str(tmp_path)).root == str(tmp_path)


def test_what_changes_a_result():
    config = DataConfig('folder', root='/old')
    assert not differences(config, replace(config, root='/new', num_workers=0, download=True, max_corrupt=3))
    assert differences(config, replace(config, batch_size=64, crop_pct=0.5)) == [
        'crop_pct 1.0 -> 0.5',
        'batch_size 128 -> 64',
    ]
    assert config.fingerprint() != replace(config, root='/new').fingerprint()
    assert config.fingerprint() == replace(config, batch_size=64, num_workers=0).fingerprint()
