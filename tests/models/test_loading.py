"""A network saved as a folder, and opened by timm in all the ways it can be."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.models.loading import checkpoint_filter_fn
from tests.networks import randomise_batchnorm

WIDTHS = DEFAULT_WIDTHS
ABOUT = {'size': 32, 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 1.0, 'card': '# A card\n'}


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    randomise_batchnorm(model)
    return model.eval()


def images(batch=2, channels=3, size=32):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def open_folder(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    model, folder = make(), tmp_path_factory.mktemp('saved') / 'network'
    save_folder(model, folder, **ABOUT)
    return model, folder


def tampered(folder, new, change):
    """A copy of the folder whose tensors `change` has changed."""
    new.mkdir()
    (new / 'config.json').write_text((folder / 'config.json').read_text())
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, new / 'model.safetensors')
    return new


def test_what_lies_in_the_folder(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert (folder / 'README.md').read_text() == '# A card\n'
    tensors = load_file(folder / 'model.safetensors')
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'slimclr_resnet20'
    assert config['num_classes'] == 10
    assert config['model_args']['widths'] == list(WIDTHS)
    assert config['model_args']['head'] == 'switchable'
    # transformers hands `num_classes` and `model_args` on together, and a keyword twice is an error there.
    assert 'num_classes' not in config['model_args']


def test_opens_with_the_same_tensors(saved):
    model, folder = saved
    opened = open_folder(folder)
    assert opened.widths == WIDTHS
    assert opened.width == 1.0
    assert opened.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in opened.state_dict().items())
    data = timm.data.resolve_model_data_config(opened)
    assert data['input_size'] == (3, 32, 32)
    assert tuple(data['mean']) == ABOUT['mean']
    assert tuple(data['std']) == ABOUT['std']
    assert data['crop_pct'] == 1.0


@pytest.mark.parametrize('safe', [False, True, 'both'])
def test_opens_what_timm_saves(tmp_path, safe):
    """timm writes a pickle unless told otherwise."""
    model = make(widths=(1.0, 0.5), num_classes=3, in_chans=1)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    opened = open_folder(tmp_path, width=0.5)
    assert opened.widths == (1.0, 0.5)
    assert torch.equal(opened(images(channels=1)), model.forward_at(images(channels=1), 0.5))
    assert 'state_dict' not in opened.pretrained_cfg
    if safe is False:
        with pytest.raises(InputError, match='lazy=True reads safetensors'):
            open_folder(tmp_path, lazy=True)
        torch.save({'conv1.weight': torch.zeros(3)}, tmp_path / 'pytorch_model.bin')
        with pytest.raises(InputError, match='do not fit'):
            open_folder(tmp_path)


@pytest.mark.parametrize('width', WIDTHS)
def test_opens_at_a_width(saved, width):
    model, folder = saved
    opened = open_folder(folder, width=width)
    assert opened.width == width
    assert torch.equal(opened(images()), model.forward_at(images(), width))


@pytest.mark.parametrize('widths', [(0.75,), (0.25, 0.5), (1.0, 0.25)])
def test_opens_with_some_of_the_widths(saved, widths):
    """Tensors are as large as the largest width asks, and each width computes what it did."""
    model, folder = saved
    opened = open_folder(folder, widths=widths)
    assert opened.widths == tuple(sorted(widths, reverse=True))
    assert opened.conv1.weight.shape[0] == int(16 * max(widths))
    for width, output in opened.forward_widths(images()).items():
        assert torch.equal(output, model.forward_at(images(), width))


def test_opens_with_other_classes(saved):
    model, folder = saved
    opened = open_folder(folder, num_classes=7)
    assert opened(images()).shape == (2, 7)
    assert torch.equal(opened.forward_features(images()), model.forward_features(images()))
    bare = open_folder(folder, num_classes=0, width=0.5)
    with model.set_width(0.5):
        assert torch.equal(bare(images()), model.forward_head(model.forward_features(images()), pre_logits=True))


def test_opens_with_other_image_channels(saved):
    """As in timm, a convolution for grey images sums the weights over the colours."""
    model, folder = saved
    opened = open_folder(folder, in_chans=1, widths=(0.5,), width=0.5)
    torch.testing.assert_close(opened.conv1.weight, model.conv1.weight[:8].sum(1, keepdim=True))
    grey = images(channels=1)
    torch.testing.assert_close(opened(grey), model.forward_at(grey.expand(-1, 3, -1, -1), 0.5), rtol=1e-4, atol=1e-4)


def test_opens_for_features(saved):
    model, folder = saved
    opened = open_folder(folder, features_only=True, width=0.5)
    with model.set_width(0.5):
        _, *expected = model.forward_intermediates(images(), intermediates_only=True)  # without the stem's
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(opened(images()), expected, strict=True))


def test_opens_at_the_width_it_was_saved_at(tmp_path):
    model = make()
    model.set_width(0.25)
    save_folder(model, tmp_path / 'narrow', **ABOUT)
    opened = open_folder(tmp_path / 'narrow')
    assert opened.width == 0.25
    assert torch.equal(opened(images()), model(images()))
    assert torch.equal(open_folder(tmp_path / 'narrow', width=1.0)(images()), model.forward_at(images(), 1.0))


def test_keeps_kind_of_head_classes_channels_and_widths(tmp_path):
    model = make(head='slimmable', num_classes=3, in_chans=1, widths=(0.5, 0.25))
    save_folder(model, tmp_path, **{**ABOUT, 'mean': (0.1,), 'std': (0.2,)})
    opened = open_folder(tmp_path)
    assert (opened.head, opened.num_classes, opened.in_chans, opened.widths) == ('slimmable', 3, 1, (0.5, 0.25))
    grey = images(channels=1)
    for width, output in opened.forward_widths(grey).items():
        assert torch.equal(output, model.forward_at(grey, width))


def test_headless_network_gets_a_new_head(tmp_path):
    model = make(num_classes=0)
    save_folder(model, tmp_path, **ABOUT)
    assert torch.equal(open_folder(tmp_path)(images()), model(images()))
    probe = open_folder(tmp_path, num_classes=10)
    assert torch.equal(probe.forward_features(images()), model.forward_features(images()))
    assert probe(images()).shape == (2, 10)


def test_saving_again_replaces(tmp_path):
    save_folder(make(), tmp_path, **ABOUT)
    other = make(num_classes=4)
    save_folder(other, tmp_path, **{**ABOUT, 'card': '# Another\n'})
    assert torch.equal(open_folder(tmp_path)(images()), other(images()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert (tmp_path / 'README.md').read_text() == '# Another\n'


def test_saves_channels_last(tmp_path):
    model = make()
    save_folder(make().to(memory_format=torch.channels_last), tmp_path, **ABOUT)
    assert torch.equal(open_folder(tmp_path)(images()), model(images()))


def test_opens_in_a_new_process(saved, tmp_path):
    model, folder = saved
    save_file({'x': images()}, tmp_path / 'images.safetensors')
    script = f"""
import timm, slimclr_hub
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
model = timm.create_model('local-dir:{folder}', pretrained=True, width=0.5).eval()
model.set_width(0.25)
x = load_file({str(tmp_path / 'images.safetensors')!r})['x']
save_file({{'y': model(x).detach()}}, {str(tmp_path / 'output.safetensors')!r})
"""
    subprocess.run([sys.executable, '-c', script], check=True, cwd=tmp_path)
    expected = model.forward_at(images(), 0.25)
    torch.testing.assert_close(load_file(tmp_path / 'output.safetensors')['y'], expected, rtol=1e-5, atol=1e-5)


# Files that do not fit

MISSING = ['conv1.weight', 'layer2.0.conv2.weight', 'layer1.1.bn2.w025.running_mean', 'fc.w050.bias']
UNEXPECTED = ['layer1.7.conv1.weight', 'head.weight', 'layer7.0.bn1.w050.weight', 'fc.extra.weight']
MISSHAPEN = [
    ('layer2.0.conv2.weight', (28, 32, 3, 3)),
    ('layer2.0.conv2.weight', (32, 32, 5, 5)),
    ('layer1.0.bn1.w050.weight', (16,)),
    ('layer1.0.bn1.w100.bias', (15,)),
    ('fc.w050.weight', (10, 31)),
]


@pytest.mark.parametrize('name', MISSING)
def test_missing_tensor_is_named(saved, tmp_path, name):
    folder = tampered(saved[1], tmp_path / 'bad', lambda tensors: tensors.pop(name))
    with pytest.raises((ValueError, RuntimeError), match=name.replace('.', r'\.')):
        open_folder(folder)


@pytest.mark.parametrize('name', UNEXPECTED)
def test_unexpected_tensor_is_named(saved, tmp_path, name):
    folder = tampered(saved[1], tmp_path / 'bad', lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises((ValueError, RuntimeError), match=name.replace('.', r'\.')):
        open_folder(folder)


@pytest.mark.parametrize(('name', 'shape'), MISSHAPEN)
@pytest.mark.parametrize('widths', [WIDTHS, (0.5,)])
def test_misshapen_tensor_is_named(saved, tmp_path, name, shape, widths):
    if widths == (0.5,) and '.w100.' in name:
        widths = (1.0,)  # a width that is not opened is not looked at
    folder = tampered(saved[1], tmp_path / 'bad', lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises((ValueError, RuntimeError), match=name.replace('.', r'\.')):
        open_folder(folder, widths=widths, width=widths[0])


def test_file_of_a_wider_network_is_refused(saved, tmp_path):
    """Shapes in the same proportion throughout are not those of a slice: normalisation is never sliced."""
    wide = make('slimclr_resnet20x4').state_dict()
    folder = tampered(saved[1], tmp_path / 'bad', lambda tensors: tensors.update(wide))
    with pytest.raises((ValueError, RuntimeError), match=r'bn1\.w100'):
        open_folder(folder)


def test_file_without_a_width_that_is_asked_for(tmp_path):
    save_folder(make(widths=(1.0, 0.5)), tmp_path, **ABOUT)
    with pytest.raises(ValueError, match=r'missing bn1\.w025\.weight'):
        open_folder(tmp_path, widths=(1.0, 0.25))


def test_unknown_width_of_a_folder(saved):
    with pytest.raises(ValueError, match=r'0\.3.*1\.0, 0\.75, 0\.5, 0\.25'):
        open_folder(saved[1], width=0.3)


# Dense networks out of the slimmable file


@pytest.mark.parametrize(('suffix', 'width'), [('075', 0.75), ('050', 0.5), ('025', 0.25)])
def test_dense_network_from_slimmable_tensors(suffix, width):
    whole = make('slimclr_resnet50')
    dense = timm.create_model(f'slimclr_resnet50_{suffix}').eval()
    dense.load_state_dict(checkpoint_filter_fn(whole.state_dict(), dense))
    expected = whole.extract(width)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in dense.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(dense(images(1, size=64)), whole.forward_at(images(1, size=64), width))


def test_dense_network_opens_the_slimmable_file(tmp_path):
    whole, x = make('slimclr_resnet50'), images(1, size=64)
    save_folder(whole, tmp_path, **ABOUT)
    overlay = {'file': str(tmp_path / 'model.safetensors')}
    dense = timm.create_model('slimclr_resnet50_050', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    other = timm.create_model('slimclr_resnet50_050', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    with torch.inference_mode():
        assert torch.equal(dense(x), whole.forward_at(x, 0.5))
        assert torch.equal(other.eval().forward_features(x), dense.forward_features(x))


def test_dense_network_opens_its_own_file():
    dense = make('slimclr_resnet50_025')
    other = timm.create_model('slimclr_resnet50_025')
    other.load_state_dict(checkpoint_filter_fn(dense.state_dict(), other))
    assert all(torch.equal(t, dense.state_dict()[name]) for name, t in other.state_dict().items())


def test_dense_network_refuses_the_file_of_another_width():
    with pytest.raises(ValueError, match=r'bn1\.weight'):
        checkpoint_filter_fn(make('slimclr_resnet50_050').state_dict(), timm.create_model('slimclr_resnet50_025'))


def test_dense_network_names_what_is_missing():
    tensors = make('slimclr_resnet50').state_dict()
    del tensors['layer1.0.bn1.w050.weight']
    with pytest.raises(ValueError, match=r'missing layer1\.0\.bn1\.w050\.weight'):
        checkpoint_filter_fn(tensors, timm.create_model('slimclr_resnet50_050'))


def test_error_lists_some_and_counts_the_rest():
    tensors = {name: t for name, t in make().state_dict().items() if not name.startswith('layer3')}
    with pytest.raises(ValueError, match=r'missing layer3\.0\.conv1\.weight; .* and \d+ more'):
        checkpoint_filter_fn(tensors, make())
