"""One width in the formats of timm, torchvision and MMDetection, opened by these libraries."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import WIDTH, save_folder
from slimclr_hub.hub.formats import (
    mmdet_config,
    mmdet_state_dict,
    save_tensors,
    save_timm_folder,
    torchvision_state_dict,
)
from slimclr_hub.hub.open import open_network
from slimclr_hub.models import DEFAULT_WIDTHS
from tests.networks import randomise_batchnorm

WIDTHS = DEFAULT_WIDTHS
PREPROCESSING = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 1.0}
ABOUT = {'size': 64, **PREPROCESSING}


def make(name='slimclr_resnet50', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 10, **kwargs})
    model.pretrained_cfg |= {'input_size': (model.in_chans, 64, 64), **PREPROCESSING}
    randomise_batchnorm(model)
    return model.eval()


def images(batch=2, channels=3, size=64):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal_in_float64(opened, model, width, x, rtol=1e-10):
    """The same logits, and the same features but for zeros at the end, of which the number is returned."""
    opened, model, x = opened.double().eval(), copy.deepcopy(model).double(), x.double()
    with torch.no_grad(), model.set_width(width):
        maps, expected_maps = opened.forward_features(x), model.forward_features(x)
        if model.num_classes:
            logits, expected = opened.forward_head(maps), model.forward_head(expected_maps)
            torch.testing.assert_close(logits, expected, rtol=rtol, atol=rtol / 100)
        features = opened.forward_head(maps, pre_logits=True)
        expected = model.forward_head(expected_maps, pre_logits=True)
    real, spare = features.tensor_split([expected.shape[1]], dim=1)
    torch.testing.assert_close(real, expected, rtol=rtol, atol=rtol / 100)
    assert not spare.any()
    return spare.shape[1]


# timm

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'slimclr_hub':
            raise ImportError('blocked')

sys.meta_path.insert(0, Blocker())
try:
    import slimclr_hub
except ImportError as error:
    assert str(error) == 'blocked'
else:
    raise SystemExit('the blocker does not work')

import timm, torch
from safetensors.torch import load_file, save_file
outputs, x = {}, load_file('images.safetensors')['x']
for folder in sys.argv[1:]:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).double().eval()
    assert type(model) is timm.models.resnet.ResNet
    with torch.no_grad():
        outputs[folder] = model(x)
assert 'slimclr_hub' not in sys.modules
save_file(outputs, 'outputs.safetensors')
"""


def test_timm_opens_each_width_without_this_package(tmp_path):
    x, model, expected = images().double(), make(widths=(*WIDTHS, 0.6)), {}
    wide = copy.deepcopy(model).double()
    for width in model.widths:
        save_timm_folder(model, width, tmp_path / f'network-{width}')
        with torch.no_grad():
            expected[f'network-{width}'] = wide.forward_at(x, width)
    save_file({'x': x}, tmp_path / 'images.safetensors')
    subprocess.run([sys.executable, '-c', BLOCKED, *expected], cwd=tmp_path, check=True)
    torch.testing.assert_close(load_file(tmp_path / 'outputs.safetensors'), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('pool', ['avg', 'catavgmax'])
def test_open_network_takes_it_as_a_network_of_one_width(tmp_path, pool):
    """Without the channels of zeros; also where the pooled features stand side by side."""
    model, x = make(widths=(1.0, 0.8, 0.25), global_pool=pool), images()
    for width in model.widths:
        save_timm_folder(model, width, tmp_path / f'{width}')
        opened = open_network(str(tmp_path / f'{width}'), width=width, lazy=True).eval()
        assert opened.widths == (width,)
        assert opened.num_features == int(2048 * width)
        with torch.no_grad():
            torch.testing.assert_close(opened(x), model.forward_at(x, width), rtol=1e-4, atol=1e-4)
    assert opened.pretrained_cfg['mean'] == list(ABOUT['mean'])
    save_folder(opened, tmp_path / 'again', **ABOUT, card='')
    assert open_network(str(tmp_path / 'again')).widths == (0.25,)
    with pytest.raises(InputError, match=r"width 0\.5 is not one of this network's widths, 0\.25"):
        open_network(str(tmp_path / '0.25'), width=0.5)


def test_open_network_takes_dense_networks_of_ours(tmp_path):
    dense = make('slimclr_resnet50_050')
    save_for_hf(dense, tmp_path / 'dense', safe_serialization=True)
    opened, x = open_network(str(tmp_path / 'dense')).eval(), images()
    assert opened.widths == (0.5,)
    with torch.no_grad():
        torch.testing.assert_close(opened(x), dense(x), rtol=1e-4, atol=1e-4)
    save_for_hf(timm.create_model('resnet26', num_classes=2), tmp_path / 'other', safe_serialization=True)
    with pytest.raises(InputError, match='other is a resnet26, not a slimmable network'):
        open_network(str(tmp_path / 'other'))


@pytest.mark.parametrize(
    ('width', 'channels', 'spare'),
    [
        (1.0, None, 0),
        (0.5, [32, 64, 128, 256], 0),
        (0.25, [17, 32, 64, 128], 0),  # 16 would lose the first projection, but reaches no other stage
        (0.375, [24, 48, 96, 192], 0),
        (0.26, [17, 34, 67, 133], 0),
        (0.245, [17, 32, 63, 126], 3),  # 15 and a fraction: a channel more makes 16, and so yet another
        (0.8, [51, 103, 205, 410], 2),
        (0.9, [58, 115, 231, 461], 1),
    ],
)
def test_timm_folder_of_a_width(tmp_path, width, channels, spare):
    """Features are as many as the width has, or up to three more, which are zero."""
    model = make(widths=(width,))
    save_timm_folder(model, width, tmp_path / 'network')
    assert sorted(p.name for p in (tmp_path / 'network').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'network' / 'config.json').read_text())
    assert config['architecture'] == 'resnet50'
    assert config['num_classes'] == 10
    assert config['model_args'].get('channels') == channels
    assert 'num_classes' not in config['model_args']
    opened = timm.create_model(f'local-dir:{tmp_path / "network"}', pretrained=True)
    assert assert_equal_in_float64(opened, model, width, images(1)) == spare
    data = timm.data.resolve_model_data_config(opened)
    assert data['input_size'] == (3, 64, 64)
    assert tuple(data['mean']) == ABOUT['mean']
    assert tuple(data['std']) == ABOUT['std']


def test_timm_folder_holds_the_width_and_zeros(tmp_path):
    model = make(widths=(1.0, 0.25))
    save_timm_folder(model, 0.25, tmp_path)
    tensors, dense = load_file(tmp_path / 'model.safetensors'), model.extract(0.25).state_dict()
    assert tensors.keys() == dense.keys()
    for name, tensor in tensors.items():
        index = tuple(slice(n) for n in dense[name].shape)
        assert torch.equal(tensor[index], dense[name]), name
        rest = torch.ones_like(tensor, dtype=torch.bool)
        rest[index] = False
        assert (tensor[rest] == (1 if name.endswith('running_var') else 0)).all(), name


@pytest.mark.parametrize('kwargs', [{'num_classes': 0}, {'in_chans': 1, 'output_stride': 8}, {'head': 'slimmable'}])
@pytest.mark.parametrize('width', [0.8, 0.25])
def test_timm_folder_of_other_networks(tmp_path, kwargs, width):
    model = make(widths=(1.0, width), **kwargs)
    save_timm_folder(model, width, tmp_path)
    opened = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_equal_in_float64(opened, model, width, images(1, model.in_chans))


def test_timm_folder_with_two_kinds_of_pooling(tmp_path):
    """Zeros stand at the end of either half of the features."""
    model = make(widths=(0.8,), global_pool='catavgmax')
    save_timm_folder(model, 0.8, tmp_path)
    opened = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).double().eval()
    assert opened.fc.in_features == 2 * 1640
    with torch.no_grad():
        torch.testing.assert_close(opened(images().double()), model.double()(images().double()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('name', 'architecture'), [('slimclr_resnet101', 'resnet101'), ('slimclr_resnet152', 'resnet152')]
)
def test_timm_folder_of_deeper_networks(tmp_path, name, architecture):
    # Random networks of this depth explode in float32; it is float64 that is compared.
    model = make(name, widths=(0.25,))
    save_timm_folder(model, 0.25, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == architecture
    opened = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_equal_in_float64(opened, model, 0.25, images(1))


@pytest.mark.parametrize('name', ['slimclr_resnet18', 'slimclr_resnet34'])
def test_networks_of_basic_blocks(tmp_path, name):
    """timm's first block projects 64 channels of the stem to those of a width, here as the identity."""
    model, x = make(name, widths=(1.0, 0.25)), images(1)
    for width in model.widths:
        folder = tmp_path / f'{width}'
        save_timm_folder(model, width, folder)
        config = json.loads((folder / 'config.json').read_text())
        assert config['architecture'] == name.removeprefix('slimclr_')
        opened = timm.create_model(f'local-dir:{folder}', pretrained=True)
        # The square root in the identity is rounded to float32.
        assert assert_equal_in_float64(opened, model, width, x, rtol=1e-6) == 0
        again = open_network(str(folder)).eval()
        with torch.no_grad():
            assert torch.equal(again.double()(x.double()), copy.deepcopy(model).double().forward_at(x.double(), width))
    network = torchvision.models.get_model(name.removeprefix('slimclr_'), num_classes=10)
    network.load_state_dict(torchvision_state_dict(model))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), model.forward_at(x, 1.0), rtol=1e-6, atol=1e-6)
        opened.layer1[0].downsample[0].weight += 0.1
    save_for_hf(opened, tmp_path / 'trained', safe_serialization=True, model_args={'channels': (16, 32, 64, 128)})
    config = json.loads((tmp_path / 'trained' / 'config.json').read_text())
    (tmp_path / 'trained' / 'config.json').write_text(json.dumps({**config, WIDTH: 0.25}))
    with pytest.raises(InputError, match=rf'layer1\.0\.downsample.*trained, and of no {name}; open the network'):
        open_network(str(tmp_path / 'trained'))


def test_timm_folder_trains_as_the_width_does(tmp_path):
    """The zeros stay what they are: with them or without, training gives the same network."""
    model = make(widths=(0.25,))
    save_timm_folder(model, 0.25, tmp_path)
    opened = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).double()
    dense, x = model.extract(0.25).double(), images(8, size=32).double()
    for network in opened, dense:
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), torch.arange(8)).backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(x), dense.eval()(x), rtol=1e-8, atol=1e-8)
        assert not torch.equal(dense(x), model.double()(x))


def test_timm_folder_card(tmp_path):
    model = make(widths=(1.0, 0.8, 0.25))
    texts = {}
    for width in model.widths:
        save_timm_folder(model, width, tmp_path / f'network-{width}')
        texts[width] = (tmp_path / f'network-{width}' / 'README.md').read_text()
        assert f"timm.create_model('local-dir:network-{width}', pretrained=True)" in texts[width]
        assert texts[width].startswith('---\nlibrary_name: timm\n')
        assert 'import slimclr_hub' not in texts[width]
        assert str(tmp_path) not in texts[width]
    assert 'zeros' not in texts[1.0]
    needed = sum(parameter.numel() for parameter in model.extract(0.25).parameters())
    assert f'where the width\nhas {needed:,}' in texts[0.25]
    assert 'features the last' not in texts[0.25]
    assert 'Of the 1640 features the last 2 are always zero' in texts[0.8]
    save_timm_folder(model, 0.25, tmp_path / 'own', card='# A card\n')
    assert (tmp_path / 'own' / 'README.md').read_text() == '# A card\n'


def test_timm_folder_of_a_lazy_network(tmp_path):
    """A width that has not been read yet."""
    whole = make(num_classes=0)
    save_folder(whole, tmp_path / 'whole', **ABOUT, card='')
    lazy = timm.create_model(f'local-dir:{tmp_path / "whole"}', pretrained=True, width=0.25, lazy=True)
    save_timm_folder(lazy, 0.5, tmp_path / 'network')
    assert_equal_in_float64(
        timm.create_model(f'local-dir:{tmp_path / "network"}', pretrained=True), whole, 0.5, images(1)
    )


def test_origin_is_noted_of_published_weights_alone(tmp_path):
    model = make(widths=(0.25,))
    assert model.pretrained_cfg['license'] == 'other'
    for tagged in True, False:
        save_timm_folder(model, 0.25, tmp_path, tagged=tagged)
        config = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
        assert ('license: other' in (tmp_path / 'README.md').read_text()) == tagged
        assert all((key in config) == tagged for key in ('license', 'origin_url', 'tag'))
        assert config['classifier'] == 'fc'
        assert config['first_conv'] == 'conv1'


# torchvision


@pytest.mark.parametrize('num_classes', [10, 0])
def test_torchvision_loads_strictly(num_classes):
    model = make(widths=(1.0, 0.5), width=0.5, num_classes=num_classes)
    network = torchvision.models.resnet50(num_classes=10)
    if num_classes == 0:
        network.fc = nn.Identity()
    network.load_state_dict(torchvision_state_dict(model, 1.0), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images()), model.forward_at(images(), 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('kwargs', 'width', 'message'),
    [
        ({}, 0.5, r'width 0\.5.*--format timm and --format mmdet'),
        ({'in_chans': 1}, 1.0, r'1 channels.*--format timm'),
        ({'global_pool': 'max'}, 1.0, r"'max'.*--format timm"),
        ({}, 0.3, r'0\.3 is not one of'),
    ],
)
def test_what_torchvision_does_not_have(kwargs, width, message):
    with pytest.raises(InputError, match=message):
        torchvision_state_dict(make(**kwargs), width)


# MMDetection

# mmcv-lite comes without compiled operators. A ResNet uses none, but importing mmdet looks each of them up.
MMDET = """
import importlib.util, json, sys, types
sys.modules['transformers'] = None  # whose optimizers mmengine would import for seconds
if importlib.util.find_spec('mmcv._ext') is None:
    class Operators(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith('__'):
                raise AttributeError(name)
    sys.modules['mmcv._ext'] = Operators('mmcv._ext')

import torch
from mmdet.models.backbones.resnet import ResNet
from mmdet.registry import MODELS
from safetensors.torch import load_file, save_file
x, outputs = load_file('images.safetensors')['x'], {}
for file, config in json.loads(open('configs.json').read()).items():
    backbone = MODELS.build(config)
    assert type(backbone) is ResNet
    backbone.init_weights()  # loads the checkpoint; what does not fit is only a warning there
    backbone.eval()
    saved = torch.load(config['init_cfg']['checkpoint'], weights_only=True)
    assert saved.keys() == backbone.state_dict().keys()
    with torch.no_grad():
        for level, features in enumerate(backbone(x), start=1):
            outputs[f'{file}/{level}'] = features
save_file(outputs, 'outputs.safetensors')
"""


def test_mmdet_computes_the_same_features(tmp_path):
    """The feature maps C2 to C5, by MMDetection's own ResNet, built and loaded from the config."""
    expected, configs = {}, {}
    for name, widths in ('slimclr_resnet50', (1.0, 0.375)), ('slimclr_resnet18', (0.25,)):
        model = make(name, widths=widths)
        for width in widths:
            file = f'{name}-{width}.pth'
            save_tensors(mmdet_state_dict(model, width), tmp_path / file)
            configs[file] = mmdet_config(model, width, file)
            with torch.no_grad(), model.set_width(width):
                features = model.forward_intermediates(images(), indices=[1, 2, 3, 4], intermediates_only=True)
            expected |= {f'{file}/{level}': tensor for level, tensor in enumerate(features, start=1)}
    save_file({'x': images()}, tmp_path / 'images.safetensors')
    (tmp_path / 'configs.json').write_text(json.dumps(configs))
    subprocess.run([sys.executable, '-W', 'ignore', '-c', MMDET], cwd=tmp_path, check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / 'outputs.safetensors'), expected, rtol=1e-5, atol=1e-5)


def test_mmdet_config():
    model = make('slimclr_resnet101', widths=(0.5, 0.25), in_chans=1)
    assert mmdet_config(model, 0.25, 'a/b.pth') == {
        'type': 'ResNet',
        'depth': 101,
        'in_channels': 1,
        'base_channels': 16,
        'stem_channels': 16,
        'num_stages': 4,
        'out_indices': (0, 1, 2, 3),
        'norm_cfg': {'type': 'BN', 'requires_grad': True},
        'style': 'pytorch',
        'init_cfg': {'type': 'Pretrained', 'checkpoint': 'a/b.pth'},
    }
    tensors = mmdet_state_dict(model, 0.25)
    dense = model.extract(0.25).state_dict()
    assert tensors.keys() == {name for name in dense if not name.startswith('fc.')}
    assert all(torch.equal(tensor, dense[name]) for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r'b\.safetensors; save the tensors as \.pth'):
        mmdet_config(model, 0.25, 'a/b.safetensors')


@pytest.mark.parametrize(
    ('kwargs', 'width', 'message'),
    [
        ({'widths': (0.6,)}, 0.6, r'width 0\.6.*38\.4 channels.*--format timm'),
        ({'output_stride': 16}, 0.5, r'output_stride 16.*--format timm'),
        ({}, 0.3, r'0\.3 is not one of'),
    ],
)
def test_what_mmdet_does_not_have(kwargs, width, message):
    model = make(**kwargs)
    with pytest.raises(InputError, match=message):
        mmdet_state_dict(model, width)
    with pytest.raises(InputError, match=message):
        mmdet_config(model, width, 'a.pth')


# All of them


@pytest.mark.parametrize('name', ['slimclr_resnet20', 'slimclr_resnet20x4'])
def test_networks_for_small_images_are_nowhere_else(tmp_path, name):
    model = make(name)
    remedy = rf'no {name}; keep it as it is, in a folder that timm opens after `import slimclr_hub`'
    with pytest.raises(InputError, match=f'timm has resnet18.* but {remedy}'):
        save_timm_folder(model, 1.0, tmp_path / 'network')
    with pytest.raises(InputError, match='torchvision has resnet18'):
        torchvision_state_dict(model, 1.0)
    with pytest.raises(InputError, match='MMDetection has resnet18'):
        mmdet_state_dict(model, 1.0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('kwargs', [{'channels': (32, 64, 128, 256)}, {'small_stem': True}, {'layers': (2, 2, 2, 2)}])
def test_networks_of_another_shape(tmp_path, kwargs):
    with pytest.raises(InputError, match=r'timm has resnet18, resnet34, .*, but no slimclr_resnet50'):
        save_timm_folder(make(**kwargs), 1.0, tmp_path)


def test_saved_tensors(tmp_path):
    whole = torch.randn(64, 3, 100, 100)
    tensors = {
        'a': whole[:2],
        'b': whole[:2, :, :5].to(memory_format=torch.channels_last),
        'c': nn.Parameter(whole[0, 0]),
    }
    for name in 'x.safetensors', 'x.pth', 'x.pt':
        path = tmp_path / 'new' / name
        save_tensors(tensors, path)
        read = load_file(path) if path.suffix == '.safetensors' else torch.load(path, weights_only=True)
        assert type(read) is dict
        assert read.keys() == tensors.keys()
        for key, tensor in read.items():
            assert torch.equal(tensor, tensors[key])
            assert tensor.is_contiguous()
            assert type(tensor) is torch.Tensor
            assert not tensor.requires_grad
        assert path.stat().st_size < whole[:3].nbytes  # not what the views look into
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['x.pt', 'x.pth', 'x.safetensors']


def test_tensors_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    save_tensors({'a': torch.ones(2)}, tmp_path / 'x.pth')

    def interrupted(tensors, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({'a': torch.zeros(2)}, tmp_path / 'x.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']
    assert torch.equal(torch.load(tmp_path / 'x.pth')['a'], torch.ones(2))


def test_tensors_of_an_unknown_suffix(tmp_path):
    with pytest.raises(InputError, match=r'x\.bin does not end in \.safetensors, \.pth or \.pt'):
        save_tensors({}, tmp_path / 'x.bin')
