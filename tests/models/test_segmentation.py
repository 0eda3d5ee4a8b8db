"""Decoders of segmentation_models_pytorch on maps of any width: zeros for the channels that a width lacks."""

import runpy

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch.testing import assert_close

from slimclr_hub.errors import InputError
from slimclr_hub.models import SlimmableResNet
from tests.hub.files import ROOT, save_small
from tests.networks import randomise_batchnorm

WIDTHS = (1.0, 0.75, 0.5, 0.25)
NORM = {'type': 'instancenorm', 'affine': True}
KINDS = {
    'unet': (smp.Unet, 'slimclr_resnet20', {'encoder_depth': 3, 'decoder_channels': (12, 10, 8)}),
    'fpn': (smp.FPN, 'slimclr_resnet50', {'decoder_pyramid_channels': 16, 'decoder_segmentation_channels': 32}),
}


def build(kind, suffix='', **changes):
    decoder, name, sizes = KINDS[kind]
    norm = {'decoder_use_norm': NORM} if kind == 'unet' else {}
    return decoder(f'tu-{name}{suffix}', encoder_weights=None, **sizes, **norm, **changes).double()


def slimmable(kind):
    torch.manual_seed(0)
    model = build(kind, pad_channels=True)
    randomise_batchnorm(model)
    return model, model.encoder.model


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize('name', ['slimclr_resnet20', 'slimclr_resnet50'])
def test_padded_maps(name):
    plain = timm.create_model(name, features_only=True).eval()
    padded = timm.create_model(name, features_only=True, width=0.5, pad_channels=True).eval()
    padded.load_state_dict(plain.state_dict())
    channels = plain.feature_info.channels()
    x = images().float()
    for width in WIDTHS:
        with plain.set_width(width), padded.set_width(width):
            assert padded.feature_info.channels() == channels
            for ours, expected in zip(padded(x), plain(x), strict=True):
                assert_close(ours[:, : expected.shape[1]], expected, rtol=0, atol=0)
                assert not ours[:, expected.shape[1] :].any()
            assert [level.shape[1] for level in padded(x)] == channels
    assert padded.width == 0.5


def test_padded_to_the_widest_of_the_network():
    padded = timm.create_model('slimclr_resnet20', features_only=True, widths=(0.5, 0.25), pad_channels=True)
    padded.set_width(0.25)
    assert [level.shape[1] for level in padded(images().float())] == padded.feature_info.channels() == [8, 16, 32]


def test_nothing_wider_is_read_for_padding(tmp_path):
    save_small(tmp_path / 'network')
    options = {'features_only': True, 'pretrained': True, 'width': 0.25, 'lazy': True}
    narrow, padded = (
        timm.create_model(f'local-dir:{tmp_path}/network', pad_channels=pad, **options) for pad in (False, True)
    )
    assert [p.shape for p in padded.parameters()] == [p.shape for p in narrow.parameters()]
    assert padded.feature_info.channels() == [16, 32, 64]


def test_padding_is_for_features():
    with pytest.raises(InputError, match=r'pad_channels=True is for the maps of features_only=True'):
        timm.create_model('slimclr_resnet20', pad_channels=True)


def leading(weight, wanted, parts):
    """Of a convolution's weight over several maps, the leading input channels of each map; `parts` are full, narrow."""
    pieces, start = [], 0
    for full, narrow in parts:
        pieces.append(weight[:, start : start + narrow])
        start += full
    assert start == weight.shape[1]
    return torch.cat(pieces, 1).reshape(wanted)


@pytest.mark.parametrize('width', [0.75, 0.5, 0.25])
@pytest.mark.parametrize('kind', KINDS)
def test_equals_a_dense_model_with_sliced_weights(kind, width):
    """What a decoder built for one width computes with the leading input channels of each map."""
    model, encoder = slimmable(kind)
    dense = build(kind, f'_{round(100 * width):03}')
    full, narrow = model.encoder.out_channels, dense.encoder.out_channels
    extracted: SlimmableResNet = encoder.model.extract(width)
    dense.encoder.model.model.load_state_dict(extracted.state_dict())
    # The maps that enter each of the layers whose shapes differ.
    levels = [*zip(full, narrow, strict=True)]
    if kind == 'unet':
        maps = {
            'decoder.blocks.0.conv1.0.weight': levels[:1:-1],
            'decoder.blocks.1.conv1.0.weight': [(12, 12), levels[1]],
        }
    else:
        names = ['decoder.p5', *(f'decoder.p{level}.skip_conv' for level in (4, 3, 2))]
        maps = {f'{name}.weight': [level] for name, level in zip(names, levels[::-1], strict=False)}
    tensors = {}
    for name, tensor in dense.state_dict().items():
        if not name.startswith('encoder'):
            trained = model.state_dict()[name]
            tensors[name] = leading(trained, tensor.shape, maps[name]) if trained.shape != tensor.shape else trained
    assert {name for name in tensors if model.state_dict()[name].shape != tensors[name].shape} == {*maps}
    dense.load_state_dict(tensors, strict=False)

    model.eval()
    encoder.set_width(width)
    assert_close(model(images(64)), dense.eval()(images(64)))


def test_trains_all_widths():
    model, encoder = slimmable('unet')
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for widths in ((0.25,), WIDTHS):
        optimizer.zero_grad()
        for width in widths:
            with encoder.set_width(width):
                model(images()).square().mean().backward()
        unused = model.decoder.blocks[0].conv1[0].weight.grad[:, 16:64]  # of the last map, all above width 0.25
        assert torch.isfinite(unused).all()
        assert bool(unused.any()) == (1.0 in widths)
    before = {width: norm.weight.clone() for width, norm in encoder.model.bn1.items()}
    optimizer.step()
    assert all((norm.weight != before[width]).any() for width, norm in encoder.model.bn1.items())


def test_saved_and_opened_by_the_library(tmp_path):
    model, encoder = slimmable('unet')
    model.save_pretrained(tmp_path / 'unet')
    opened = smp.from_pretrained(tmp_path / 'unet').double().eval()
    for width in WIDTHS:
        encoder.set_width(width)
        opened.encoder.model.set_width(width)
        assert_close(opened(images()), model.eval()(images()), rtol=0, atol=1e-5)  # it opens in float32


def test_the_example(capsys):
    example = runpy.run_path(str(ROOT / 'transfer' / 'unet_coins.py'))
    example['main'](steps=1, batch=1)
    line = capsys.readouterr().out
    assert line.startswith('seed 0: 1: ')
    ious = [float(part.rpartition(' ')[2]) for part in line.removeprefix('seed 0: ').split(', ')]
    assert len(ious) == 4
    assert all(0 <= iou <= 100 for iou in ious)
