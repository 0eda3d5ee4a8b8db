"""Networks whose sub-networks do not overlap: saved and opened as folders, refused by everything else."""

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from slimclr_hub.errors import InputError
from slimclr_hub.hub.export import export_onnx, export_pt2
from slimclr_hub.hub.folder import convert_file, save_folder
from slimclr_hub.hub.formats import mmdet_config, mmdet_state_dict, save_timm_folder, torchvision_state_dict
from slimclr_hub.hub.open import open_any, open_network
from slimclr_hub.hub.push import plan_push
from tests.hub.files import save_small, small_network

WIDTHS = (1.0, 0.5, 0.25)
ABOUT: dict[str, Any] = {'size': 64, 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 1.0}


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
    with pytest.raises(InputError, match=r'do not overlap.* overlap=False and widths=\(1\.0, 0\.5, 0\.25\)'):
        open_any(str(folder), **kwargs)


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


# What they are refused by


@pytest.mark.parametrize(
    'refused',
    [
        lambda model, folder, new: save_timm_folder(model, 0.5, new),
        lambda model, folder, new: torchvision_state_dict(model),
        lambda model, folder, new: mmdet_state_dict(model, 0.5),
        lambda model, folder, new: mmdet_config(model, 0.5, 'x.pth'),
        lambda model, folder, new: export_pt2(model, new.with_suffix('.pt2'), size=32),
        lambda model, folder, new: export_onnx(model, new.with_suffix('.onnx'), size=32),
        lambda model, folder, new: convert_file(folder / 'model.safetensors', new),
        lambda model, folder, new: open_network(str(folder / 'model.safetensors')),
        lambda model, folder, new: plan_push(folder, 'me/net'),
    ],
    ids=['timm', 'torchvision', 'mmdet', 'mmdet config', 'pt2', 'onnx', 'convert', 'file', 'push'],
)
def test_refused_at_the_door(saved, tmp_path, refused):
    model, folder, _ = saved
    with pytest.raises(InputError, match=r'do not overlap \(overlap=False\).* not converted, extracted, exported or'):
        refused(model, folder, tmp_path / 'new')
    assert list(tmp_path.iterdir()) == []


def test_a_mark_that_is_not_of_these_widths(saved, tmp_path):
    _, folder, _ = saved
    tensors = {**load_file(folder / 'model.safetensors'), 'disjoint_widths': torch.zeros(2, dtype=torch.int32)}
    save_file(tensors, tmp_path / 'wrong.safetensors')
    with pytest.raises(InputError, match=r'disjoint_widths has shape \[2\], not \[3\]'):
        convert_file(tmp_path / 'wrong.safetensors', tmp_path / 'folder')
