"""Networks whose sub-networks do not overlap, as folders and files, and in the formats of others."""

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from slimclr_hub.errors import InputError
from slimclr_hub.hub.conversion import convert_file
from slimclr_hub.hub.dense import mmdet_state_dict, save_timm_folder, torchvision_state_dict
from slimclr_hub.hub.export import export_pt2
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.hub.opening import open_any, open_network
from tests.hub.files import save_small, small_network

WIDTHS = (1.0, 0.5, 0.25)
ABOUT = {'size': 64, 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 1.0}


def images(batch=2, channels=3, size=32):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def arguments(folder):
    return json.loads((folder / 'config.json').read_text())['model_args']


def assert_same(opened, model, x=None):
    x = images() if x is None else x
    assert opened.widths == WIDTHS
    assert opened.overlap is False
    with torch.no_grad():
        for width in WIDTHS:
            assert torch.equal(opened.eval().forward_at(x, width), model.forward_at(x, width))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A network whose widths do not overlap, its folder, and the folder of one whose widths do."""
    home = tmp_path_factory.mktemp('networks')
    model = save_small(home / 'disjoint', widths=WIDTHS, overlap=False)
    save_small(home / 'ordinary', widths=WIDTHS, overlap=True)
    return model, home / 'disjoint', home / 'ordinary'


@pytest.fixture(scope='module')
def resnet50():
    return small_network('slimclr_resnet50', widths=WIDTHS, overlap=False, num_classes=10)


def test_folder(saved, tmp_path):
    model, folder, _ = saved
    assert arguments(folder)['overlap'] is False
    opened = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert_same(opened, model)
    assert torch.equal(opened.disjoint_widths, model.disjoint_widths)
    narrow = timm.create_model(f'local-dir:{folder}', pretrained=True, width=0.5).eval()
    with torch.no_grad():
        assert torch.equal(narrow(images()), model.forward_at(images(), 0.5))
    save_folder(opened, tmp_path / 'again', **ABOUT, card='')
    assert_same(open_network(str(tmp_path / 'again')), model)
    assert arguments(tmp_path / 'again')['overlap'] is False


def test_folder_of_widths_that_overlap(saved):
    """It is as it was before there was a choice."""
    _, _, ordinary = saved
    assert 'overlap' not in arguments(ordinary)
    assert 'disjoint_widths' not in load_file(ordinary / 'model.safetensors')
    assert open_network(str(ordinary)).overlap is True


def test_file_tells_by_itself(saved):
    model, folder, ordinary = saved
    assert_same(open_network(str(folder / 'model.safetensors')), model)
    assert open_network(str(ordinary / 'model.safetensors')).overlap is True


def test_other_classes_and_channels(saved):
    model, folder, _ = saved
    opened = open_network(str(folder), num_classes=7, in_chans=1, width=0.5).eval()
    assert opened.overlap is False
    with torch.no_grad():
        assert opened(images(channels=1)).shape == (2, 7)
        torch.testing.assert_close(opened.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
        assert torch.equal(opened.layer3[1].conv2.weight, model.layer3[1].conv2.weight)


def test_state_dict_in_the_configuration(saved):
    """timm's way to give tensors rather than a file goes through the same checks."""
    model, _, _ = saved

    def create(**kwargs):
        overlay = {'state_dict': model.state_dict()}
        return timm.create_model('slimclr_resnet20', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    assert_same(create(widths=WIDTHS, overlap=False), model)
    with pytest.raises(InputError, match='do not overlap'):
        create(widths=WIDTHS)


@pytest.mark.parametrize('kwargs', [{'widths': (1.0, 0.25)}, {'widths': (0.5,)}, {'overlap': True}])
def test_other_widths_are_refused(saved, kwargs):
    """A width has other channels where the others are other ones."""
    _, folder, _ = saved
    for name in folder, folder / 'model.safetensors':
        with pytest.raises(InputError, match=r'do not overlap.* overlap=False and widths=\(1\.0, 0\.5, 0\.25\)'):
            open_any(str(name), **kwargs)


def test_weights_that_overlap_are_refused(saved):
    _, _, ordinary = saved
    with pytest.raises(InputError, match=r'overlap=False needs weights that were trained so'):
        open_any(str(ordinary), overlap=False)


def test_lazy_is_refused(saved):
    _, folder, _ = saved
    with pytest.raises(InputError, match='with overlap=False leave lazy out'):
        open_any(str(folder), lazy=True)
    overlay = {'file': str(folder / 'model.safetensors')}
    with pytest.raises(InputError, match='do not overlap'):
        timm.create_model('slimclr_resnet20', pretrained=True, pretrained_cfg_overlay=overlay, lazy=True)


@pytest.mark.parametrize('name', ['slimclr_resnet50_050', 'slimclr_resnet50_025', 'slimclr_resnet50_075'])
def test_dense_networks_are_refused(resnet50, tmp_path, name):
    save_folder(resnet50, tmp_path / 'network', **ABOUT, card='')
    with pytest.raises(InputError, match=r'do not overlap.*`extract` gives one width'):
        timm.create_model(
            name,
            pretrained=True,
            num_classes=10,
            pretrained_cfg_overlay={'file': str(tmp_path / 'network' / 'model.safetensors')},
        )


# Formats of others


@pytest.mark.parametrize('width', WIDTHS)
def test_timm_folder(resnet50, tmp_path, width):
    save_timm_folder(resnet50, width, tmp_path / 'dense', **ABOUT)
    opened, x = timm.create_model(f'local-dir:{tmp_path / "dense"}', pretrained=True).eval(), images(size=64)
    assert 'overlap' not in arguments(tmp_path / 'dense')
    with torch.no_grad():
        torch.testing.assert_close(opened(x), resnet50.forward_at(x, width), rtol=1e-4, atol=1e-4)


def test_torchvision_and_mmdetection(resnet50):
    theirs, x = torchvision.models.resnet50(num_classes=10).eval(), images(size=64)
    theirs.load_state_dict(torchvision_state_dict(resnet50))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), resnet50(x), rtol=1e-4, atol=1e-4)
    tensors = mmdet_state_dict(resnet50, 0.5)
    assert torch.equal(tensors['layer1.0.conv2.weight'], resnet50.layer1[0].conv2.weight[16:48, 16:48])
    assert torch.equal(tensors['conv1.weight'], resnet50.conv1.weight[16:48])


def test_pt2(saved, tmp_path):
    model, folder, _ = saved
    assert export_pt2(open_network(str(folder), width=0.5), tmp_path / 'network.pt2', size=32) < 1e-5
    x = images(4)
    with torch.no_grad():
        expected = model.forward_at(x, 0.5)
        torch.testing.assert_close(torch.export.load(tmp_path / 'network.pt2').module()(x), expected)


# Conversion


@pytest.mark.parametrize('target', ['folder', 'file.safetensors'])
def test_checkpoint_of_training(saved, tmp_path, target):
    """Ours: the backbone beside other networks."""
    model, _, _ = saved
    state = {f'backbone.{name}': tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, 'head.fc1.weight': torch.zeros(3)}, tmp_path / 'run.pth')
    done = convert_file(tmp_path / 'run.pth', tmp_path / target)
    assert done.layout.overlap is False
    assert done.layout.widths == WIDTHS
    assert_same(open_network(str(tmp_path / target)), model)
    if target == 'folder':
        assert arguments(tmp_path / target)['overlap'] is False
        assert '| 0.5 |' in (tmp_path / target / 'README.md').read_text()


def test_conversion_of_widths_that_overlap(saved, tmp_path):
    _, _, ordinary = saved
    convert_file(ordinary / 'model.safetensors', tmp_path / 'folder')
    assert 'overlap' not in arguments(tmp_path / 'folder')


def test_a_mark_that_is_not_of_these_widths(saved, tmp_path):
    _, folder, _ = saved
    tensors = {**load_file(folder / 'model.safetensors'), 'disjoint_widths': torch.zeros(2, dtype=torch.int32)}
    save_file(tensors, tmp_path / 'wrong.safetensors')
    with pytest.raises(InputError, match=r'disjoint_widths has shape \[2\], not \[3\]'):
        convert_file(tmp_path / 'wrong.safetensors', tmp_path / 'folder')
    with pytest.raises(InputError, match='disjoint_widths has shape'):
        open_network(str(tmp_path / 'wrong.safetensors'))
