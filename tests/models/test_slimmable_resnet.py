"""Slimmable ResNets: widths, timm's interface, and extraction of dense networks."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS, DenseResNet
from slimclr_hub.models.cost import cost
from slimclr_hub.models.layers import SlimmableConv2d, SlimmableLinear

WIDTHS = DEFAULT_WIDTHS
PARAMETERS = {1.0: 25_557_032, 0.75: 14_771_992, 0.5: 6_917_640, 0.25: 1_993_976}
MULTIPLY_ADDS = {1.0: 4.09e9, 0.75: 2.32e9, 0.5: 1.05e9, 0.25: 278e6}  # table 1 of the paper


def small(**kwargs):
    """A ResNet-20 of random weights and random statistics, in eval mode."""
    return randomise(timm.create_model('slimclr_resnet20', **kwargs)).eval()


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high, generator=generator)
    return model


def images(batch=2, size=32, channels=3, seed=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


# Widths


def test_widths_are_sorted_and_the_largest_is_active():
    model = small(widths=(0.25, 1.0, 0.5))
    assert model.widths == (1.0, 0.5, 0.25)
    assert model.width == 1.0
    assert small(width=0.5).width == 0.5


def test_set_width_switches_for_good_or_for_a_while():
    model, x = small(), images()
    wide, narrow = model.forward_at(x, 1.0), model.forward_at(x, 0.25)
    assert not torch.allclose(wide, narrow)
    assert torch.equal(model(x), wide)
    model.set_width(0.25)
    assert model.width == 0.25
    assert torch.equal(model(x), narrow)
    with model.set_width(1.0):
        assert torch.equal(model(x), wide)
        with model.set_width(0.5):
            assert model.width == 0.5
        assert model.width == 1.0
    assert model.width == 0.25


def test_set_width_switches_back_after_an_exception():
    model = small(width=0.5)
    with pytest.raises(KeyError), model.set_width(0.25):
        raise KeyError
    assert model.width == 0.5


def test_forward_at_leaves_the_active_width():
    model, x = small(width=0.5), images()
    assert not torch.equal(model.forward_at(x, 0.25), model(x))
    assert model.width == 0.5


def test_forward_widths():
    model, x = small(), images()
    outputs = model.forward_widths(x)
    assert tuple(outputs) == WIDTHS
    assert all(torch.equal(output, model.forward_at(x, width)) for width, output in outputs.items())
    assert tuple(model.forward_widths(x, [0.25, 1.0])) == (0.25, 1.0)


@pytest.mark.parametrize(
    'use',
    [
        lambda model: model.set_width(0.3),
        lambda model: model.forward_at(images(), 0.3),
        lambda model: model.forward_widths(images(), [1.0, 0.3]),
        lambda model: model.extract(0.3),
        lambda model: timm.create_model('slimclr_resnet20', width=0.3),
        lambda model: cost(model, 0.3, 32),
        lambda model: timm.create_model('slimclr_resnet20', features_only=True).set_width(0.3),  # type: ignore[operator]
    ],
    ids=['set_width', 'forward_at', 'forward_widths', 'extract', 'create_model', 'cost', 'features_only'],
)
def test_unknown_width_is_refused_with_a_list(use):
    model = small(width=0.5)
    with pytest.raises(ValueError, match=r'0\.3.*1\.0, 0\.75, 0\.5, 0\.25'):
        use(model)
    assert model.width == 0.5


@pytest.mark.parametrize('widths', [(), (0.0,), (1.5,), (-0.5, 1.0), (0.5, 0.5), (float('nan'),), (0.123456,)])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(ValueError, match='width'):
        timm.create_model('slimclr_resnet20', widths=widths)


def test_features_follow_the_width():
    model, x = small(), images()
    for width, channels in zip(
        WIDTHS, ([16, 16, 32, 64], [12, 12, 24, 48], [8, 8, 16, 32], [4, 4, 8, 16]), strict=True
    ):
        model.set_width(width)
        assert [info['num_chs'] for info in model.feature_info] == channels
        assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4]
        assert model.num_features == model.head_hidden_size == channels[-1]
        assert model.forward_features(x).shape == (2, channels[-1], 8, 8)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, channels[-1])
        assert [tuple(f.shape) for f in model.forward_intermediates(x, intermediates_only=True)] == [
            (2, c, 32 // r, 32 // r) for c, r in zip(channels, (1, 1, 2, 4), strict=True)
        ]


def test_an_individual_network_is_the_slice():
    """`widths=(0.5,)` holds tensors of half the channels, and computes what the slice of the whole network does."""
    whole, x = small(), images()
    alone = timm.create_model('slimclr_resnet20', widths=(0.5,)).eval()
    tensors = whole.state_dict()
    mine = alone.state_dict()
    alone.load_state_dict({name: tensors[name][tuple(map(slice, t.shape))].clone() for name, t in mine.items()})
    assert alone.width == 0.5
    assert alone.num_features == 32
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in whole.extract(0.5).parameters())
    assert torch.equal(alone(x), whole.forward_at(x, 0.5))


# The slimmable layers, against plain transcriptions


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('slim_in', [True, False])
def test_slimmable_convolution_against_loops(width, slim_in):
    torch.manual_seed(0)
    conv = SlimmableConv2d(8, 12, 3, stride=2, padding=1, slim_in=slim_in).double()
    rows, columns = int(12 * width), int(8 * width) if slim_in else 8
    x = torch.randn(2, columns, 5, 5, dtype=torch.double, requires_grad=True)
    output = conv(x, width)
    padded = F.pad(x.detach(), (1, 1, 1, 1))
    expected = torch.zeros(2, rows, 3, 3, dtype=torch.double)
    for n in range(2):
        for row in range(rows):
            for i in range(3):
                for j in range(3):
                    patch = padded[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                    expected[n, row, i, j] = sum((patch[c] * conv.weight[row, c]).sum() for c in range(columns))
                    expected[n, row, i, j] += conv.bias[row]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('width', WIDTHS)
def test_slimmable_convolution_against_zero_padding(width):
    """A slice is the full convolution of an input whose other channels are zero, cut off; so are its gradients."""
    torch.manual_seed(0)
    conv = SlimmableConv2d(8, 12, 3, padding=1).double()
    rows, columns = int(12 * width), int(8 * width)
    x = torch.randn(2, columns, 5, 5, dtype=torch.double, requires_grad=True)
    weights = torch.randn(2, rows, 5, 5, dtype=torch.double)

    output = conv(x, width)
    ours = torch.autograd.grad((output * weights).sum(), [x, conv.weight, conv.bias])
    zeros = torch.zeros(2, 8 - columns, 5, 5, dtype=torch.double)
    full = F.conv2d(torch.cat([x, zeros], 1), conv.weight, conv.bias, padding=1)[:, :rows]
    theirs = torch.autograd.grad((full * weights).sum(), [x, conv.weight, conv.bias])

    torch.testing.assert_close(output, full)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
    # The channels beyond the width are not touched at all.
    assert ours[1][rows:].count_nonzero() == 0
    assert ours[1][:, columns:].count_nonzero() == 0
    assert ours[1][:rows, :columns].count_nonzero() == rows * columns * 9


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('slim_out', [True, False])
def test_slimmable_linear(width, slim_out):
    torch.manual_seed(0)
    linear = SlimmableLinear(8, 12, slim_out=slim_out)
    rows, columns = int(12 * width) if slim_out else 12, int(8 * width)
    x = torch.randn(3, columns)
    expected = torch.zeros(3, rows)
    for n in range(3):
        for row in range(rows):
            expected[n, row] = sum(x[n, c] * linear.weight[row, c] for c in range(columns)) + linear.bias[row]
    torch.testing.assert_close(linear(x, width), expected)


def test_layers_round_down():
    assert SlimmableConv2d(3, 10, 1, slim_in=False)(images(channels=3), 0.25).shape[1] == 2


# timm's interface


@pytest.mark.parametrize('width', WIDTHS)
def test_features_only(width):
    x = images()
    model = randomise(timm.create_model('slimclr_resnet20', features_only=True, out_indices=(1, 3))).eval()
    plain = timm.create_model('slimclr_resnet20', num_classes=0).eval()
    plain.load_state_dict(model.model.state_dict())
    model.set_width(width)
    plain.set_width(width)
    features = model(x)
    assert model.width == width
    assert model.feature_info.channels() == [f.shape[1] for f in features] == [int(16 * width), int(64 * width)]
    assert model.feature_info.reduction() == [1, 4]
    for ours, expected in zip(features, plain.forward_intermediates(x, [1, 3], intermediates_only=True), strict=True):
        assert torch.equal(ours, expected)


def test_features_only_opens_at_a_width_and_switches_back():
    model = timm.create_model('slimclr_resnet20', features_only=True, width=0.5)
    assert model.feature_info.channels() == [8, 16, 32]
    with model.set_width(0.25):
        assert model.feature_info.channels() == [4, 8, 16]
        assert [f.shape[1] for f in model(images())] == [4, 8, 16]
    assert model.width == 0.5
    assert model.feature_info.channels() == [8, 16, 32]


@pytest.mark.parametrize('width', WIDTHS)
def test_forward_intermediates(width):
    model, x = small(width=width), images()
    final, levels = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, levels[-1])
    assert len(levels) == 4
    for indices, taken in ((2, [2, 3]), ([0], [0]), ([1, -1], [1, 3])):
        some = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        assert len(some) == len(taken)
        assert all(torch.equal(a, levels[i]) for a, i in zip(some, taken, strict=True))
    early, _ = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early, levels[1])
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
def test_reset_classifier(head):
    model, x = small(), images()
    pooled = {width: model.forward_head(model.forward_features(x), pre_logits=True) for width in WIDTHS[:1]}
    model.reset_classifier(7, head=head)
    assert model.num_classes == 7
    for width, output in model.forward_widths(x).items():
        assert output.shape == (2, 7)
        with model.set_width(width):
            features = model.forward_head(model.forward_features(x), pre_logits=True)
        weight = model.fc.weight[:, : int(64 * width)] if head == 'slimmable' else model.fc[_key(width)].weight
        assert weight.shape == (7, int(64 * width))
        torch.testing.assert_close(output, features @ weight.T)
    # The kind of head stays with the next one.
    model.reset_classifier(5)
    names = set(dict(model.fc.named_parameters()))
    assert names == (
        {'weight', 'bias'} if head == 'slimmable' else {f'{_key(w)}.{n}' for w in WIDTHS for n in ('weight', 'bias')}
    )
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled[1.0])
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))


def _key(width):
    return {1.0: 'w100', 0.75: 'w075', 0.5: 'w050', 0.25: 'w025'}[width]


def test_widths_of_linspace():
    model = timm.create_model('slimclr_resnet20', widths=np.linspace(0.2, 1, 5), num_classes=0)
    assert model.widths == (1.0, 0.8, 0.6, 0.4, 0.2)
    for width in np.linspace(0.2, 1, 5):  # 0.6000000000000001 among them
        model.set_width(width)
        assert type(model.width) is float
        assert abs(model.width - width) < 1e-12
    with pytest.raises(InputError, match=r'0\.60001 is not one of'):
        model.set_width(0.60001)


@pytest.mark.parametrize('widths', ['ab', 5, (1.0, None), ('x',), [[1.0]]])
def test_widths_that_are_no_numbers(widths):
    with pytest.raises(InputError, match=r'are no numbers; give for example widths=\(1\.0, 0\.5\)'):
        timm.create_model('slimclr_resnet20', widths=widths)


def test_head_that_is_taken_away():
    model, x = small().eval(), images()
    other = copy.deepcopy(model)
    other.fc = nn.Identity()
    model.reset_classifier(0)
    expected = model.forward_widths(x)
    assert all(torch.equal(output, expected[width]) for width, output in other.forward_widths(x).items())


@pytest.mark.parametrize(
    ('name', 'module', 'remedy'),
    [
        ('fc', nn.Linear(64, 3), r'reset_classifier\(CLASSES\)'),
        ('fc', nn.Sequential(nn.Linear(64, 3)), r'reset_classifier\(CLASSES\)'),
        ('conv1', nn.Conv2d(1, 16, 3), r'in_chans=CHANNELS'),
    ],
)
def test_layers_that_know_no_widths_are_refused(name, module, remedy):
    model, x = small().eval(), images()
    before = model(x)
    with pytest.raises(InputError, match=f'{name} cannot be a {type(module).__name__}.*{remedy}'):
        setattr(model, name, module)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    'apart',
    [
        lambda model: nn.Sequential(*model.children()),
        lambda model: nn.Sequential(*list(model.children())[1:]),
        lambda model: model.fc,
        lambda model: model.layer1,
    ],
)
def test_layers_apart_from_their_network_name_the_right_call(apart):
    with pytest.raises(InputError, match=r'without a width; .* the ordinary ones of model\.extract\(WIDTH\)'):
        apart(small(num_classes=10, head='slimmable'))(images())


def test_layers_of_an_extracted_network_are_ordinary_ones():
    dense, x = small(num_classes=10).extract(0.5), images()
    torch.testing.assert_close(nn.Sequential(*dense.children())(x), dense(x))


def test_classes_without_pooling():
    with pytest.raises(InputError, match="global_pool '' leaves 10 classes nothing to classify; give num_classes=0"):
        timm.create_model('slimclr_resnet20', num_classes=10, global_pool='')


@pytest.mark.parametrize(('pool', 'head'), [('catavgmax', 'slimmable'), ('avg', 'round'), ('mean', 'switchable')])
def test_reset_classifier_that_fails_changes_nothing(pool, head):
    model, x = small(), images()
    before, (fc, kept) = model(x), (model.fc, model.head)
    with pytest.raises((InputError, AssertionError)):
        model.reset_classifier(7, pool, head)
    assert (model.fc, model.head, model.global_pool.pool_type) == (fc, kept, 'avg')
    assert model.num_classes == before.shape[1]
    assert torch.equal(model(x), before)


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
@pytest.mark.parametrize('training', [True, False])
def test_reset_classifier_keeps_device_dtype_and_mode(head, training):
    model = timm.create_model('slimclr_resnet20').to(device='meta', dtype=torch.float64).train(training)
    for classes, pool in ((0, None), (3, 'max'), (4, None)):
        model.reset_classifier(classes, pool, head)
        assert {(t.device.type, t.dtype) for t in model.parameters()} == {('meta', torch.float64)}
        assert all(module.training == training for module in model.modules())
    assert model.global_pool.pool_type == 'max'


def test_reset_classifier_starts_as_the_head_of_a_new_network():
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20')
    model.reset_classifier(500)
    for width in WIDTHS:
        fc = model.get_classifier()[_key(width)]
        assert fc.bias.count_nonzero() == 0
        assert fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"'wide'.*'switchable', 'slimmable'"):
        timm.create_model('slimclr_resnet20', head='wide')


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet50')
    last = [norm for name, norm in model.named_modules() if name.startswith('layer') and '.bn3.w' in name]
    assert len(last) == 16 * 4
    assert all(norm.weight.count_nonzero() == 0 for norm in last)
    conv = model.layer3[0].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert all(norm.weight.eq(1).all() for norm in model.bn1.values())


@pytest.mark.parametrize('channels', [1, 4])
def test_in_chans(channels):
    model = small(in_chans=channels)
    assert model.in_chans == channels
    x = images(channels=channels)
    for width, output in model.forward_widths(x).items():
        assert output.shape == (2, 10)
        assert torch.equal(model.extract(width)(x), output)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax'])
def test_global_pool(pool):
    model, x = small(global_pool=pool, width=0.5), images()
    features = model.forward_features(x)
    avg, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = {'avg': avg, 'max': largest, 'avgmax': (avg + largest) / 2, 'catavgmax': torch.cat([avg, largest], 1)}
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, expected[pool])
    assert model.head_hidden_size == pooled.shape[1]
    assert torch.equal(model(x), F.linear(pooled, model.fc['w050'].weight, model.fc['w050'].bias))
    assert torch.equal(model.extract(0.5)(x), model(x))


def test_concatenated_pooling_has_no_slimmable_head():
    with pytest.raises(ValueError, match='catavgmax'):
        timm.create_model('slimclr_resnet20', global_pool='catavgmax', head='slimmable')


def test_drop_path_rate():
    """The rates of the blocks are those of timm's resnet50, and they do something in training alone."""
    ours = timm.create_model('slimclr_resnet50', drop_path_rate=0.3)
    theirs = timm.create_model('resnet50', drop_path_rate=0.3)

    def rates(model):
        blocks = [block for i in range(1, 5) for block in getattr(model, f'layer{i}')]
        return [0.0 if block.drop_path is None else block.drop_path.drop_prob for block in blocks]

    assert rates(ours) == pytest.approx(rates(theirs))
    assert rates(ours)[-1] == 0.3
    assert rates(ours.extract(0.5)) == pytest.approx(rates(theirs))

    model, x = small(drop_path_rate=0.9), images(8)
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        module.training = type(module).__name__ == 'DropPath'
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))


def test_drop_rate():
    model, x = small(drop_rate=0.5), images()
    assert torch.equal(model(x), model(x))
    features = model.forward_features(x)
    model.train()
    dropped = model.forward_head(features, pre_logits=True)
    pooled = features.mean((2, 3))
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * pooled[kept])


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride(output_stride):
    x = images(1, 64)
    ours = timm.create_model('slimclr_resnet50', output_stride=output_stride, num_classes=0).eval()
    theirs = timm.create_model('resnet50', output_stride=output_stride, num_classes=0).eval()
    assert [i['reduction'] for i in ours.feature_info] == [i['reduction'] for i in theirs.feature_info]
    # The same weights give the same features, so dilation and stride stand in the same places.
    theirs.load_state_dict(ours.extract(1.0).state_dict())
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        for feature, other in zip(ours.forward_intermediates(x, intermediates_only=True), expected, strict=True):
            assert feature.shape == other.shape
            torch.testing.assert_close(feature, other, rtol=1e-5, atol=1e-6)
        ours.set_width(0.25)
        for feature, other in zip(ours.forward_intermediates(x, intermediates_only=True), expected, strict=True):
            assert (feature.shape[1] * 4, *feature.shape[2:]) == other.shape[1:]
        assert torch.equal(ours.extract(0.25)(x), ours(x))


def test_impossible_output_stride_is_refused():
    for name in 'slimclr_resnet50', 'slimclr_resnet50_050':
        with pytest.raises(ValueError, match='output_stride 4'):
            timm.create_model(name, output_stride=4)


def test_grad_checkpointing_gives_equal_gradients():
    x = images(4)
    gradients = []
    for checkpointing in False, True:
        torch.manual_seed(0)
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        sum(output.square().mean() for output in model.forward_widths(x).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_prune_intermediate_layers():
    model, x = small(width=0.5), images()
    levels = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert not list(model.layer2.parameters())
    assert torch.equal(model.forward_features(x), levels[1])
    assert model.num_features == 8


# Extraction


@pytest.mark.parametrize('name', ['slimclr_resnet50', 'slimclr_resnet20'])
def test_extract_is_equal_bit_for_bit(name):
    model, x = randomise(timm.create_model(name)).eval(), images(2, 64)
    for width in WIDTHS:
        dense = model.extract(width)
        kinds = {type(module) for module in dense.modules() if list(module.parameters(recurse=False))}
        assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
        assert not dense.training
        with torch.inference_mode():
            output = dense(x)
            assert torch.equal(output, model.forward_at(x, width))
            with model.set_width(width):
                assert torch.equal(dense.forward_features(x), model.forward_features(x))
        assert output.std() > 0


def test_extract_has_timms_names():
    theirs = timm.create_model('resnet50')
    ours = timm.create_model('slimclr_resnet50')
    assert list(ours.extract(1.0).state_dict()) == list(theirs.state_dict())
    assert {k: v.shape for k, v in ours.extract(1.0).state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    for width in WIDTHS:
        assert ours.extract(width).state_dict().keys() == theirs.state_dict().keys()


def test_full_extract_runs_in_timms_resnet50():
    model, x = randomise(timm.create_model('slimclr_resnet50')).eval(), images(1, 64)
    theirs = timm.create_model('resnet50').eval()
    theirs.load_state_dict(model.extract(1.0).state_dict())
    with torch.inference_mode():
        assert torch.equal(theirs(x), model(x))


@pytest.mark.parametrize('width', WIDTHS)
def test_cost(width):
    parameters, multiply_adds = cost(timm.create_model('slimclr_resnet50'), width, 224)
    assert parameters == PARAMETERS[width]
    assert multiply_adds == pytest.approx(MULTIPLY_ADDS[width], rel=0.005)


@pytest.mark.parametrize(('suffix', 'width'), [('075', 0.75), ('050', 0.5), ('025', 0.25)])
def test_dense_networks(suffix, width):
    dense = timm.create_model(f'slimclr_resnet50_{suffix}')
    extracted = timm.create_model('slimclr_resnet50').extract(width)
    assert sum(p.numel() for p in dense.parameters()) == PARAMETERS[width]
    assert {k: v.shape for k, v in dense.state_dict().items()} == {
        k: v.shape for k, v in extracted.state_dict().items()
    }
    assert dense.num_features == extracted.num_features == int(2048 * width)


def test_extract_shares_nothing():
    model = timm.create_model('slimclr_resnet20')
    ours = {p.data_ptr() for p in model.state_dict().values()}
    for width in WIDTHS:
        dense = model.extract(width)
        assert ours.isdisjoint(t.data_ptr() for t in dense.state_dict().values())
        assert all(p.requires_grad and p.is_leaf for p in dense.parameters())


def test_extract_keeps_device_dtype_mode_and_head():
    model = timm.create_model('slimclr_resnet20', num_classes=3, drop_rate=0.1, head='slimmable', dtype=torch.float64)
    dense = model.train().extract(0.5)
    assert isinstance(dense, DenseResNet)
    assert dense.training
    assert all(p.dtype == torch.float64 for p in dense.parameters())
    assert (dense.num_classes, dense.drop_rate) == (3, 0.1)
    x = images().double()
    assert torch.equal(dense.eval()(x), model.eval().forward_at(x, 0.5))
    assert all(p.device.type == 'meta' for p in model.to('meta').extract(0.25).parameters())


def test_extract_after_removing_head_and_pool():
    model, x = small(), images()
    model.reset_classifier(0, '')
    assert torch.equal(model.extract(0.5)(x), model.forward_at(x, 0.5))


def test_extract_trains_as_the_slice_does():
    """In train mode too: outputs, gradients of the slice and running statistics."""
    model, x = small().train(), images(4)
    dense = model.extract(0.5)
    ours, theirs = model.forward_at(x, 0.5), dense(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    mine = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        source = mine[name if name in mine else '{0}.w050.{2}'.format(*name.rpartition('.'))]
        cut = source.grad[tuple(map(slice, parameter.shape))]
        torch.testing.assert_close(cut, parameter.grad, msg=name)
        assert source.grad.abs().sum() == pytest.approx(cut.abs().sum().item())  # nothing beyond the slice
    torch.testing.assert_close(model.bn1['w050'].running_var, dense.bn1.running_var)
    assert model.bn1['w100'].num_batches_tracked == 0
