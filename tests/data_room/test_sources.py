import hashlib
import io
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from slimclr_hub.data import DataConfig, sources
from slimclr_hub.data.sources import EMBEDDED_FILE, ArrayImages, has_validation, make_dataset, read_embedded
from slimclr_hub.errors import InputError
from slimclr_hub.settings import differences
from tests.data_room.files import idx_bytes, some_images, write_classes, write_idx, write_pngs
from tests.data_room.make_fashion_mnist_6k import first_of_each_class


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
    validation = make_dataset(DataConfig(), 'validation', training=False)
    images, labels = read_embedded('test')
    assert np.array_equal(pixels(validation), images)
    assert targets(validation) == labels.tolist()
    image, _ = make_dataset(DataConfig(channels=3, mean=(0.3,) * 3, std=(0.4,) * 3), 'train', training=True)[0]
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
        make_dataset(DataConfig(), 'nosuch', training=False)


# IDX files


@pytest.mark.parametrize('gzipped', [True, False], ids=['gzipped', 'plain'])
@pytest.mark.parametrize('layout', ['', 'FashionMNIST/raw'], ids=['debian', 'torchvision'])
def test_idx_files(tmp_path, gzipped, layout):
    train, test = some_images('train', 12), some_images('test', 5)
    write_idx(tmp_path / layout, 'train', *train, gzipped)
    write_idx(tmp_path / layout, 'test', *test, gzipped)
    config = DataConfig(name='fashion-mnist', root=str(tmp_path))
    for split, (images, labels) in ('train', train), ('validation', test), ('test', test):
        dataset = make_dataset(config, split, training=False)
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
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train', training=True)


def test_truncated_gzip(tmp_path):
    write_idx(tmp_path, 'train', *some_images('train', 4), gzipped=True)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r'train-images-idx3-ubyte\.gz'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train', training=True)


def test_idx_with_fewer_labels_than_images(tmp_path):
    images, labels = some_images('train', 4)
    write_idx(tmp_path, 'train', images, labels)
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(idx_bytes(labels[:3]))
    with pytest.raises(InputError, match='4 train images but 3 labels'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train', training=True)


def test_idx_missing(tmp_path):
    with pytest.raises(InputError, match=r'no train-images-idx3-ubyte.*apt-get install'):
        make_dataset(DataConfig(name='fashion-mnist', root=str(tmp_path)), 'train', training=True)
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='fashion-mnist'), 'train', training=True)


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
        dataset = make_dataset(config, split, training=False)
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
    dataset = make_dataset(folder(tmp_path), 'validation', training=False)
    assert targets(dataset) == [0, 0, 2, 2]
    assert dataset.reader.class_to_idx == {'ant': 0, 'bee': 1, 'cat': 2}
    write_pngs(tmp_path / 'val' / 'dog', some_images('train', 1)[0])
    with pytest.raises(InputError, match='the training images have no class dog; name the folders as there'):
        make_dataset(folder(tmp_path), 'validation', training=False)


def test_hidden_names_and_loops_of_links_are_left_out(tmp_path):
    for path in 'train/ant', 'train/bee', 'train/.ipynb_checkpoints', 'train/bee/._hidden', 'val/bee':
        write_pngs(tmp_path / path, some_images('train', 3)[0])
    (tmp_path / 'train/ant/._0000.png').write_bytes(b'resource fork')
    (tmp_path / 'train/ant/up').symlink_to(tmp_path / 'train')
    (tmp_path / 'train/ant/round').symlink_to(tmp_path / 'train/ant')
    dataset = make_dataset(folder(tmp_path), 'train', training=True)
    assert targets(dataset) == [0, 0, 0, 1, 1, 1]
    assert targets(make_dataset(folder(tmp_path), 'validation', training=False)) == [1, 1, 1]


def test_endings_of_torchvision(tmp_path):
    image = Image.fromarray(some_images('train', 1)[0][0])
    for ending in 'webp', 'tif', 'bmp', 'PNG', 'jpeg':
        image.save(tmp_path / f'image.{ending}')
    image.save(tmp_path / 'image.gif')
    (tmp_path / 'notes').write_text('no image')
    with pytest.warns(UserWarning, match=r'left out: 1 \.gif, 1 without'):
        dataset = make_dataset(folder(tmp_path), 'train', training=True)
    assert len(dataset) == 5
    assert targets(dataset) == [-1] * 5


def test_folder_of_classes_without_splits(tmp_path):
    images, labels = some_images('train', 20)
    write_classes(tmp_path, images, labels)
    config = folder(tmp_path)
    assert len(make_dataset(config, 'train', training=True)) == 20
    assert not has_validation(config)


def test_flat_folder_of_unlabelled_images(tmp_path):
    images, _ = some_images('train', 7)
    write_pngs(tmp_path, images)
    config = folder(tmp_path)
    dataset = make_dataset(config, 'train', training=True)
    assert np.array_equal(pixels(dataset), images)
    assert not has_validation(config)


def test_folder_converts_to_the_wanted_channels(tmp_path):
    write_pngs(tmp_path, some_images('train', 1)[0])
    image, _ = make_dataset(folder(tmp_path, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3), 'train', training=True)[0]
    assert image.mode == 'RGB'
    Image.new('RGBA', (9, 5), (255, 0, 0, 40)).save(tmp_path / '0000.png')
    image, _ = make_dataset(folder(tmp_path), 'train', training=True)[0]
    assert (image.mode, image.size) == ('L', (9, 5))


def test_folder_without_images(tmp_path):
    with pytest.raises(InputError, match='no images found; endings of images are'):
        make_dataset(folder(tmp_path), 'train', training=True)
    (tmp_path / 'notes.txt').write_text('no image')
    with pytest.raises(InputError, match='no images found; endings of images are'):
        make_dataset(folder(tmp_path), 'train', training=True)


def test_folder_that_is_not_there(tmp_path):
    missing = tmp_path / 'missing'
    with pytest.raises(InputError, match=f'data.root {missing} does not exist'):
        make_dataset(folder(missing), 'train', training=True)
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='folder'), 'train', training=True)


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
        make_dataset(folder(tmp_path), 'trian', training=True)


def test_validation_split_that_is_not_there_is_not_the_whole_folder(tmp_path):
    """`val` is there but `test` is asked for, which timm would answer with the images of all sub-folders."""
    write_classes(tmp_path / 'train', *some_images('train', 10))
    write_classes(tmp_path / 'val', *some_images('test', 10))
    config = folder(tmp_path, val_split='test')
    if has_validation(config):
        with pytest.raises(InputError, match='test'):
            make_dataset(config, 'test', training=False)


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


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    """What `datasets` converts on the way goes to a folder of the tests."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.getbasetemp() / 'datasets-cache')


def test_hub_data_set(hub_folder):
    config = DataConfig(name=f'hfds/{hub_folder}')
    for split, held, count in ('train', 'train', 20), ('validation', 'test', 6):
        dataset = make_dataset(config, split, training=False)
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
    dataset = make_dataset(config, 'train', training=True)
    assert np.array_equal(pixels(dataset), images)
    assert targets(dataset) == labels.tolist()


def test_hub_data_set_unknown(hub_folder, tmp_path):
    with pytest.raises(InputError, match='nosuch'):
        make_dataset(DataConfig(name=f'hfds/{hub_folder}'), 'nosuch', training=False)
    with pytest.raises(InputError, match=f'{tmp_path}/missing'):
        make_dataset(DataConfig(name=f'hfds/{tmp_path}/missing'), 'train', training=True)


@pytest.mark.parametrize('key', ['image_key', 'label_key'])
def test_hub_data_set_without_the_column(hub_folder, key):
    """A wrong column is found when the data set is opened, not by a worker in the middle of an epoch."""
    config = DataConfig(name=f'hfds/{hub_folder}', **{key: 'nosuch'})
    with pytest.raises(InputError, match='nosuch'):
        make_dataset(config, 'train', training=True)


def test_hub_data_set_without_labels(tmp_path):
    """Pre-training asks for images alone."""
    images, _ = some_images('train', 5)
    features = datasets.Features({'image': datasets.Image()})
    rows = {'image': [Image.fromarray(image) for image in images]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / 'train.parquet'))
    dataset = make_dataset(DataConfig(name=f'hfds/{tmp_path}', val_split=None), 'train', training=True)
    assert np.array_equal(pixels(dataset), images)


# Streams


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Two tar files of ten images, as webdataset names their members."""
    root = tmp_path_factory.mktemp('shards')
    images, labels = some_images('train', 20)
    for shard in range(2):
        with tarfile.open(root / f'train-{shard:04d}.tar', 'w') as tar:
            for i in range(10 * shard, 10 * shard + 10):
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, 'png')
                for suffix, data in ('png', png.getvalue()), ('cls', str(labels[i]).encode()):
                    member = tarfile.TarInfo(f'{i:05d}.{suffix}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def webdataset(root, **kwargs) -> DataConfig:
    values = {'train_split': 'train-{0000..0001}.tar|20', 'batch_size': 5, 'size': 16, 'num_workers': 0, **kwargs}
    return DataConfig(name='wds/', root=None if root is None else str(root), **values)


def test_webdataset(shards):
    images, labels = some_images('train', 20)
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    stream = make_dataset(webdataset(shards), 'train-{0000..0001}.tar|20', training=False)
    assert sorted((np.asarray(image).tobytes(), label) for image, label in stream) == expected
    assert webdataset(shards).streams


def test_webdataset_length(shards):
    config = webdataset(shards, train_split='train-{0000..0001}.tar', num_samples=10)
    assert len(make_dataset(config, config.train_split, training=True)) == 10
    config = webdataset(shards, train_split='train-{0000..0001}.tar')
    with pytest.raises(InputError, match='num_samples'):
        make_dataset(config, config.train_split, training=True)
    with pytest.raises(InputError, match=r'data\.num_samples'):
        make_dataset(config, config.train_split, training=False)


def test_webdataset_without_root():
    config = webdataset(None)
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(config, config.train_split, training=True)


def test_streamed_hub_data_set(hub_folder):
    config = DataConfig(name=f'hfids/{hub_folder}', batch_size=4, num_samples=20)
    stream = make_dataset(config, 'train', training=True)
    images, _ = some_images('train', 20)
    known = {image.tobytes() for image in images}
    assert config.streams
    assert len(stream) == 20
    seen = [np.asarray(image).tobytes() for image, _ in stream]
    assert len(seen) == 20
    assert set(seen) <= known


# Names


@pytest.mark.parametrize('name', ['cifar10', 'fashion', 'hfds', 'imagenet', ''])
def test_unknown_name(name):
    with pytest.raises(InputError, match=r'data\.name.*fashion-mnist-6k'):
        DataConfig(name=name)


def test_torchvision_data_set_that_is_not_there(tmp_path):
    config = DataConfig(name='torch/cifar10', root=str(tmp_path))
    with pytest.raises(InputError, match=r'torch/cifar10.*not found'):
        make_dataset(config, 'train', training=True)
    with pytest.raises(InputError, match='torch/nosuch'):
        make_dataset(DataConfig(name='torch/nosuch', root=str(tmp_path)), 'train', training=True)
    with pytest.raises(InputError, match=r'data\.root'):
        make_dataset(DataConfig(name='torch/cifar10'), 'train', training=True)


def test_array_images_apply_their_transform():
    images, labels = some_images('train', 2)
    dataset = ArrayImages(images, labels, 'L')
    dataset.transform = lambda image: image.size
    assert dataset[1] == ((28, 28), int(labels[1]))


def test_root_of_the_embedded_set_is_refused_by_the_recipe(tmp_path):
    """Were the folder passed over, the run would train on other images than its user's."""
    script = Path(__file__).parents[2] / 'recipes' / 'pretrain.py'
    command = [sys.executable, str(script), '--data.root', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
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
