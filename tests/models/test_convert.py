"""Checkpoints of others as they are published, converted, saved, and opened by timm: the authors' numbers come out."""

import json
import time

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.models.convert import convert
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.tensor_file import save_tensors
from tests.formula import tensor
from tests.networks import randomise_batchnorm
from tests.reference import DATA, image

WIDTHS = DEFAULT_WIDTHS
KEYS = {1.0: 'w100', 0.75: 'w075', 0.5: 'w050', 0.25: 'w025'}
DENSE = {0.75: 'slimclr_resnet50_075', 0.5: 'slimclr_resnet50_050', 0.25: 'slimclr_resnet50_025'}
FORWARD = load_file(DATA / 'forward.safetensors')
LAYOUTS = json.loads((DATA / 'checkpoint_layouts.json').read_text())
MOCOV2, MOCOV3, LINCLS = LAYOUTS
MASK_RCNN = 'mask r-cnn'
ENCODERS = {'online': ('encoder_q.', 'base_encoder.'), 'momentum': ('encoder_k.', 'momentum_encoder.')}
# Best accuracies as scripts leave them; and what optimizers and scalers leave, all of it to be read past.
BEST = {MOCOV2: 0.0, MOCOV3: torch.tensor(67.5), LINCLS: np.float64(67.5), MASK_RCNN: np.float32(36.1)}
STATE = {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': [{'lr': 0.03, 'nesterov': False}]}


class Formula(dict):
    """Authors' key -> tensor, kept for the next checkpoint."""

    def __missing__(self, entry):
        key, shape, salt = entry
        self[entry] = torch.from_numpy(tensor(key, shape, salt))
        return self[entry]


@pytest.fixture(scope='module')
def formula():
    return Formula()


def split(name):
    """Encoder and the authors' own key, without `module.`; no encoder for what belongs to the method."""
    name = name.removeprefix('module.')
    for encoder, prefixes in ENCODERS.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return encoder, name.removeprefix(prefix)
    return ('', name) if name.startswith(('queue', 'predictor')) else ('online', name)


def authors(kind, formula, online=0, momentum=1, unseen=()):
    """State dict of a published kind, its encoders filled with these salts; normalisations `unseen` never ran."""
    salts, tensors = {'online': online, 'momentum': momentum}, {}
    for name, (shape, dtype) in LAYOUTS[kind].items():
        encoder, key = split(name)
        head = key.startswith('fc.') and 'linears' not in key
        if not encoder or head:
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
        elif encoder == 'momentum' and key.endswith('num_batches_tracked') and key.split('.')[-2] in unseen:
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            tensors[name] = formula[key, tuple(shape), salts[encoder]]
        assert list(tensors[name].shape) == shape
        assert tensors[name].dtype == getattr(torch, dtype)
    return tensors


def mask_rcnn(formula):
    """State dict of the authors' detector: stages by name, widths in ascending order, and parts of its own."""
    stages = [f'layer{stage}.{i}' for stage, count in enumerate((3, 4, 6, 3), 1) for i in range(count)]
    tensors = {}
    for name, value in authors(LINCLS, formula).items():
        parts = name.removeprefix('module.').split('.')
        if parts[0] == 'fc':
            continue
        if parts[0] == 'features':
            parts[:2] = [stages[int(parts[1])]]
        if 'bn' in parts:
            parts[parts.index('bn') + 1] = str(3 - int(parts[parts.index('bn') + 1]))
        tensors['.'.join(['module.backbone', *parts]).replace('shortcut', 'downsample')] = value
    assert tensors['module.backbone.layer1.0.downsample.1.bn.0.weight'].shape == (64,)
    tensors['module.neck.lateral_convs.0.conv.weight'] = torch.zeros(256, 256, 1, 1)
    tensors['module.rpn_head.rpn_conv.weight'] = torch.zeros(256, 256, 3, 3)
    tensors['module.bbox_head.fc_cls.weight'] = torch.zeros(81, 1024)
    tensors['module.mask_head.convs.0.conv.weight'] = torch.zeros(256, 256, 3, 3)
    return tensors


def write(tensors, path, kind):
    if kind == MASK_RCNN:
        content = {'meta': {'epoch': 12, 'iter': 87960, 'mmdet_version': '0.6.0'}}
    else:
        content = {'epoch': 200, 'global_step': 1000000, 'arch': 's_resnet50', 'best_acc1': BEST[kind]}
    torch.save({**content, 'state_dict': tensors, 'optimizer': STATE}, path)
    return path


def without_module(tensors):
    return {name.removeprefix('module.'): value for name, value in tensors.items()}


@pytest.fixture(scope='module', params=[MOCOV2, MOCOV3, LINCLS, MASK_RCNN])
def converted(request, tmp_path_factory, formula):
    """A kind, its tensors by the authors' names, and the file that they were converted to by way of a real one."""
    kind, folder = request.param, tmp_path_factory.mktemp('converted')
    tensors = mask_rcnn(formula) if kind == MASK_RCNN else authors(kind, formula)
    checkpoint = write(tensors, folder / 'checkpoint.pth.tar', kind)
    save_tensors(convert(read_checkpoint(checkpoint)), folder / 'model.safetensors')
    checkpoint.unlink()
    yield kind, tensors, folder / 'model.safetensors'
    (folder / 'model.safetensors').unlink()


def open_file(path, name='slimclr_resnet50', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(path)}, **kwargs).eval()


def assert_close(output, expected):
    """To 1e-4 of the largest value, the least that two orders of summation agree on."""
    assert output.shape == expected.shape
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def assert_numbers(model, width):
    """The authors' numbers: of the probe if the network has one, and of the backbone in any case."""
    features = model.forward_head(model.forward_features(image('input', 2)), pre_logits=True)
    assert_close(features, FORWARD[f'backbone/pooled/{width}'])
    expected = FORWARD[f'lincls/out/{width}'] if model.num_classes else features
    assert_close(model(image('input', 2)), expected)


@pytest.mark.parametrize('width', WIDTHS)
def test_authors_numbers(converted, width):
    kind, _, path = converted
    assert_numbers(open_file(path, width=width, num_classes=1000 if kind == LINCLS else 0), width)


@pytest.mark.parametrize('width', DENSE)
def test_authors_numbers_of_dense_networks(converted, width):
    kind, _, path = converted
    assert_numbers(open_file(path, DENSE[width], num_classes=1000 if kind == LINCLS else 0), width)


def test_without_module(converted, tmp_path):
    kind, tensors, path = converted
    ours = convert(read_checkpoint(write(without_module(tensors), tmp_path / 'checkpoint.pth.tar', kind)))
    expected = load_file(path)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_only_the_network_is_kept(converted):
    kind, _, path = converted
    expected = timm.create_model('slimclr_resnet50', num_classes=1000 if kind == LINCLS else 0, device='meta')
    shapes = {name: value.shape for name, value in load_file(path).items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}


# The momentum encoder


@pytest.mark.parametrize('kind', [MOCOV2, MOCOV3])
def test_momentum_encoder(kind, formula, tmp_path):
    """Filled by the formula's numbers, with others in the network that was trained."""
    tensors = authors(kind, formula, online=1, momentum=0)
    save_tensors(convert(tensors, 'momentum'), tmp_path / 'momentum.safetensors')
    for width in 1.0, 0.25:
        assert_numbers(open_file(tmp_path / 'momentum.safetensors', width=width, num_classes=0), width)
    online = convert(tensors)
    assert torch.equal(online['conv1.weight'], formula['conv1.weight', (64, 3, 7, 7), 1])
    assert torch.equal(online['bn1.w050.bias'], formula['bn1.bn.2.bias', (32,), 1])


@pytest.mark.parametrize('kind', [MOCOV2, MOCOV3])
def test_momentum_encoder_without_widths_it_never_saw(kind, formula, tmp_path):
    tensors = authors(kind, formula, online=1, momentum=0, unseen=('1', '2', '3'))
    save_tensors(convert(tensors, 'momentum'), tmp_path / 'momentum.safetensors')
    assert_numbers(open_file(tmp_path / 'momentum.safetensors', widths=(1.0,), num_classes=0), 1.0)
    with pytest.raises(InputError, match=r'holds the widths 1\.0, not 0\.75, 0\.5, 0\.25'):
        open_file(tmp_path / 'momentum.safetensors', num_classes=0)
    assert {'bn1.w100.weight', 'bn1.w025.weight'} <= convert(tensors).keys()


def test_momentum_encoder_that_never_saw_anything_is_kept(formula):
    tensors = authors(MOCOV2, formula, unseen=('0', '1', '2', '3'))
    assert convert(tensors, 'momentum').keys() == convert(tensors).keys()


@pytest.mark.parametrize('kind', [LINCLS, MASK_RCNN])
def test_no_momentum_encoder(kind, formula):
    tensors = mask_rcnn(formula) if kind == MASK_RCNN else authors(kind, formula)
    with pytest.raises(InputError, match=r'no momentum network .*encoder_k\.conv1\.weight, momentum_encoder\.conv1'):
        convert(tensors, 'momentum')


def test_unknown_encoder(formula):
    with pytest.raises(InputError, match="'key' is not one of online, momentum"):
        convert(authors(LINCLS, formula), 'key')


# The authors' checkpoints that are not whole

FAULTS = {
    'features.3.conv2.weight': 'layer2.0.conv2.weight',
    'features.3.shortcut.1.bn.2.bias': 'layer2.0.downsample.1.w050.bias',
    'bn1.bn.3.running_var': 'bn1.w025.running_var',
    'bn1.bn.1.num_batches_tracked': 'bn1.w075.num_batches_tracked',
    # Those that the order of the widths is read off.
    'features.13.bn3.bn.0.weight': 'layer4.0.bn3.w100.weight',
    'features.15.bn3.bn.1.weight': 'layer4.2.bn3.w075.weight',
    'fc.linears.1.bias': 'fc.w075.bias',
    'fc.linears.2.weight': 'fc.w050.weight',
}


def test_count_of_batches_that_is_missing_is_one(formula):
    """Freezing loses it, and a normalisation with statistics has seen images."""
    tensors = authors(LINCLS, formula)
    del tensors['module.bn1.bn.1.num_batches_tracked']
    assert convert(tensors)['bn1.w075.num_batches_tracked'] == 1


@pytest.mark.parametrize('theirs', [name for name in FAULTS if not name.endswith('num_batches_tracked')])
def test_missing_tensor_is_named(formula, theirs):
    tensors = authors(LINCLS, formula)
    del tensors[f'module.{theirs}']
    with pytest.raises(InputError, match=rf'{FAULTS[theirs]} is missing$'):
        convert(tensors)


@pytest.mark.parametrize('size', [30, 5000])
@pytest.mark.parametrize('theirs', FAULTS)
def test_misshapen_tensor_is_named(formula, theirs, size):
    tensors = authors(LINCLS, formula)
    tensors[f'module.{theirs}'] = torch.zeros(size)
    with pytest.raises(InputError, match=rf'25: {FAULTS[theirs]} has shape \[{size}\], not \[[\d, ]*\]$'):
        convert(tensors)


@pytest.mark.parametrize(
    'name',
    [
        'features.3.conv4.weight',
        'features.0.se.weight',
        'features.0.bn1.bn.4.weight',
        'bn1.bn.17.running_mean',
        'fc.linears.4.weight',
        'bn2.bn.0.weight',
        'head.weight',
    ],
)
def test_unexpected_tensor_is_named(formula, name):
    tensors = {**authors(LINCLS, formula), f'module.{name}': torch.zeros(3)}
    ours = name.replace('features.3', 'layer2.0').replace('features.0.se', 'layer1.0.se').replace('bn.0', 'w100')
    with pytest.raises(InputError, match=rf'{ours} is not expected'):
        convert(tensors)


def test_two_tensors_of_one_name(formula):
    tensors = authors(LINCLS, formula)
    tensors['module.layer1.0.conv1.weight'] = tensors['module.features.0.conv1.weight']
    with pytest.raises(InputError, match=r'layer1\.0\.conv1\.weight and another tensor are both named'):
        convert(tensors)


def test_another_number_of_blocks(formula):
    tensors = {name: value for name, value in authors(LINCLS, formula).items() if '.features.15.' not in name}
    with pytest.raises(InputError, match='15 blocks; a ResNet-50, 101 or 152 has 16, 33 or 50'):
        convert(tensors)


def test_a_width_is_missing_altogether(formula):
    """A gap in the numbers is no other set of widths."""
    tensors = {name: value for name, value in authors(LINCLS, formula).items() if '.bn.1.' not in name}
    with pytest.raises(InputError, match=r'numbered \[0, 2, 3\], not from 0 on'):
        convert(tensors)


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        ({}, 'no online network that is a ResNet.*there are no tensors'),
        ({'a': torch.ones(3), 'b': torch.ones(3)}, 'no online network that is a ResNet.*begin with a, b$'),
        ({'conv1.weight': torch.ones(3)}, 'no batch normalisation'),
        ({'conv1.weight': torch.ones(3), 'layer1.0.bn1.running_mean': torch.ones(3)}, r'conv1\.weight has shape \[3\]'),
        ({'conv1.weight': torch.ones(8, 3, 3, 3), 'bn1.running_mean': torch.ones(3)}, 'not the tensors of a ResNet'),
    ],
)
def test_not_a_resnet(tensors, message):
    with pytest.raises(InputError, match=message):
        convert(tensors)


# Plain networks


def shuffle_norms(network):
    torch.manual_seed(0)
    randomise_batchnorm(network)
    return network.eval()


@pytest.fixture(scope='module')
def plain():
    """torchvision's ResNet-50, and its pooled features of two images."""
    network = shuffle_norms(torchvision.models.resnet50())
    head, network.fc = network.fc, nn.Identity()
    with torch.inference_mode():
        features = network(image('input', 2))
    network.fc = head
    return network.state_dict(), features


def from_timm(tensors):
    network = timm.create_model('resnet50')
    network.load_state_dict(tensors)
    return network.state_dict()


def from_mocov2(tensors):
    """With an MLP head, a momentum encoder of other numbers and the queue, as facebookresearch/moco saves it."""
    heads = {'fc.0.weight': (2048, 2048), 'fc.0.bias': (2048,), 'fc.2.weight': (128, 2048), 'fc.2.bias': (128,)}
    body = {name: value for name, value in tensors.items() if not name.startswith('fc.')}
    body.update({name: torch.zeros(shape) for name, shape in heads.items()})
    saved = {f'module.encoder_q.{name}': value for name, value in body.items()}
    saved.update({f'module.encoder_k.{name}': value + 1 for name, value in body.items()})
    return {**saved, 'module.queue': torch.zeros(128, 65536), 'module.queue_ptr': torch.zeros(1, dtype=torch.int64)}


def from_mocov3(tensors):
    """With a projector whose normalisations have statistics too, as facebookresearch/moco-v3 saves it."""
    body = {name: value for name, value in tensors.items() if not name.startswith('fc.')}
    body.update({'fc.0.weight': torch.zeros(4096, 2048), 'fc.3.weight': torch.zeros(256, 4096)})
    body.update({f'fc.1.{leaf}': torch.ones(4096) for leaf in ('weight', 'bias', 'running_mean', 'running_var')})
    body.update({'fc.1.num_batches_tracked': torch.tensor(3), 'fc.4.running_mean': torch.zeros(256)})
    saved = {f'module.base_encoder.{name}': value for name, value in body.items()}
    saved.update({f'module.momentum_encoder.{name}': value + 1 for name, value in body.items()})
    return {**saved, 'module.predictor.0.weight': torch.zeros(4096, 256), 'module.predictor.1.bias': torch.zeros(4096)}


PLAIN = {'torchvision': dict, 'timm': from_timm, 'MoCo v2': from_mocov2, 'MoCo v3': from_mocov3}


@pytest.mark.parametrize('kind', PLAIN)
def test_plain_network(kind, plain, tmp_path):
    """Width 1.0 is the network; the narrow widths start with the leading part of its normalisations."""
    tensors, features = plain
    torch.save({'epoch': 800, 'state_dict': PLAIN[kind](tensors)}, tmp_path / 'plain.pth.tar')
    ours = convert(read_checkpoint(tmp_path / 'plain.pth.tar'))
    save_tensors(ours, tmp_path / 'model.safetensors')
    model = open_file(tmp_path / 'model.safetensors', num_classes=0)
    with torch.inference_mode():
        assert_close(model(image('input', 2)), features)
    assert not any(name.startswith('fc.') for name in ours)
    for width, key in KEYS.items():
        for name, value in tensors.items():
            module, _, leaf = name.rpartition('.')
            if f'{module}.running_mean' not in tensors:
                continue
            part = ours[f'{module}.{key}.{leaf}']
            if leaf == 'num_batches_tracked':
                assert part == (9 if width == 1 else 0)
            else:
                assert torch.equal(part, value[: int(len(value) * width)])


@pytest.mark.parametrize('kind', ['MoCo v2', 'MoCo v3'])
def test_momentum_encoder_of_a_plain_network(kind, plain):
    """It too is a start for all widths."""
    tensors, _ = plain
    ours = convert(PLAIN[kind](tensors), 'momentum', widths=(1.0, 0.5))
    assert torch.equal(ours['conv1.weight'], tensors['conv1.weight'] + 1)
    assert torch.equal(ours['bn1.w050.bias'], tensors['bn1.bias'][:32] + 1)
    assert ours['bn1.w050.num_batches_tracked'] == 0


def test_widths_of_a_plain_network(plain):
    ours = convert(plain[0], widths=(0.6, 1.0))
    assert {name.split('.')[1] for name in ours if name.startswith('bn1.')} == {'w100', 'w060'}
    assert torch.equal(ours['bn1.w060.weight'], plain[0]['bn1.weight'][:38])
    for widths in (0.5, 0.25), ():
        with pytest.raises(InputError, match=r'lack 1\.0'):
            convert(plain[0], widths=widths)
    for width in 0.0, -0.5, 2.0, 0.33333, float('nan'):
        with pytest.raises(InputError, match=rf'width {width} '):
            convert(plain[0], widths=(1.0, width))


def test_plain_network_of_old_without_num_batches_tracked(plain):
    tensors = {name: value for name, value in plain[0].items() if not name.endswith('num_batches_tracked')}
    ours = convert(tensors)
    assert ours.keys() == convert(plain[0]).keys()
    assert ours['layer1.0.bn1.w100.num_batches_tracked'] == 1
    assert ours['layer1.0.bn1.w025.num_batches_tracked'] == 0


def test_plain_network_is_left_alone(plain):
    before = {name: value.clone() for name, value in plain[0].items()}
    for value in convert(plain[0]).values():
        if value.ndim == 1:
            value.fill_(5)
    changed = [name for name, value in plain[0].items() if not torch.equal(value, before[name])]
    assert not changed


@pytest.mark.parametrize('name', ['conv1.weight', 'layer3.5.conv3.weight', 'layer1.0.bn1.bias', 'bn1.running_mean'])
def test_missing_tensor_of_a_plain_network_is_named(plain, name):
    tensors = {key: value for key, value in plain[0].items() if key != name}
    module, _, leaf = name.rpartition('.')
    with pytest.raises(InputError, match=name if 'conv' in name else rf'{module}\.w100\.{leaf} is missing'):
        convert(tensors)


OTHERS = {
    'timm basic': (lambda: ResNet(BasicBlock, (1,) * 4), r'basic blocks \(1, 1, 1, 1\).* is none of'),  # type: ignore[arg-type]
    'torchvision wide': (lambda: torchvision.models.wide_resnet50_2(), r'layer1\.0\.conv1\.weight has shape \[128, 64'),
    'torchvision vgg': (lambda: torchvision.models.vgg11_bn(), 'not? .*a ResNet'),
    'timm resnet26': (lambda: timm.create_model('resnet26'), r'bottleneck blocks \(2, 2, 2, 2\).* is none of'),
    'timm resnet50d': (lambda: timm.create_model('resnet50d'), r'a ResNet: .*begin with conv1\.0\.weight'),
    'timm seresnet50': (lambda: timm.create_model('seresnet50'), r'layer1\.0\.se\.fc1\.weight is not expected'),
    'timm resnet50_gn': (lambda: timm.create_model('resnet50_gn'), 'no batch normalisation'),
    'ours, narrow and dense': (lambda: timm.create_model('slimclr_resnet50_025'), '16 channels in its stem.*none of'),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_networks_are_refused(kind):
    make, message = OTHERS[kind]
    with torch.device('meta'):
        tensors = {name: torch.empty(value.shape, device='cpu') for name, value in make().state_dict().items()}
    with pytest.raises(InputError, match=message):
        convert(tensors)


@pytest.mark.parametrize('encoder', ['online', 'momentum'])
def test_vision_transformer_of_mocov3_is_refused(encoder):
    vit = timm.create_model('vit_tiny_patch16_224', depth=1).state_dict()
    prefixes = 'module.base_encoder.', 'module.momentum_encoder.'
    tensors = {prefix + name: value for prefix in prefixes for name, value in vit.items()}
    with pytest.raises(InputError, match=rf'no {encoder} network that is a ResNet.*begin with base_encoder\.cls_token'):
        convert(tensors, encoder)


# Our own


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        {'num_classes': 0},
        {'head': 'slimmable', 'num_classes': 3},
        {'widths': (0.5, 0.25), 'in_chans': 1},
        {'widths': (0.6,)},
        {'widths': (0.7, 0.35), 'head': 'slimmable'},
        {'global_pool': 'catavgmax'},
    ],
)
@pytest.mark.parametrize('name', ['slimclr_resnet20', 'slimclr_resnet50'])
def test_our_own_pass_through(name, kwargs, tmp_path):
    tensors = timm.create_model(name, **kwargs).state_dict()
    torch.save({'state_dict': {f'module.{key}': value for key, value in tensors.items()}}, tmp_path / 'ours.pth')
    ours = convert(read_checkpoint(tmp_path / 'ours.pth'))
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in ours.items())


def test_backbone_of_our_own_pre_training():
    tensors = timm.create_model('slimclr_resnet20', num_classes=0).state_dict()
    saved = {f'backbone.{name}': value for name, value in tensors.items()}
    saved.update({'head.fc1.weight': torch.zeros(3), 'key_backbone.conv1.weight': torch.zeros(3)})
    assert convert(saved).keys() == tensors.keys()


def test_our_own_that_are_not_whole():
    tensors = timm.create_model('slimclr_resnet20').state_dict()
    for name in 'layer2.0.conv2.weight', 'layer1.1.bn2.w025.bias', 'fc.w050.bias':
        with pytest.raises(InputError, match=rf'{name} is missing$'):
            convert({key: value for key, value in tensors.items() if key != name})
        with pytest.raises(InputError, match=rf'{name} has shape \[7\]'):
            convert({**tensors, name: torch.zeros(7)})
    for name in 'layer2.7.conv2.weight', 'layer1.1.bn2.w060.bias', 'fc.extra.bias', 'neck.weight':
        with pytest.raises(InputError, match=r'(is not expected|is missing)'):
            convert({**tensors, name: torch.zeros(7)})


@pytest.mark.parametrize(
    'hostile',
    [
        {'layer999999999.0.conv1.weight': (1,)},
        {'layer3.999999999.conv1.weight': (1,), 'layer3.999999999.conv2.weight': (1,)},
        {'layer3.999.conv1.weight': (1,), 'layer3.999.conv2.weight': (1,)},
        {f'bn1.w0{i}.{leaf}': (1,) for i in range(1000, 9999) for leaf in ('weight', 'bias')},
        {'bn1.w00000.weight': (1,)},
        {'bn1.w999.weight': (1,)},
        {'conv1.weight': (16, 1 << 50, 3, 3)},
        {'conv1.weight': (0, 3, 3, 3)},
        {'fc.w100.weight': (1 << 50, 64)},
    ],
)
def test_size_is_bounded_by_what_a_file_holds(hostile):
    """One line in a moment, whatever names and shapes say; the shapes of strided tensors in a pickle are free."""
    tensors = dict(timm.create_model('slimclr_resnet20').state_dict())
    for name, shape in hostile.items():
        tensors[name] = torch.empty(1).as_strided(shape, [0] * len(shape))
    start = time.monotonic()
    with pytest.raises(InputError) as refused:
        convert(
            {**tensors, **{name: torch.empty(1).as_strided(shape, [0] * len(shape)) for name, shape in hostile.items()}}
        )
    assert time.monotonic() - start < 5
    assert len(str(refused.value).splitlines()) == 1


def test_tensors_are_contiguous(formula):
    """As safetensors asks for; a network may have been saved as channels_last."""
    tensors = authors(LINCLS, formula)
    last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in tensors.items()}
    ours, expected = convert(last), convert(tensors)
    assert all(value.is_contiguous() for value in ours.values())
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


# As people have them


def renamed_as_transformers(name):
    parts = name.split('.')
    words = {'conv': 'convolution', 'bn': 'normalization'}
    if len(parts) == 2:
        return f'resnet.embedder.embedder.{words[parts[0][:-1]]}.{parts[1]}'
    where = f'resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}'
    if parts[2] == 'downsample':
        return f'{where}.shortcut.{[*words.values()][int(parts[3])]}.{parts[4]}'
    return f'{where}.layer.{int(parts[2][-1]) - 1}.{words[parts[2][:-1]]}.{parts[3]}'


def renamed_as_a_sequence(name):
    numbers = {'conv1': 0, 'bn1': 1, 'layer1': 4, 'layer2': 5, 'layer3': 6, 'layer4': 7}
    first, _, rest = name.partition('.')
    return f'backbone.{numbers[first]}.{rest}'


FORMS = {
    'timm, compiled': lambda name: f'_orig_mod.{name}',
    'Lightning, compiled': lambda name: f'model._orig_mod.{name}',
    'VISSL': lambda name: f'_feature_blocks.{name}',
    'BYOL': lambda name: f'module.online_encoder.net.{name}',
    'DINO': lambda name: f'student.module.backbone.{name}',
    'SwAV': lambda name: f'module.{name}',
    'lightly': renamed_as_a_sequence,
    'transformers': renamed_as_transformers,
}


@pytest.fixture(scope='module')
def plain_resnet50():
    return timm.create_model('resnet50', num_classes=0).state_dict()


@pytest.mark.parametrize('form', FORMS)
def test_names_that_people_have(plain_resnet50, form):
    heads = ('projection_head.0.weight', 'prototypes.weight', 'module.head.mlp.weight', 'classifier.1.weight')
    tensors = {FORMS[form](name): tensor for name, tensor in plain_resnet50.items()}
    found, expected = convert({**tensors, **dict.fromkeys(heads, torch.ones(2, 2))}), convert(plain_resnet50)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_several_networks_are_named(plain_resnet50):
    both = {f'{net}.net.{name}': tensor for net in ('first', 'second') for name, tensor in plain_resnet50.items()}
    with pytest.raises(InputError, match=r'several ResNets are there, first\.net\., second\.net\.; save'):
        convert(both)


@pytest.mark.parametrize('kind', ['int32', 'bool', 'complex64', 'float8_e4m3fn', 'nan', 'inf'])
def test_values_that_are_no_weights(plain_resnet50, kind):
    weight = plain_resnet50['layer1.0.conv1.weight']
    bad = torch.full_like(weight, float(kind)) if kind in ('nan', 'inf') else weight.to(getattr(torch, kind))
    words = 'NaN or infinite' if kind in ('nan', 'inf') else kind
    with pytest.raises(InputError, match=rf'layer1\.0\.conv1\.weight .*{words}'):
        convert({**plain_resnet50, 'layer1.0.conv1.weight': bad})
