"""A width that was not trained, added to a network by estimating its statistics from images."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from slimclr_hub.data.sources import read_embedded
from slimclr_hub.errors import InputError
from slimclr_hub.hub.export import export_onnx
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import DEFAULT_WIDTHS, calibrate_width
from slimclr_hub.models.calibrate import is_calibrated
from slimclr_hub.weights.tensor_file import save_tensors

WIDTHS = DEFAULT_WIDTHS
NEW = 0.6
ABOUT = {'size': 28, 'mean': (0.286,), 'std': (0.353,), 'crop_pct': 1.0, 'card': '# A card\n'}
IMAGES = (torch.from_numpy(read_embedded('train')[0][:192]).float().unsqueeze(1) / 255 - 0.286) / 0.353


def make(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', layers=(1, 1, 1), zero_init_last=False, in_chans=1, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def batches(size=64, images=IMAGES):
    return list(images.split(size))


@pytest.fixture(scope='module')
def trained():
    """A network at random whose normalisations fit the images at its widths, as after training."""
    model = make()
    for width in WIDTHS:
        calibrate_width(model, width, batches())
    return model


@pytest.fixture(scope='module')
def added(trained):
    """The network with the new width, and without."""
    model = copy.deepcopy(trained)
    calibrate_width(model, NEW, batches())
    return model, trained


def test_adds_the_width(added):
    model, _ = added
    assert model.widths == (1.0, 0.75, 0.6, 0.5, 0.25)
    assert model.width == 1.0
    with model.set_width(NEW):
        assert model.num_features == 38
        assert model(IMAGES[:2]).shape == (2, 10)
    assert is_calibrated(model, NEW)
    assert torch.isfinite(model.forward_at(IMAGES[:2], NEW)).all()


def test_leaves_everything_else_alone(added):
    model, before = added
    for width, output in model.forward_widths(IMAGES[:8], WIDTHS).items():
        assert torch.equal(output, before.forward_at(IMAGES[:8], width))
    state = model.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(value, state.pop(name))
    assert all('.w060.' in name for name in state)


def test_statistics_of_the_first_layer(added):
    """Convolution of nine of sixteen channels, batch by batch: the mean of means and of unbiased variances."""
    model, _ = added
    means, variances = [], []
    with torch.no_grad():
        for images in batches():
            maps = F.conv2d(images, model.conv1.weight[:9], padding=1)
            values = maps.transpose(0, 1).reshape(9, -1)
            mean = values.sum(1) / values.shape[1]
            means.append(mean)
            variances.append(((values - mean[:, None]) ** 2).sum(1) / (values.shape[1] - 1))
    norm = model.bn1['w060']
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == len(batches()) == 3
    assert norm.momentum == 0.1


def test_batches_count_the_same_in_any_order(trained, added):
    """A cumulative mean; a moving one would count the last most."""
    model = copy.deepcopy(trained)
    calibrate_width(model, NEW, [*reversed(batches())])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, added[0].state_dict()[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def normalised(model, width):
    """Mean and variance of what each normalisation at `width` gives on the images, before its scale and shift."""
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d) and '.w060' in name}
    seen, hooks = {}, []
    for name, norm in norms.items():

        def record(norm, inputs, output, name=name):
            seen[name] = (inputs[0] - norm.running_mean[:, None, None]) / norm.running_var.sqrt()[:, None, None]

        hooks.append(norm.register_forward_hook(record))
    model.forward_at(IMAGES, width)
    for hook in hooks:
        hook.remove()
    return {name: (values.mean((0, 2, 3)), values.var((0, 2, 3))) for name, values in seen.items()}


def test_normalises(trained, added):
    """To mean 0 and variance 1 on these images, in every layer; with the next width's statistics it does not."""
    model, _ = added
    plain = copy.deepcopy(trained)
    plain.add_width(NEW)
    ours, theirs = normalised(model, NEW), normalised(plain, NEW)
    assert len(ours) == len(theirs) == 9
    for name, (mean, variance) in ours.items():
        assert mean.abs().max() < 0.05, name
        assert (variance - 1).abs().max() < 0.1, name
    # The first layer's channels are the same at both widths.
    far = [name for name, (mean, variance) in theirs.items() if max(mean.abs().max(), (variance - 1).abs().max()) > 0.3]
    assert len(far) >= 6


def test_a_width_that_is_there_is_estimated_anew():
    model = make()
    assert not is_calibrated(model, 0.5)
    calibrate_width(model, 0.5, batches())
    assert model.widths == WIDTHS
    assert is_calibrated(model, 0.5)
    assert not is_calibrated(model, 0.75)
    first = model.bn1['w050'].running_var.clone()
    calibrate_width(model, 0.5, batches(images=IMAGES * 2))
    torch.testing.assert_close(model.bn1['w050'].running_var, first * 4)


def test_new_width_begins_as_the_next_wider_one(added):
    model, _ = added
    assert torch.equal(model.layer2[0].bn2['w060'].weight, model.layer2[0].bn2['w075'].weight[:19])
    assert torch.equal(model.layer2[0].bn2['w060'].bias, model.layer2[0].bn2['w075'].bias[:19])
    assert torch.equal(model.fc['w060'].weight, model.fc['w075'].weight[:, :38])


@pytest.mark.parametrize('training', [True, False])
def test_restores_mode_and_active_width(training):
    model = make().train(training)
    model.set_width(0.25)
    model.layer1.train(not training)  # someone's frozen stage
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate_width(model, NEW, batches())
    assert model.width == 0.25
    now = {name: module.training for name, module in model.named_modules() if '.w060' not in name}
    assert {name: modes[name] for name in now} == now
    assert model.training == training


def test_no_gradients_and_no_other_statistics(trained):
    """Of a network in training too."""
    model = copy.deepcopy(trained).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tracked = []
    model.conv1.register_forward_hook(lambda module, inputs, output: tracked.append(output.requires_grad))
    calibrate_width(model, NEW, batches())
    assert tracked == [False] * len(batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_dropped(trained, added):
    """Of a network that drops paths and features in training: the statistics are those of evaluation."""
    model = make(drop_path_rate=0.5, drop_rate=0.5).train()
    model.load_state_dict(trained.state_dict())
    calibrate_width(model, NEW, batches())
    state = added[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_images_with_labels_and_generators(trained, added):
    model = copy.deepcopy(trained)
    calibrate_width(model, NEW, ([images, torch.zeros(len(images))] for images in batches()))
    state = added[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('kwargs', [{'head': 'slimmable'}, {'global_pool': 'catavgmax'}, {'num_classes': 0}])
def test_other_heads(kwargs):
    model = make(**kwargs)
    calibrate_width(model, NEW, batches())
    length = 38 * (2 if kwargs.get('global_pool') else 1)
    assert model.forward_at(IMAGES[:2], NEW).shape == (2, model.num_classes or length)
    dense = model.extract(NEW)
    assert torch.equal(dense(IMAGES[:2]), model.forward_at(IMAGES[:2], NEW))


# Saved and opened


def open_folder(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


@pytest.fixture(scope='module')
def saved(added, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'network'
    save_folder(added[0], folder, **ABOUT)
    return folder


def test_saved_and_opened(added, saved):
    model, x = added[0], IMAGES[:8]
    opened = open_folder(saved, width=NEW)
    assert opened.widths == (1.0, 0.75, 0.6, 0.5, 0.25)
    assert opened.width == NEW
    assert torch.equal(opened(x), model.forward_at(x, NEW))
    for width, output in opened.forward_widths(x).items():
        assert torch.equal(output, model.forward_at(x, width))
    alone = open_folder(saved, widths=(NEW,))
    assert torch.equal(alone(x), model.forward_at(x, NEW))
    assert alone.conv1.weight.shape[0] == 9


def test_saved_and_opened_lazily(added, saved):
    lazy, x = open_folder(saved, width=NEW, lazy=True), IMAGES[:8]
    assert lazy.held == (NEW,)
    for width in NEW, 0.5, 1.0:
        assert torch.equal(lazy.forward_at(x, width), added[0].forward_at(x, width))


@pytest.mark.parametrize('width', [0.6, 0.9, 0.3, 0.1])
def test_lazy_network(trained, tmp_path, width):
    """It reads what the next wider width needs, and no more; then it is as if it had held everything."""
    save_folder(trained, tmp_path / 'trained', **ABOUT)
    eager = open_folder(tmp_path / 'trained')
    lazy = open_folder(tmp_path / 'trained', width=0.25, lazy=True)
    for model in eager, lazy:
        calibrate_width(model, width, batches())
    wider = min(w for w in WIDTHS if w > width)
    assert lazy.held == tuple(sorted({wider, width, 0.25}, reverse=True))
    assert lazy.width == 0.25
    assert torch.equal(lazy.forward_at(IMAGES[:8], width), eager.forward_at(IMAGES[:8], width))
    save_folder(lazy, tmp_path / 'added', **ABOUT)
    opened = open_folder(tmp_path / 'added', width=width)
    assert opened.widths == eager.widths
    for name, value in opened.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name])


def test_lazy_network_at_a_width_that_it_does_not_hold(trained, tmp_path):
    save_folder(trained, tmp_path, **ABOUT)
    lazy, eager = open_folder(tmp_path, width=0.25, lazy=True), open_folder(tmp_path)
    assert is_calibrated(lazy, 0.5)
    for model in lazy, eager:
        calibrate_width(model, 0.75, batches(images=IMAGES * 2))
    assert torch.equal(lazy.forward_at(IMAGES[:8], 0.75), eager.forward_at(IMAGES[:8], 0.75))
    assert not torch.equal(eager.forward_at(IMAGES[:8], 0.75), trained.forward_at(IMAGES[:8], 0.75))


# What goes wrong


@pytest.mark.parametrize('loader', [[], iter(())])
def test_no_images(loader):
    model = make()
    with pytest.raises(InputError, match='no images'):
        calibrate_width(model, NEW, loader)
    assert model.widths == WIDTHS
    assert not any('w060' in name for name in model.state_dict())


@pytest.mark.parametrize(
    ('width', 'message'),
    [
        (0.9, r'width 0\.9 exceeds .* those of 0\.75'),
        (1.0, r'width 1 exceeds'),
        (0, r'width 0 is outside \(0, 1\]'),
        (-0.5, r'width -0\.5 is outside'),
        (1.5, r'width 1\.5 is outside'),
        (float('nan'), 'width nan is outside'),
        (0.61803, r'more than 4 decimals; give 0\.618'),
    ],
)
def test_widths_that_cannot_be(width, message):
    model = make(widths=(0.75, 0.25))
    with pytest.raises(InputError, match=message):
        calibrate_width(model, width, batches())
    assert model.widths == (0.75, 0.25)


def broken_loader():
    yield from batches()[:2]
    raise OSError('disk gone')


@pytest.mark.parametrize(
    ('loader', 'error', 'message'),
    [
        (broken_loader, OSError, 'disk gone'),
        (lambda: [*batches()[:1], [{'image': IMAGES}]], InputError, 'a batch of the loader is a list without images'),
        (lambda: [{'image': IMAGES}], InputError, 'a batch of the loader is a dict without images'),
        (lambda: [[]], InputError, 'a batch of the loader is a list without images'),
        (lambda: [*batches()[:1], torch.zeros(2, 5, 8, 8)], RuntimeError, 'channels'),
    ],
    ids=['breaks', 'list of dicts', 'dict', 'empty list', 'other channels'],
)
@pytest.mark.parametrize('width', [NEW, 0.5], ids=['new', 'old'])
def test_after_an_error_the_network_is_as_it_was(trained, added, width, loader, error, message):
    model = copy.deepcopy(trained)
    model.train()
    with pytest.raises(error, match=message):
        calibrate_width(model, width, loader())
    assert model.widths == trained.widths
    assert all(module.training for module in model.modules())
    state = model.state_dict()
    assert state.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    assert model.bn1['w050'].momentum == 0.1
    calibrate_width(model.eval(), width, batches())
    assert torch.equal(model.forward_at(IMAGES[:8], width), added[0].forward_at(IMAGES[:8], width))


# Frozen normalisations, which have no count of batches


@pytest.fixture(params=['timm', 'torchvision', 'timm freeze'])
def frozen(trained, request):
    model = copy.deepcopy(trained)
    if request.param == 'timm':
        return timm.utils.model.freeze_batch_norm_2d(model)
    if request.param == 'timm freeze':
        timm.utils.freeze(model, [name for name, _ in model.named_children()])
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                new = torchvision.ops.FrozenBatchNorm2d(child.num_features)
                new.load_state_dict(child.state_dict())
                module.add_module(name, new)
    return model


def test_frozen_network_is_extracted_saved_opened_and_exported(frozen, trained, tmp_path):
    assert not [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    for width in WIDTHS:
        assert is_calibrated(frozen, width)
        expected = trained.forward_at(IMAGES[:4], width)
        torch.testing.assert_close(frozen.forward_at(IMAGES[:4], width), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(frozen.extract(width).eval()(IMAGES[:4]), trained.extract(width)(IMAGES[:4]))
    save_folder(frozen, tmp_path / 'network', **ABOUT)
    for lazy in False, True:
        opened = timm.create_model(f'local-dir:{tmp_path / "network"}', pretrained=True, width=0.25, lazy=lazy).eval()
        for width in WIDTHS:
            assert torch.equal(opened.forward_at(IMAGES[:4], width), trained.forward_at(IMAGES[:4], width))
            assert is_calibrated(opened, width)
    assert export_onnx(frozen.extract(0.5), tmp_path / 'network.onnx', size=28).difference < 1e-4


def test_frozen_network_is_not_calibrated(frozen):
    with pytest.raises(InputError, match=r'a normalisation is frozen .*unfreeze it to calibrate a width'):
        calibrate_width(frozen, 0.5, batches())
    names = [*frozen.state_dict()]
    with pytest.raises(InputError, match=r'a normalisation is frozen .*unfreeze it to add a width'):
        calibrate_width(frozen, NEW, batches())
    assert [*frozen.state_dict()] == names
    assert frozen.widths == WIDTHS


def test_widths_as_arithmetic_gives_them(trained):
    model = copy.deepcopy(trained)
    for width in 0.2 + 2 * 0.2, 0.6, 0.5 + 1e-9:
        calibrate_width(model, width, batches())
    assert model.widths == (1.0, 0.75, 0.6, 0.5, 0.25)


def test_weights_without_counts_load(trained, tmp_path):
    """As those that were saved of a frozen network by its own `state_dict`."""
    tensors = {name: x for name, x in trained.state_dict().items() if not name.endswith('num_batches_tracked')}
    save_tensors(tensors, tmp_path / 'frozen.safetensors')
    model = make(num_classes=10)
    model.load_pretrained(tmp_path / 'frozen.safetensors')
    assert all(is_calibrated(model, width) for width in WIDTHS)
    assert torch.equal(model(IMAGES[:2]), trained(IMAGES[:2]))
    timm.utils.model.freeze_batch_norm_2d(model).load_pretrained(tmp_path / 'frozen.safetensors')
