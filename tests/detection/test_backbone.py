"""The slimmable ResNet as MMDetection's backbone."""

import logging

import pytest
import timm
import torch
from mmengine.logging import MMLogger
from torch import nn

from slimclr_hub.detection.mmdetection.backbone import SlimmableResNet
from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import save_folder
from tests.networks import randomise_batchnorm

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    backbone = SlimmableResNet(name, **{'out_indices': (0, 1, 2), **kwargs})
    backbone.init_weights()
    randomise_batchnorm(backbone)
    return backbone


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', ['slimclr_resnet50', 'slimclr_resnet20'])
def test_features_are_those_of_the_timm_model(name):
    stages = 4 if name == 'slimclr_resnet50' else 3
    backbone = make(name, out_indices=range(stages)).double().eval()
    network = timm.create_model(name, num_classes=0).double().eval()
    network.load_state_dict(backbone.network.state_dict())
    for width in WIDTHS:
        with backbone.set_width(width), network.set_width(width), torch.no_grad():
            expected = network.forward_intermediates(images().double(), intermediates_only=True)[1:]
            maps = backbone(images().double())
            assert [m.shape[1] for m in maps] == [info['num_chs'] for info in network.feature_info[1:]]
        assert len(maps) == stages
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert backbone.width == 1.0


def test_stages_asked_for():
    backbone = make(out_indices=(0, 2)).eval()
    every = make().eval()(images())
    maps = backbone(images())
    assert len(maps) == 2
    torch.testing.assert_close(maps[0], every[0])
    torch.testing.assert_close(maps[1], every[2])


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for with_cp in False, True:
        backbone = make(with_cp=with_cp, widths=(1.0, 0.5)).train()
        for width in backbone.widths:
            with backbone.set_width(width):
                sum(m.square().mean() for m in backbone(images())).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_nothing_is_frozen_unless_asked():
    backbone = make().train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(m.training for m in backbone.modules())


def test_frozen_stages():
    backbone = make(frozen_stages=1).train()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = ('network.conv1.', 'network.bn1.', 'network.layer1.')
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(expected)}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != name.startswith(expected)
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    backbone(images())
    assert torch.equal(backbone.network.bn1.w100.running_mean, before['network.bn1.w100.running_mean'])
    last = 'network.layer3.0.bn1.w100.running_mean'
    assert not torch.equal(dict(backbone.named_buffers())[last], before[last])


def test_normalisation_that_keeps_its_statistics():
    backbone = make(norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    assert backbone.network.layer1.training
    assert all(p.requires_grad for p in backbone.parameters())


def test_sync_batchnorm_conversion_finds_every_width():
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(m) for m in norms} == {nn.SyncBatchNorm}
    assert len(norms) == len(WIDTHS) * 21


def test_weights_are_loaded_and_told(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model('slimclr_resnet20', num_classes=10)
    randomise_batchnorm(source)
    about = {'size': 32, 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'crop_pct': 1.0}
    save_folder(source, tmp_path / 'network', **about, card='')
    backbone = SlimmableResNet('slimclr_resnet20', (1.0, 0.5), weights=str(tmp_path / 'network'), out_indices=(2,))
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        backbone.init_weights()
    finally:
        logger.removeHandler(handler)
    text = ' '.join(record.getMessage() for record in records)
    assert str(tmp_path / 'network') in text
    assert '1.0' in text
    assert 'fc' in text or 'head' in text
    for width in backbone.widths:
        with backbone.eval().set_width(width), source.eval().set_width(width), torch.no_grad():
            torch.testing.assert_close(backbone(images())[0], source.forward_features(images()))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'name': 'resnet50'}, "name 'resnet50' is none of slimclr_resnet18, slimclr_resnet34"),
        ({'name': 'slimclr_resnet50.mocov2_800e_in1k'}, 'a tag goes into `weights`'),
        ({'name': 'slimclr_resnet50_050'}, 'slimclr_resnet50_050. is none of'),
        ({'widths': (1.0, 1.5)}, r'width 1\.5 is outside'),
        ({'out_indices': (3,)}, 'out_indices 3 is not from 0 to 2; slimclr_resnet20 has 3 stages'),
        ({'frozen_stages': 4}, 'frozen_stages 4 is not from -1 to 3'),
        ({'init_cfg': {'type': 'Pretrained', 'checkpoint': 'x'}}, 'name a source as `weights`'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        SlimmableResNet(**{'name': 'slimclr_resnet20', 'out_indices': (0,), **kwargs})


def test_weights_of_another_network(tmp_path):
    about = {'size': 32, 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'crop_pct': 1.0}
    save_folder(timm.create_model('slimclr_resnet20', num_classes=0), tmp_path / 'small', **about, card='')
    backbone = SlimmableResNet('slimclr_resnet20x4', weights=str(tmp_path / 'small'), out_indices=(2,))
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    with pytest.raises(InputError, match='small'):
        backbone.init_weights()
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
