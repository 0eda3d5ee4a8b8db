"""The pyramid that slices equals the stock one on maps padded with zeros."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN
from torch import nn

from slimclr_hub.detection.mmdetection.backbone import SlimmableFPN
from slimclr_hub.detection.widths import InputSlicedConv2d
from slimclr_hub.errors import InputError

CHANNELS = [16, 32, 64, 128]
EXTRA = {
    'pooled': {'num_outs': 5},
    'RetinaNet': {'num_outs': 5, 'start_level': 1, 'add_extra_convs': 'on_input'},
    'FCOS': {'num_outs': 5, 'start_level': 1, 'add_extra_convs': 'on_output', 'relu_before_extra_convs': True},
}


def pair(options):
    torch.manual_seed(0)
    ours, stock = SlimmableFPN(CHANNELS, 8, **options), FPN(CHANNELS, 8, **options)
    ours.init_weights()
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours.double(), stock.double()


def maps(width):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, int(c * width), 32 // 2**i, 24 // 2**i, dtype=torch.double, generator=generator)
        for i, c in enumerate(CHANNELS)
    ]


@pytest.mark.parametrize('options', EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize('width', [1.0, 0.75, 0.5, 0.25])
def test_slicing_equals_filling_up_with_zeros(options, width):
    ours, stock = pair(options)
    narrow = [x.requires_grad_() for x in maps(width)]
    leaves = [x.detach().requires_grad_() for x in narrow]
    filled = [F.pad(x, (0, 0, 0, 0, 0, c - x.shape[1])) for x, c in zip(leaves, CHANNELS, strict=True)]
    outputs, expected = ours(narrow), stock(filled)
    assert len(outputs) == len(expected) == options['num_outs']
    weights = [torch.randn(x.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2)) for x in expected]
    for ys in outputs, expected:
        sum((y * w).sum() for y, w in zip(ys, weights, strict=True)).backward()
    close = {'rtol': 1e-12, 'atol': 1e-12}
    torch.testing.assert_close(outputs, expected, **close)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)
    used = options.get('start_level', 0)
    for a, b in zip(narrow[used:], leaves[used:], strict=True):
        torch.testing.assert_close(a.grad, b.grad, **close)


def test_initial_weights_are_distributed_as_the_stock_ones():
    """Xavier's rule finds convolutions by their class."""
    ours = SlimmableFPN(CHANNELS, 8, num_outs=5)
    ours.init_weights()
    for conv, channels in zip(ours.lateral_convs, CHANNELS, strict=True):
        limit = (6 / (channels + 8)) ** 0.5
        assert 0.9 * limit < conv.conv.weight.abs().max() <= limit
        assert (conv.conv.bias == 0).all()


def test_errors():
    with pytest.raises(InputError, match=r'norm_cfg .*BN.*: widths share the pyramid'):
        SlimmableFPN(CHANNELS, 8, num_outs=5, norm_cfg={'type': 'BN'})
    with pytest.raises(InputError, match=r'conv_cfg .*DCNv2.*: the convolutions of SlimmableFPN are its own'):
        SlimmableFPN(CHANNELS, 8, num_outs=5, conv_cfg={'type': 'DCNv2'})
    with pytest.raises(ValueError, match='the input has 5 channels, the layer at most 4'):
        InputSlicedConv2d(4, 2, 1)(torch.zeros(1, 5, 2, 2))
