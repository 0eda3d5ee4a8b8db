"""Sub-networks that do not overlap, against loops over explicit lists of channels."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError
from slimclr_hub.methods.heads import SlimmableMLP, SlimmableProjector
from slimclr_hub.models import calibrate_width
from slimclr_hub.models.layers import SlimmableConv2d, SlimmableLinear
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.models.slimmable_resnet import BasicBlock
from slimclr_hub.models.widths import channel_span, disjoint_widths
from slimclr_hub.weights import source
from tests.networks import randomise_batchnorm

WIDTHS = (1.0, 0.5, 0.25)
SETS = [
    WIDTHS,
    (1.0, 0.7, 0.2, 0.1),
    (1.0, 0.45, 0.3, 0.25),
    (0.6, 0.3, 0.2, 0.1),
    (0.75, 0.4, 0.35),
    (1.0, 0.3),
    (0.5,),
]
STAGES = {'slimclr_resnet20': (3, 3, 3), 'slimclr_resnet50': (3, 4, 6, 3)}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{'widths': WIDTHS, 'overlap': False, 'zero_init_last': False, **kwargs})
    randomise_batchnorm(model)
    return model.eval()


def images(batch=2, size=32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def own(channels, width):
    """The channels of a width of `WIDTHS`, written out; all layers have a multiple of four."""
    quarter = channels // 4
    return {1.0: [*range(channels)], 0.5: [*range(quarter, 3 * quarter)], 0.25: [*range(quarter)]}[width]


def plain(state, x, width, name):
    """The network of one width, from its state dict by plain functions; pooled features and logits."""

    def conv(name, x, stride=1):
        weight = state[f'{name}.weight']
        inputs = [0, 1, 2] if name == 'conv1' else own(weight.shape[1], width)
        weight = weight[own(weight.shape[0], width)][:, inputs]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, x):
        name = f'{name}.{ {1.0: "w100", 0.5: "w050", 0.25: "w025"}[width] }'
        mean, var, scale, shift = (
            state[f'{name}.{leaf}'][:, None, None] for leaf in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def block(name, x, stride):
        shortcut = x
        if f'{name}.downsample.0.weight' in state:
            shortcut = norm(f'{name}.downsample.1', conv(f'{name}.downsample.0', x, stride))
        strides = (1, stride, 1) if f'{name}.conv3.weight' in state else (stride, 1)
        for i, s in enumerate(strides, start=1):
            x = norm(f'{name}.bn{i}', conv(f'{name}.conv{i}', x, s))
            x = x.relu() if i < len(strides) else x
        return (x + shortcut).relu()

    large = name == 'slimclr_resnet50'
    x = norm('bn1', conv('conv1', x, 2 if large else 1)).relu()
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for stage, count in enumerate(STAGES[name], start=1):
        for i in range(count):
            x = block(f'layer{stage}.{i}', x, 2 if stage > 1 and i == 0 else 1)
    features = x.mean((2, 3))
    return features, features @ state['fc.weight'][:, own(state['fc.weight'].shape[1], width)].T + state['fc.bias']


# Channels


def test_spans():
    assert [channel_span(64, width, WIDTHS) for width in WIDTHS] == [(0, 64), (16, 48), (0, 16)]
    assert [channel_span(10, width, WIDTHS) for width in WIDTHS] == [(0, 10), (2, 7), (0, 2)]
    assert [channel_span(10, width) for width in WIDTHS] == [(0, 10), (0, 5), (0, 2)]


@pytest.mark.parametrize('widths', SETS)
def test_spans_are_beside_each_other_and_within(widths):
    """For any number of channels, in ascending order, without a gap."""
    assert disjoint_widths(reversed(widths), overlap=False) == widths
    for channels in range(1, 300):
        end = 0
        for width in reversed(widths[1:]):
            start, stop = channel_span(channels, width, widths)
            assert start == end
            assert stop - start == channel_span(channels, width)[1]
            end = stop
        assert channel_span(channels, widths[0], widths)[0] == 0
        assert end <= channel_span(channels, widths[0], widths)[1]


@pytest.mark.parametrize('widths', [(1.0, 0.75, 0.5, 0.25), (1.0, 0.6, 0.5), (0.5, 0.3, 0.25), (1.0, 0.5001, 0.5)])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(InputError, match=r'widths \(.*overlap=False.* add up to .*widths=\(1\.0, 0\.5, 0\.25\)'):
        timm.create_model('slimclr_resnet20', widths=widths, overlap=False)
    with pytest.raises(InputError, match='overlap=False'):
        SlimmableMLP(8, 8, 4, widths=widths, overlap=False)
    with pytest.raises(InputError, match='overlap=False'):
        SlimmableProjector(8, 8, 4, widths, overlap=False)


def test_default_widths_are_refused():
    with pytest.raises(InputError, match=r'add up to 1\.5, more than 1'):
        timm.create_model('slimclr_resnet50', overlap=False)


# Layers


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('slim_in', [True, False])
def test_convolution_against_loops(width, slim_in):
    torch.manual_seed(0)
    conv = SlimmableConv2d(8, 12, 3, padding=1, disjoint=WIDTHS, slim_in=slim_in).double()
    outputs, inputs = own(12, width), own(8, width) if slim_in else [*range(8)]
    x = images(2, 6, len(inputs)).double()
    padded = F.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(2, len(outputs), 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            for o, row in enumerate(outputs):
                window = padded[:, :, i : i + 3, j : j + 3]
                weight = torch.stack([conv.weight[row, column] for column in inputs])
                expected[:, o, i, j] = (window * weight).sum((1, 2, 3)) + conv.bias[row]
    torch.testing.assert_close(conv(x, width), expected)


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize(('slim_in', 'slim_out'), [(True, True), (True, False), (False, True)])
def test_linear_against_loops(width, slim_in, slim_out):
    torch.manual_seed(0)
    linear = SlimmableLinear(8, 12, disjoint=WIDTHS, slim_in=slim_in, slim_out=slim_out)
    outputs, inputs = own(12, width if slim_out else 1.0), own(8, width if slim_in else 1.0)
    x = torch.randn(3, len(inputs))
    expected = torch.stack(
        [sum(x[:, i] * linear.weight[row, c] for i, c in enumerate(inputs)) + linear.bias[row] for row in outputs], 1
    )
    torch.testing.assert_close(linear(x, width), expected)


def test_a_layer_refuses_other_widths():
    """They would be slices of nothing that was trained."""
    with pytest.raises(InputError, match=r'width 0\.3 .*1\.0, 0\.5, 0\.25'):
        SlimmableLinear(8, 12, disjoint=WIDTHS)(torch.randn(1, 2), 0.3)


# Networks


@pytest.mark.parametrize(('name', 'size'), [('slimclr_resnet20', 32), ('slimclr_resnet50', 32)])
def test_forward_against_plain_functions(name, size):
    model, x = make(name, head='slimmable', num_classes=5).double(), images(2, size).double()
    with torch.no_grad():
        outputs = model.forward_widths(x)
        assert list(outputs) == list(WIDTHS)
        for width in WIDTHS:
            features, logits = plain(model.state_dict(), x, width, name)
            torch.testing.assert_close(model.forward_at(x, width), logits)
            torch.testing.assert_close(outputs[width], logits)
            with model.set_width(width):
                torch.testing.assert_close(model(x), logits)
                assert model.num_features == features.shape[1]
                torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features)


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
@pytest.mark.parametrize(('name', 'size'), [('slimclr_resnet20', 32), ('slimclr_resnet50', 32)])
def test_extract_is_equal_bit_for_bit(name, size, head):
    model, x = make(name, head=head, num_classes=5), images(2, size)
    with torch.no_grad():
        for width in WIDTHS:
            assert torch.equal(model.extract(width)(x), model.forward_at(x, width))


@pytest.mark.parametrize('widths', SETS)
def test_extract_at_widths_that_are_rounded(widths):
    model, x = make(widths=widths, head='slimmable'), images()
    with torch.no_grad():
        for width in widths:
            assert torch.equal(model.extract(width)(x), model.forward_at(x, width))


def test_the_largest_width_is_as_ever():
    """With the same tensors a network whose widths overlap has the same largest sub-network, and others below it."""
    model, x = make(), images()
    other = make(overlap=True)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(model.forward_at(x, 1.0), other.forward_at(x, 1.0))
        assert torch.equal(model.forward_at(x, 0.25), other.forward_at(x, 0.25))
        assert not torch.allclose(model.forward_at(x, 0.5), other.forward_at(x, 0.5))


def touched(module, output):
    """Name -> where the gradient of an output is not zero, for tensors that widths share."""
    module.zero_grad()
    output.square().mean().backward()
    slim = [name for name, layer in module.named_modules() if isinstance(layer, SlimmableConv2d | SlimmableLinear)]
    return {name: module.get_parameter(f'{name}.weight').grad != 0 for name in slim}


@pytest.mark.parametrize(('name', 'size'), [('slimclr_resnet20', 32), ('slimclr_resnet50', 32)])
def test_gradients_are_disjoint(name, size):
    model, x = make(name, head='slimmable', num_classes=5).train(), images(2, size)
    masks = {width: touched(model, model.forward_at(x, width)) for width in WIDTHS}
    for layer, narrow in masks[0.25].items():
        for width in 0.25, 0.5:
            mask = masks[width][layer]
            rows = range(5) if layer == 'fc' else own(mask.shape[0], width)
            columns = range(3) if layer == 'conv1' else own(mask.shape[1], width)
            allowed = torch.zeros_like(mask)
            for row in rows:
                allowed[row, [*columns]] = True
            assert mask.any(), layer
            assert not (mask & ~allowed).any(), layer
        assert not (narrow & masks[0.5][layer]).any(), layer


def test_gradients_are_those_of_the_extracted_network():
    model, x = make().double().train(), images(4).double()
    dense = model.extract(0.5)
    for network, output in (model, model.forward_at(x, 0.5)), (dense, dense(x)):
        network.zero_grad()
        output.square().mean().backward()
    grad = model.layer2[0].conv1.weight.grad
    torch.testing.assert_close(grad[8:24, 4:12], dense.layer2[0].conv1.weight.grad)
    assert grad.count_nonzero() == grad[8:24, 4:12].count_nonzero() > 0


def test_a_step_of_one_width_leaves_the_others():
    """Of the outputs only those of the width that was trained and of the largest change."""
    model, x = make(head='slimmable', num_classes=0), images()
    with torch.no_grad():
        before = model.forward_widths(x)
    model.forward_at(x, 0.5).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1).step()
    with torch.no_grad():
        after = model.forward_widths(x)
    assert torch.equal(after[0.25], before[0.25])
    assert not torch.equal(after[0.5], before[0.5])
    assert not torch.equal(after[1.0], before[1.0])


def test_copies_features_and_new_heads():
    model, x = make(), images()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).forward_at(x, 0.5), model.forward_at(x, 0.5))
        getter = make(features_only=True)
        with getter.set_width(0.5):
            maps = getter(x)
            assert [m.shape[1] for m in maps] == [8, 16, 32]
        with model.set_width(0.5):
            torch.testing.assert_close(maps, model.forward_intermediates(x, intermediates_only=True)[1:])
        model.reset_classifier(7, head='slimmable')
        assert torch.equal(model.extract(0.5)(x), model.forward_at(x, 0.5))
        strided = make(output_stride=8, in_chans=1)
        assert torch.equal(strided.extract(0.5)(x[:, :1]), strided.forward_at(x[:, :1], 0.5))


def test_width_that_has_been_seen_is_estimated_anew():
    model, x = make(), images(8)
    before = model.forward_at(x, 0.25)
    calibrate_width(model, 0.5, [x])
    torch.testing.assert_close(
        model.bn1.w050.running_mean, F.conv2d(x, model.conv1.weight[4:12], padding=1).mean((0, 2, 3))
    )
    assert torch.equal(model.forward_at(x, 0.25), before)


# Compilers


def test_compile_all_widths_of_a_training_step():
    eager, x = make(layers=(1, 1, 1)).train(), images(4)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other.forward_widths, fullgraph=True, backend='aot_eager')
    outputs = [eager.forward_widths(x), compiled(x)]
    for output in outputs:
        sum(value.square().mean() for value in output.values()).backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (name, ours), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('overlap', [True, False])
def test_a_full_slice_is_no_slice(overlap):
    """And a narrow one costs as much as ever: two for the weights of a layer, one for the stem's."""
    model = make(overlap=overlap, layers=(1, 1, 1))
    convolutions = sum(isinstance(module, SlimmableConv2d) for module in model.modules())
    for width, expected in (1.0, 0), (0.25, 2 * convolutions - 1):
        model.set_width(width)
        graph = torch.export.export(model, (images(),)).run_decompositions().graph
        sliced = [node for node in graph.nodes if 'slice' in str(node.target)]
        spans = [(node.args[2], node.args[3], node.args[0].meta['val'].shape[node.args[1]]) for node in sliced]
        assert sum((start, stop) != (0, size) for start, stop, size in spans) == expected


# Tensors by name


def test_state_dict_tells():
    """Nothing that overlaps takes these weights for its own, and nothing is added where widths overlap."""
    model, other = make(), make(overlap=True)
    assert model.overlap is False
    assert other.overlap is True
    assert model.state_dict().keys() - other.state_dict().keys() == {'disjoint_widths'}
    assert other.state_dict().keys() <= model.state_dict().keys()
    assert model.half().disjoint_widths.tolist() == [10000, 5000, 2500]
    assert 'disjoint_widths' not in model.extract(0.5).state_dict()
    for target, tensors in (other, model.state_dict()), (model, other.state_dict()):
        with pytest.raises(RuntimeError, match='disjoint_widths'):
            target.load_state_dict(tensors)


# Heads


def test_mlp():
    torch.manual_seed(0)
    head = SlimmableMLP(8, 12, 5, widths=WIDTHS, overlap=False)
    masks = {}
    for width in WIDTHS:
        x = torch.randn(3, len(own(8, width)))
        inputs, hidden = own(8, width), own(12, width)
        expected = (x @ head.fc1.weight[hidden][:, inputs].T + head.fc1.bias[hidden]).relu()
        expected = expected @ head.fc2.weight[:, hidden].T + head.fc2.bias
        torch.testing.assert_close(head(x, width), expected)
        assert torch.equal(head.extract(width)(x), head(x, width))
        masks[width] = touched(head, head(x, width))
    assert not any((masks[0.25][name] & masks[0.5][name]).any() for name in ('fc1', 'fc2'))


@pytest.mark.parametrize('slim_in', [True, False])
@pytest.mark.parametrize('last_norm', [True, False])
def test_projector(slim_in, last_norm):
    torch.manual_seed(0)
    head = SlimmableProjector(8, 12, 5, WIDTHS, slim_in=slim_in, last_norm=last_norm, overlap=False)
    for width in WIDTHS:
        inputs, hidden = own(8, width if slim_in else 1.0), own(12, width)
        x = torch.randn(6, len(inputs))
        expected = F.batch_norm(x @ head.fc1.weight[hidden][:, inputs].T, None, None, training=True)
        expected = expected.relu() @ head.fc2.weight[:, hidden].T
        if last_norm:
            expected = F.batch_norm(expected, None, None, training=True)
        torch.testing.assert_close(head(x, width), expected)
        assert torch.equal(head.extract(width).eval()(x), head.eval()(x, width))
        head.train()


def test_heads_as_they_were():
    """Widths alone only tell the largest."""
    by_width, by_widths = SlimmableMLP(8, 12, 5, max_width=0.5), SlimmableMLP(8, 12, 5, widths=(0.25, 0.5))
    by_widths.load_state_dict(by_width.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(by_width(x, 0.25), by_widths(x, 0.25))
    with pytest.raises(InputError, match='widths is empty'):
        SlimmableMLP(8, 12, 5, overlap=False)


# What cannot be


def test_no_width_can_be_added():
    model, x = make(), images()
    names = [*model.state_dict()]
    for add in (lambda: model.add_width(0.1), lambda: calibrate_width(model, 0.1, [x])):
        with pytest.raises(InputError, match=r'width 0\.1 cannot be added to a network with overlap=False'):
            add()
    assert [*model.state_dict()] == names
    assert model.widths == WIDTHS


def test_lazy_is_refused():
    with pytest.raises(InputError, match='with overlap=False leave lazy out'):
        timm.create_model('slimclr_resnet50', pretrained=True, widths=WIDTHS, overlap=False, lazy=True)
    with pytest.raises(InputError, match='overlap=False'):
        LazySlimmableResNet(BasicBlock, (1, 1, 1), (16, 32, 64), widths=WIDTHS, overlap=False, small_stem=True)


@pytest.mark.parametrize('widths', [WIDTHS, (1.0,)])
def test_published_weights_are_refused_before_they_are_looked_for(monkeypatch, widths):
    monkeypatch.setattr(source, 'published', lambda *args: pytest.fail('looked for'))
    for name in 'slimclr_resnet50', 'slimclr_resnet50.mocov2_200e_in1k':
        with pytest.raises(InputError, match=r'overlap=False: the widths of the published .* leave overlap out'):
            timm.create_model(name, pretrained=True, widths=widths, overlap=False)
