"""A network that reads widths from its file as they are asked for: at every moment the one that holds them all."""

import copy
import os
import pickle
import random
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.weights.slices import switched_key
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors
from tests.networks import randomise_batchnorm

WIDTHS = DEFAULT_WIDTHS


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False, **kwargs)
    randomise_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias)
    return model.eval()


def images(batch=2, channels=3, size=32):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def open_file(path, name='slimclr_resnet20', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(path)}, **kwargs).eval()


def open_lazy(path, width=0.25, **kwargs):
    return open_file(path, width=width, lazy=True, **kwargs)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('lazy') / 'model.safetensors'
    save_tensors(make().state_dict(), path)
    return path


@pytest.fixture(scope='module')
def eager(path):
    return open_file(path)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def assert_equal_tensors(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert all(value.dtype == theirs[name].dtype for name, value in ours.items())


def assert_sizes_say_what_the_tensors_are(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.bias) == len(module.running_var)


# Bit for bit the network that holds everything


def test_begins_with_one_width(path, eager):
    lazy = open_lazy(path)
    assert lazy.widths == WIDTHS
    assert lazy.width == 0.25
    assert lazy.held == (0.25,)
    assert parameters(lazy) == parameters(lazy.extract(0.25))
    assert lazy.held == (0.25,)
    assert torch.equal(lazy(images()), eager.forward_at(images(), 0.25))
    assert {switched_key(name) for name in lazy.state_dict()} == {None, 'w025'}


def test_begins_with_the_largest_unless_told(path, eager):
    lazy = open_file(path, lazy=True)
    assert lazy.held == (1.0,)
    assert torch.equal(lazy(images()), eager(images()))


def random_use(lazy, eager, rng):
    """Do one of the things that ask for widths with both networks."""
    width, x = rng.choice(lazy.widths), images()
    use = rng.choice(['set_width', 'set_width', 'with', 'forward_at', 'forward_widths', 'extract', 'features'])
    if use == 'set_width':
        lazy.set_width(width), eager.set_width(width)
    elif use == 'with':
        active = lazy.width
        with lazy.set_width(width), eager.set_width(width):
            assert lazy.num_features == eager.num_features
            assert torch.equal(lazy(x), eager(x))
        assert lazy.width == active
    elif use == 'forward_at':
        assert torch.equal(lazy.forward_at(x, width), eager.forward_at(x, width))
    elif use == 'forward_widths':
        widths = rng.sample(lazy.widths, rng.randint(1, 2))
        theirs = eager.forward_widths(x, widths)
        for asked, output in lazy.forward_widths(x, widths).items():
            assert torch.equal(output, theirs[asked])
    elif use == 'extract':
        assert torch.equal(lazy.extract(width)(x), eager.forward_at(x, width))
        assert_equal_tensors(lazy.extract(width), eager.extract(width))
    else:
        ours, theirs = lazy.forward_intermediates(x), eager.forward_intermediates(x)
        assert all(torch.equal(a, b) for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True))
    assert torch.equal(lazy(x), eager(x))
    assert (lazy.width, lazy.feature_info) == (eager.width, eager.feature_info)


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_any_order_of_widths(path, width, seed):
    rng, lazy, eager = random.Random(seed), open_lazy(path, width), open_file(path, width=width)
    held = {width}
    for _ in range(20):
        random_use(lazy, eager, rng)
        assert_sizes_say_what_the_tensors_are(lazy)
        assert held <= {*lazy.held}  # what is there stays
        held = {*lazy.held}
    lazy.hold()
    assert_equal_tensors(lazy, eager)


@pytest.mark.parametrize('order', [(0.5, 1.0, 0.75), (1.0, 0.5, 0.75), (0.75, 1.0, 0.5)])
def test_holds_what_it_is_told_to(path, eager, order):
    lazy = open_lazy(path)
    for i, width in enumerate(order, start=2):
        lazy.hold([width, 0.25])
        assert len(lazy.held) == i
        assert lazy.width == 0.25
        assert lazy.conv1.weight.shape[0] == int(16 * max(lazy.held))
    assert lazy.held == WIDTHS
    assert_equal_tensors(lazy, eager)


def test_grows_only_as_far_as_it_is_asked(path):
    lazy = open_lazy(path)
    lazy.set_width(0.5)
    assert lazy.held == (0.5, 0.25)
    assert parameters(lazy) == parameters(open_file(path, widths=(0.5, 0.25)))
    before = lazy.layer3[0].conv1.weight
    lazy.set_width(0.25)
    lazy.forward_widths(images(), (0.5, 0.25))
    assert lazy.layer3[0].conv1.weight is before


def test_some_widths_of_the_file(path, eager):
    lazy = open_lazy(path, widths=(0.75, 0.25))
    assert lazy.widths == (0.75, 0.25)
    for width, output in lazy.forward_widths(images()).items():
        assert torch.equal(output, eager.forward_at(images(), width))
    with pytest.raises(InputError, match=r'0\.5 is not one of .*0\.75, 0\.25'):
        lazy.set_width(0.5)


@torch.inference_mode()
def test_resnet50(tmp_path):
    whole, x = make('slimclr_resnet50', num_classes=0), images(1, size=64)
    save_tensors(whole.state_dict(), tmp_path / 'model.safetensors')
    lazy = open_lazy(tmp_path / 'model.safetensors', name='slimclr_resnet50', num_classes=0)
    assert parameters(lazy) <= 1.6e6
    for width in 0.25, 0.75, 0.5, 1.0, 0.25:
        lazy.set_width(width)
        assert torch.equal(lazy(x), whole.forward_at(x, width))
    assert_equal_tensors(lazy, whole)


# Whatever the network is built as


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kwargs', [{}, {'out_indices': (0, 2)}])
@torch.no_grad()
def test_feature_maps(path, seed, kwargs):
    rng = random.Random(seed)
    lazy, eager = open_lazy(path, features_only=True, **kwargs), open_file(path, features_only=True, **kwargs)
    for _ in range(5):
        width = rng.choice(WIDTHS)
        lazy.set_width(width), eager.set_width(width)
        assert (lazy.width, lazy.widths) == (width, WIDTHS)
        assert lazy.feature_info.channels() == eager.feature_info.channels()
        assert lazy.feature_info.reduction() == eager.feature_info.reduction()
        maps = lazy(images())
        assert [level.shape[1] for level in maps] == lazy.feature_info.channels()
        assert all(torch.equal(a, b) for a, b in zip(maps, eager(images()), strict=True))
    lazy.model.hold()
    assert_equal_tensors(lazy, eager)


def test_features_of_the_first_level(path):
    assert parameters(open_lazy(path, features_only=True, out_indices=(0,))) == 3 * 3 * 3 * 4 + 2 * 4


@pytest.mark.parametrize('kwargs', [{'head': 'slimmable'}, {'global_pool': 'catavgmax'}, {'output_stride': 8}])
@torch.no_grad()
def test_other_networks(tmp_path, kwargs):
    path = tmp_path / 'model.safetensors'
    save_tensors(make(**kwargs).state_dict(), path)
    for seed in range(3):
        rng, lazy, eager = random.Random(seed), open_lazy(path, **kwargs), open_file(path, width=0.25, **kwargs)
        for _ in range(10):
            random_use(lazy, eager, rng)
        lazy.hold()
        assert_equal_tensors(lazy, eager)


def test_head_of_another_kind_than_the_file(path):
    """As when all widths are loaded."""
    for lazy in True, False:
        with pytest.raises(InputError, match=r'missing fc\.weight; fc\.bias'):
            open_file(path, width=0.25, head='slimmable', lazy=lazy)


@torch.no_grad()
def test_grey_images(path):
    lazy, eager = open_lazy(path, in_chans=1), open_file(path, in_chans=1)
    for width in 0.25, 0.75, 0.5, 1.0:
        assert torch.equal(lazy.forward_at(images(channels=1), width), eager.forward_at(images(channels=1), width))
    assert_equal_tensors(lazy, eager)


@pytest.mark.parametrize('kwargs', [{}, {'global_pool': 'catavgmax'}, {'head': 'slimmable'}])
@torch.no_grad()
def test_new_head(path, eager, kwargs):
    """Of other classes than the file's: each width has one, features are the file's."""
    lazy = open_lazy(path, num_classes=7, **kwargs)
    first = copy.deepcopy(lazy.fc)
    for width in 0.5, 1.0, 0.75, 0.25:
        lazy.set_width(width)
        assert lazy(images()).shape == (2, 7)
        with eager.set_width(width):
            assert torch.equal(lazy.forward_features(images()), eager.forward_features(images()))
    assert_sizes_say_what_the_tensors_are(lazy)
    if kwargs.get('head') == 'slimmable':
        assert torch.equal(lazy.fc.weight[:, :16], first.weight)
        new = [lazy.fc.weight[:, 16:]]
        assert not lazy.fc.bias.any()
    else:
        assert all(torch.equal(value, lazy.fc.state_dict()[name]) for name, value in first.state_dict().items())
        new = [lazy.fc[key].weight for key in ('w050', 'w075', 'w100')]
        assert not any(lazy.fc[key].bias.any() for key in lazy.fc)
    for weight in new:
        assert 0.008 < weight.std() < 0.012
        assert weight.mean().abs() < 0.002


def test_no_head(path, eager):
    lazy = open_lazy(path, num_classes=0)
    for width in 0.75, 0.5:
        lazy.set_width(width)
        with eager.set_width(width):
            assert torch.equal(lazy(images()), eager.forward_head(eager.forward_features(images()), pre_logits=True))


def test_head_that_is_put_in_later(path, eager):
    lazy = open_lazy(path)
    lazy.reset_classifier(10)
    lazy.set_width(0.5)
    assert lazy(images()).shape == (2, 10)
    assert not torch.equal(lazy.fc['w050'].weight, eager.fc['w050'].weight)
    with eager.set_width(0.5):
        assert torch.equal(lazy.forward_features(images()), eager.forward_features(images()))
    lazy.reset_classifier(0)
    lazy.hold()
    assert torch.equal(lazy.forward_features(images()), open_file(path, width=0.5).forward_features(images()))


# What the user has made of it


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(path, dtype):
    lazy, eager = open_lazy(path).to(dtype), open_file(path).to(dtype)
    lazy.hold()
    assert_equal_tensors(lazy, eager)
    assert torch.equal(lazy(images().to(dtype)), eager.forward_at(images().to(dtype), 0.25))


def test_keeps_channels_last(path):
    lazy = open_lazy(path).to(memory_format=torch.channels_last)
    eager = open_file(path).to(memory_format=torch.channels_last)
    lazy.hold()
    assert_equal_tensors(lazy, eager)
    convs = [parameter for parameter in lazy.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convs)
    assert not all(weight.is_contiguous() for weight in convs)
    x = images().to(memory_format=torch.channels_last)
    assert torch.equal(lazy.forward_at(x, 0.75), eager.forward_at(x, 0.75))


@pytest.mark.parametrize('training', [True, False])
def test_keeps_the_mode(path, training):
    lazy = open_lazy(path).train(training)
    lazy.hold()
    assert {module.training for module in lazy.modules()} == {training}
    before = copy.deepcopy(lazy.bn1['w050'])
    lazy.forward_at(images(), 0.5)
    assert torch.equal(before.running_mean, lazy.bn1['w050'].running_mean) != training


def test_keeps_what_is_frozen(path):
    lazy = open_lazy(path)
    lazy.requires_grad_(False)
    lazy.layer2.requires_grad_(True)
    lazy.hold()
    assert {name.split('.')[0] for name, value in lazy.named_parameters() if value.requires_grad} == {'layer2'}
    assert all(value.requires_grad for value in lazy.layer2.parameters())
    lazy.forward_at(images(), 0.75).sum().backward()
    assert lazy.layer2[0].conv1.weight.grad is not None
    assert lazy.conv1.weight.grad is None


def test_keeps_what_was_fine_tuned(path, eager):
    lazy = open_lazy(path, 0.5)
    with torch.no_grad():
        for parameter in lazy.parameters():
            parameter.add_(1)
        lazy.bn1['w050'].running_mean.fill_(3)
    output, tuned = lazy(images()), {name: value.clone() for name, value in lazy.state_dict().items()}
    lazy.hold()
    assert torch.equal(lazy(images()), output)
    whole = eager.state_dict()
    for name, value in lazy.state_dict().items():
        if name not in tuned:
            assert torch.equal(value, whole[name])  # a width that was not there
            continue
        block = tuple(slice(0, n) for n in tuned[name].shape)
        assert torch.equal(value[block], tuned[name])
        beyond = torch.ones_like(value, dtype=torch.bool)
        beyond[block] = False
        assert torch.equal(value[beyond], whole[name][beyond])


@torch.inference_mode()
def read_widths(model):
    return model.forward_widths(images())


def test_widths_that_were_read_in_inference_mode_can_be_trained(path, eager):
    lazy = open_lazy(path)
    for width, output in read_widths(lazy).items():
        assert torch.equal(output, eager.forward_at(images(), width))
    lazy.train().forward_at(images(), 0.75).sum().backward()
    assert lazy.conv1.weight.grad.abs().sum() > 0
    lazy.load_state_dict(eager.state_dict())


def test_parameters_can_be_trained_after_growth(path):
    """As those of the whole network: the same gradients."""
    lazy, eager = open_lazy(path).train(), open_file(path).train()
    lazy.hold()
    for model in lazy, eager:
        sum(output.square().sum() for output in model.forward_widths(images()).values()).backward()
    for name, parameter in lazy.named_parameters():
        assert parameter.is_leaf
        assert torch.equal(parameter.grad, eager.get_parameter(name).grad)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, by_pickle])
def test_copies_grow_by_themselves(path, eager, duplicate):
    lazy = open_lazy(path)
    other = duplicate(lazy)
    assert (other.held, other.width, other.widths) == ((0.25,), 0.25, WIDTHS)
    other.set_width(0.75)
    assert torch.equal(other(images()), eager.forward_at(images(), 0.75))
    assert lazy.held == (0.25,)
    assert torch.equal(lazy(images()), eager.forward_at(images(), 0.25))
    other.hold()
    assert_equal_tensors(other, eager)
    assert_equal_tensors(duplicate(other), eager)


def test_relative_file(path, eager, tmp_path, monkeypatch):
    """The working directory may be another one by the time a width is asked for."""
    monkeypatch.chdir(path.parent)
    lazy = open_lazy(path.name)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(lazy.forward_at(images(), 0.5), eager.forward_at(images(), 0.5))


# What goes wrong


def remove(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path):
    """The same size, other numbers."""
    other = make()
    with torch.no_grad():
        other.conv1.weight.mul_(2)
    save_tensors(other.state_dict(), path)


def touch(path):
    os.utime(path, ns=(0, 0))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize('change', [remove, truncate, rewrite, touch, replace_by_folder])
def test_file_that_was_removed_or_changed(path, eager, tmp_path, change):
    copied = tmp_path / 'model.safetensors'
    shutil.copy(path, copied)
    lazy = open_lazy(copied)
    lazy.hold([0.5])
    change(copied)
    uses = (
        lambda: lazy.set_width(0.75),
        lambda: lazy.forward_at(images(), 1.0),
        lambda: lazy.forward_widths(images()),
        lambda: lazy.extract(0.75),
        lambda: lazy.hold(),
    )
    for use in uses:
        with pytest.raises(InputError, match=rf'{copied} was removed or changed .* create the network anew'):
            use()
        assert (lazy.width, lazy.held, lazy.widths) == (0.25, (0.5, 0.25), WIDTHS)
    for width in 0.5, 0.25:
        lazy.set_width(width)
        assert torch.equal(lazy(images()), eager.forward_at(images(), width))
    assert_sizes_say_what_the_tensors_are(lazy)


def test_file_that_cannot_be_read_to_the_end(path, tmp_path):
    """Nothing of the network has changed, not even what had been read by then."""
    copied = tmp_path / 'model.safetensors'
    shutil.copy(path, copied)
    lazy = open_lazy(copied)
    before, status = {name: value.clone() for name, value in lazy.state_dict().items()}, copied.stat()
    tensors = make().state_dict()
    tensors['layer3.2.bn2.w075.runnong_mean'] = tensors.pop('layer3.2.bn2.w075.running_mean')
    save_tensors(tensors, copied)
    os.utime(copied, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copied.stat().st_size == status.st_size
    with pytest.raises((InputError, KeyError)):
        lazy.set_width(0.75)
    assert (lazy.width, lazy.held) == (0.25, (0.25,))
    after = lazy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def poisoned(name, value):
    """A file whose part outside of the narrowest width has one number that is none."""

    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def of_type(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].to(dtype)

    return change


HOSTILE = {
    'NaN in a convolution': (poisoned('layer2.0.conv1.weight', float('nan')), r'layer2\.0\.conv1\.weight holds NaN'),
    'infinity in the stem': (poisoned('conv1.weight', float('inf')), r'conv1\.weight holds NaN'),
    'NaN in a bias': (poisoned('bn1.w075.bias', float('nan')), r'bn1\.w075\.bias holds NaN'),
    'infinity in a mean': (poisoned('layer3.0.bn2.w100.running_mean', float('inf')), r'w100\.running_mean holds NaN'),
    'NaN in a head': (poisoned('fc.w050.weight', float('nan')), r'fc\.w050\.weight holds NaN'),
    'integers': (of_type('fc.w050.weight', torch.int32), r'fc\.w050\.weight is of torch\.int32'),
    'no numbers': (of_type('bn1.w100.weight', torch.bool), r'bn1\.w100\.weight is of torch\.bool'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_file_of_numbers_that_are_none(path, eager, tmp_path, case):
    """Outside of the width that is held, which stays as it was."""
    change, named = HOSTILE[case]
    tensors = make().state_dict()
    change(tensors)
    save_tensors(tensors, tmp_path / 'model.safetensors')
    lazy = open_lazy(tmp_path / 'model.safetensors')
    before = {name: value.clone() for name, value in lazy.state_dict().items()}
    with pytest.raises(InputError, match=named):
        lazy.hold()
    assert (lazy.width, lazy.held) == (0.25, (0.25,))
    assert lazy.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in lazy.state_dict().items())
    assert torch.equal(lazy(images()), eager.forward_at(images(), 0.25))


def test_file_with_another_shape_at_another_width(tmp_path):
    """Refused when it is opened, as when all widths are loaded."""
    tensors = make().state_dict()
    for name in 'bn1.w050.running_mean', 'fc.w100.weight':
        save_tensors({**tensors, name: tensors[name][..., :7]}, tmp_path / 'model.safetensors')
        for lazy in True, False:
            with pytest.raises(InputError, match=rf'{name} has shape'):
                open_file(tmp_path / 'model.safetensors', width=0.25, lazy=lazy)
    del tensors['layer1.0.bn1.w050.bias']
    save_tensors(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match=r'missing layer1\.0\.bn1\.w050\.bias'):
        open_lazy(tmp_path / 'model.safetensors')


def test_file_of_frozen_normalisations(path, eager, tmp_path):
    """They count no batches; one that is made of the file has seen one."""
    save_tensors(
        {n: t for n, t in make().state_dict().items() if 'num_batches' not in n}, tmp_path / 'frozen.safetensors'
    )
    lazy = open_lazy(tmp_path / 'frozen.safetensors')
    assert torch.equal(lazy.forward_at(images(), 0.75), eager.forward_at(images(), 0.75))
    assert {int(count) for name, count in lazy.named_buffers() if 'num_batches' in name} == {1}


def test_needs_weights():
    with pytest.raises(InputError, match=r'lazy=True .*needs pretrained=True'):
        timm.create_model('slimclr_resnet20', lazy=True, width=0.25)


def test_file_without_a_width(tmp_path):
    save_tensors(make(widths=(1.0, 0.5)).state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match=r'model\.safetensors holds the widths 1\.0, 0\.5, not 0\.75, 0\.25'):
        open_lazy(tmp_path / 'model.safetensors', 0.5)
    with pytest.raises(InputError, match=r'missing bn1\.w025'):
        open_lazy(tmp_path / 'model.safetensors', 0.25)
    assert open_lazy(tmp_path / 'model.safetensors', 0.5, widths=(1.0, 0.5)).held == (0.5,)


@pytest.mark.parametrize('width', [0.3, 0, 2.0])
def test_width_that_does_not_exist(path, width):
    with pytest.raises(InputError, match=rf'width {width} is not one of'):
        open_lazy(path, width)
    lazy = open_lazy(path)
    for use in lazy.set_width, lazy.extract, lambda width: lazy.hold([width]):
        with pytest.raises(InputError, match=rf'width {width} is not one of'):
            use(width)
    assert lazy.held == (0.25,)


def test_state_dict_instead_of_a_file():
    """timm takes one, but there is nothing to read other widths from."""
    overlay = {'state_dict': make().state_dict()}
    lazy = timm.create_model('slimclr_resnet20', pretrained=True, pretrained_cfg_overlay=overlay, lazy=True, width=0.5)
    assert torch.equal(lazy.eval()(images()), make().forward_at(images(), 0.5))
    with pytest.raises(InputError, match='not been loaded from a file'):
        lazy.set_width(1.0)
    assert lazy.width == 0.5


def test_growing_lets_go_of_the_smaller_weights(path):
    lazy = open_lazy(path).eval()
    with torch.inference_mode():
        lazy(images())
    old = weakref.ref(lazy.layer1[0].conv1.weight)
    lazy.set_width(1.0)
    assert old() is None


def test_first_passes_from_several_threads(path, eager):
    """At widths that are not there yet, while others run at one that is."""
    x, orders = images(size=8), random.Random(0)
    with torch.no_grad():
        expected = {width: eager.forward_at(x, width) for width in DEFAULT_WIDTHS}

    def run(lazy, width, start):
        start.wait()
        with torch.no_grad():
            return [lazy.forward_at(x, width) for _ in range(3)]

    with ThreadPoolExecutor(len(DEFAULT_WIDTHS)) as pool:
        for _ in range(20):
            lazy = open_lazy(path).eval()
            start = threading.Barrier(len(DEFAULT_WIDTHS))
            widths = orders.sample(DEFAULT_WIDTHS, len(DEFAULT_WIDTHS))
            for width, passes in zip(widths, pool.map(lambda w: run(lazy, w, start), widths), strict=True):  # noqa: B023
                for output in passes:
                    torch.testing.assert_close(output, expected[width])
            assert_equal_tensors(lazy, eager)
            assert_sizes_say_what_the_tensors_are(lazy)


def test_holds_all_that_it_is_told_to_or_nothing(path, tmp_path, monkeypatch):
    lazy = open_lazy(path)
    before, read = parameters(lazy), TensorFile.whole

    def fails_at_last(file, name):
        if name == 'layer3.2.bn2.w100.bias':
            raise InputError('cut')
        return read(file, name)

    monkeypatch.setattr(TensorFile, 'whole', fails_at_last)
    with pytest.raises(InputError, match='cut'):
        lazy.hold()
    assert lazy.held == (0.25,)
    assert parameters(lazy) == before
