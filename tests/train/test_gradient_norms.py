"""Norms of slices of the gradient against a loop over single weights, and closed forms."""

from math import sqrt

import pytest
import timm
import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS
from slimclr_hub.models.layers import SlimmableLinear
from slimclr_hub.train.diagnostics import last_linear, layer_slices, mean_norms, slice_norms


def make(name='mocov2', widths=(1.0, 0.5, 0.25), overlap=True, **options):
    classes, head = (5, options.pop('head', 'switchable')) if name == 'supervised' else (0, 'switchable')
    torch.manual_seed(0)
    backbone = timm.create_model(
        'slimclr_resnet20', widths=widths, overlap=overlap, in_chans=1, num_classes=classes, head=head
    )
    return METHODS[name](backbone, **{'supervised': {}, 'mocov2': {'dim': 8, 'queue_size': 0}}.get(name, {'dim': 8}))


def backward(method, widths):
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2)]
    method.train()(views, widths, 0.9, torch.tensor([0, 1, 2, 3]))['loss'].backward()
    return method


def by_loop(gradients, spans):
    """Norms inside a slice, of all and outside, weight by weight."""
    inside = outside = 0.0
    for gradient, used in zip(gradients, spans, strict=True):
        for place, value in enumerate(gradient.double().flatten().tolist()):
            position = torch.unravel_index(torch.tensor(place), gradient.shape)
            within = all(first <= int(i) < end for i, (first, end) in zip(position, used, strict=False))
            inside, outside = inside + value**2 * within, outside + value**2 * (not within)
    return [sqrt(inside), sqrt(inside + outside), sqrt(outside)]


@pytest.mark.parametrize('smallest', [0.25, 0.5])
@pytest.mark.parametrize('overlap', [True, False])
@pytest.mark.parametrize('widths', [(1.0, 0.5, 0.25), (1.0,)])
def test_norms_agree_with_a_loop_over_weights(overlap, widths, smallest):
    """Without overlap, width 0.5 begins where 0.25 ends, so its rest lies on four sides."""
    method = backward(make(overlap=overlap), widths)
    layers = layer_slices(method, smallest)
    found = slice_norms(layers)
    assert found.shape == (len(layers), 3)
    for layer, norms in zip(layers, found, strict=True):
        if layer.name in ('backbone.conv1', 'backbone.layer1.0.conv1', 'head.fc1', 'head.fc2'):
            gradients = [parameter.grad for parameter in layer.parameters]
            torch.testing.assert_close(norms.tolist(), by_loop(gradients, layer.spans), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mean_norms(layers), found.mean(0))


def test_layers_are_the_slimmable_ones_of_network_and_head():
    """ResNet-20 has a stem and nine blocks of two convolutions, two of them with a shortcut; the head two layers."""
    names = [layer.name for layer in layer_slices(make(), 0.25)]
    assert len(names) == len(set(names)) == 1 + 18 + 2 + 2
    assert not any('key_' in name or 'bn' in name for name in names)
    assert names[-2:] == ['head.fc1', 'head.fc2']


def test_switchable_classifier_is_shared_by_no_width():
    names = [layer.name for layer in layer_slices(make('supervised'), 0.25)]
    assert all(name.startswith('backbone.') and '.fc' not in name for name in names)
    names = [layer.name for layer in layer_slices(make('supervised', head='slimmable'), 0.25)]
    assert names[-1] == 'backbone.fc'


def test_a_gradient_of_ones_counts_weights():
    """Closed form: 2 x 3 of 8 x 12 weights and 2 of 8 biases."""
    layer = nn.Sequential(SlimmableLinear(12, 8))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.testing.assert_close(slice_norms(layer_slices(layer, 0.25))[0], torch.tensor([8.0, 104.0, 96.0]).sqrt())


def test_rest_of_everything_is_nothing():
    layer = nn.Sequential(SlimmableLinear(12, 8, slim_out=False, slim_in=False))
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    torch.testing.assert_close(slice_norms(layer_slices(layer, 0.25))[0], torch.tensor([416.0, 416.0, 0.0]).sqrt())


def test_full_width_alone_spreads_its_gradient_and_narrow_ones_gather_it():
    """What Fig. 3 rests on: losses of more widths add up in the weights that they share."""
    alone = mean_norms(layer_slices(backward(make(), (1.0,)), 0.25))
    both = mean_norms(layer_slices(backward(make(), (1.0, 0.5, 0.25)), 0.25))
    assert both[2] / both[0] < alone[2] / alone[0]


def test_width_without_a_channel():
    with pytest.raises(InputError, match=r'width 0\.05 uses no channel of backbone\.conv1'):
        layer_slices(make(), 0.05)


def test_network_that_shares_nothing():
    with pytest.raises(InputError, match='no layer whose weights several widths share'):
        layer_slices(nn.Linear(3, 2), 0.5)


@pytest.mark.parametrize(
    ('name', 'options', 'expected'),
    [
        ('mocov2', {}, 'head.fc2.weight'),
        ('simclr', {}, 'head.fc2.weight'),
        ('mocov3', {}, 'predictor.fc2.weight'),
        ('supervised', {}, 'backbone.fc.w100.weight'),
        ('supervised', {'head': 'slimmable'}, 'backbone.fc.weight'),
    ],
)
def test_last_linear_layer(name, options, expected):
    method = make(name, **options)
    assert last_linear(method) is method.get_parameter(expected)


def test_no_last_linear_layer():
    method = make()
    method.head = None
    with pytest.raises(InputError, match='no head and no classifier'):
        last_linear(method)
