import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import FeatureCache, check_labels
from slimclr_hub.text import GARMENTS
from slimclr_hub.weights.hashes import state_hash
from tests.data_room.files import some_images, write_classes, write_idx, write_idx_set, write_shards
from tests.networks import randomise_batchnorm
from tests.train.runs import contents

IMAGES = 50


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_idx_set(tmp_path_factory.mktemp('idx'), IMAGES, 20)
    return DataConfig(name='fashion-mnist', root=str(root), size=8, batch_size=16, num_workers=0)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=(1.0, 0.25))
    randomise_batchnorm(model)
    return model.eval()


def test_features_are_those_of_the_network(tmp_path, accelerator, data, backbone):
    found = FeatureCache(tmp_path, accelerator, backbone, data).features('train')
    with torch.no_grad():
        batches = [(backbone.forward_widths(images), labels) for images, labels in eval_loader(data, 'train', None, 0)]
    for width in backbone.widths:
        torch.testing.assert_close(found.by_width[width], torch.cat([features[width] for features, _ in batches]))
    assert found.labels.equal(torch.cat([labels for _, labels in batches]))
    assert found.labels.tolist() == some_images('train', IMAGES)[1].tolist()
    assert found.class_names == list(GARMENTS)
    assert not any(features.is_inference() for features in found.by_width.values())


def test_features_are_computed_once(tmp_path, accelerator, data, backbone):
    """And read again by whoever asks for the same, however the images are loaded."""
    first = FeatureCache(tmp_path, accelerator, backbone, data).features('train')
    before = contents(tmp_path)
    assert len(before) == 1
    # Were the network run, its statistics of nonsense would show: as it was, it is only where the hash is taken.
    cache = FeatureCache(tmp_path, accelerator, backbone, replace(data, batch_size=7, max_corrupt=3))
    torch.nn.init.zeros_(backbone.conv1.weight)
    again = cache.features('train')
    assert contents(tmp_path) == before
    assert all(again.by_width[width].equal(features) for width, features in first.by_width.items())


def weights(backbone, data):
    with torch.no_grad():
        backbone.conv1.weight[0, 0, 0, 0] += 1
    return data


def statistics(backbone, data):
    backbone.layer3[2].bn2['w025'].running_var[3] += 1
    return data


def size(backbone, data):
    return replace(data, size=9)


def normalisation(backbone, data):
    return replace(data, mean=(0.5,))


def crop(backbone, data):
    return replace(data, crop_pct=0.5)


def images(backbone, data):
    """Others, as many, under the same path."""
    pixels, labels = some_images('train', IMAGES)
    write_idx(Path(data.root), 'train', pixels[::-1], labels)
    return data


@pytest.mark.parametrize('change', [weights, statistics, size, normalisation, crop, images])
def test_features_of_something_else_are_computed_anew(tmp_path, accelerator, data, backbone, change):
    root = write_idx_set(tmp_path / 'idx', IMAGES, 20)
    data = replace(data, root=str(root))
    folder = tmp_path / 'features'
    first = FeatureCache(folder, accelerator, backbone, data).features('train')
    data = change(backbone, data)
    other = FeatureCache(folder, accelerator, backbone, data).features('train')
    assert len(list(folder.iterdir())) == 2
    assert not first.by_width[0.25].equal(other.by_width[0.25])


def test_some_of_the_images(tmp_path, accelerator, data, backbone):
    """A choice that stays the same, beside the whole."""
    cache = FeatureCache(tmp_path, accelerator, backbone, data)
    whole, some = cache.features('train').by_width[0.25], cache.features('train', 20)
    chosen = [int((whole == row).all(1).nonzero()[0, 0]) for row in some.by_width[0.25]]
    assert len(set(chosen)) == len(some.labels) == 20
    assert some.labels.equal(cache.features('train').labels[chosen])
    assert some.class_names == list(GARMENTS)
    assert cache.features('train', 20).by_width[0.25].equal(some.by_width[0.25])
    assert len(contents(tmp_path)) == 2
    assert len(cache.features('train', IMAGES + 1).labels) == IMAGES


def test_splits_lie_beside_each_other(tmp_path, accelerator, data, backbone):
    cache = FeatureCache(tmp_path, accelerator, backbone, data)
    assert len(cache.features('train').labels) == IMAGES
    assert len(cache.features('validation').labels) == 20
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('damage', ['cut', 'bit', 'label'])
def test_a_damaged_file_is_written_again(tmp_path, accelerator, data, backbone, capsys, damage):
    cache = FeatureCache(tmp_path, accelerator, backbone, data)
    first = cache.features('train')
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == 'label':
        tensors = load_file(path)
        tensors['labels'][0] += 1
        save_file(tensors, path)
    else:
        path.write_bytes(whole[:-10] if damage == 'cut' else whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    again = cache.features('train')
    assert path.read_bytes() == whole
    assert again.by_width[1.0].equal(first.by_width[1.0])
    assert 'computed again' in capsys.readouterr().out


def test_a_stream_is_not_divided(data, tmp_path):
    root = write_shards(tmp_path, (8,))[0].parent
    loader = eval_loader(replace(data, name='wds/', root=str(root), num_samples=8), 'train', None, 0)
    with pytest.raises(InputError, match=r'data\.name wds/, split train: a stream .*run one process'):
        loader.prepared(SimpleNamespace(num_processes=2))


def test_no_place_for_them(tmp_path, accelerator, data, backbone):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match=r'features\.cache .*file takes no files \(.*\); give another'):
        FeatureCache(tmp_path / 'file', accelerator, backbone, data).features('validation')


@pytest.mark.parametrize('kind', ['folder', 'tar', 'hfds'])
def test_other_images_of_the_same_names_are_noticed(tmp_path, accelerator, backbone, kind):
    pixels, labels = some_images('train', 30)
    root = tmp_path / kind

    def features(pixels):
        if kind == 'hfds':
            table = datasets.Dataset.from_dict({'image': list(map(Image.fromarray, pixels)), 'label': labels.tolist()})
            table.cast_column('image', datasets.Image()).to_parquet(str(root / 'train.parquet'))
        else:
            shutil.rmtree(root, ignore_errors=True)
            write_classes(root / 'train', pixels, labels % 3)
        if kind == 'tar':
            with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
                tar.add(root / 'train', arcname='.')
        name, place = {'hfds': (f'hfds/{root}', None), 'tar': ('folder', tmp_path / 'images.tar')}.get(
            kind, ('folder', root)
        )
        of = DataConfig(name=name, root=place and str(place), size=8, batch_size=16, num_workers=0)
        return FeatureCache(tmp_path / 'cache', accelerator, backbone, of).features('train').by_width[1.0]

    first, again, other = features(pixels), features(pixels), features(255 - pixels)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(features(pixels), first)


def test_hash_of_a_network(backbone):
    before = state_hash(backbone)
    assert state_hash(backbone.to(memory_format=torch.channels_last)) == before
    backbone.bn1['w100'].num_batches_tracked += 1
    assert state_hash(backbone) != before


def test_names_of_classes(tmp_path):
    pixels, labels = some_images('train', 30)
    write_classes(tmp_path / 'train', pixels, labels % 3)
    data = DataConfig(name='folder', root=str(tmp_path))
    assert eval_loader(data, 'train', None, 0).source.class_names == ['class0', 'class1', 'class2']


def test_labels_are_checked():
    check_labels(torch.tensor([0, 9]), 10, 'train', 'probe.num_classes')
    with pytest.raises(InputError, match='split train has images without a label'):
        check_labels(torch.tensor([0, -1]), 10, 'train', 'probe.num_classes')
    with pytest.raises(InputError, match=r'split val has class 10, and there are 10; give --probe\.num_classes 11'):
        check_labels(torch.tensor([0, 10]), 10, 'val', 'probe.num_classes')
