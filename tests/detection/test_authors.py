"""The authors' Mask R-CNN, converted for MMDetection 3: equal features, boxes and masks for the same classes."""

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from slimclr_hub.cli import app
from slimclr_hub.detection.authors import CLASSES, convert_detector, is_detector
from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS
from tests.formula import tensor
from tests.hub.files import ROOT
from tests.models.test_convert import FORWARD, MASK_RCNN, Formula, assert_close, mask_rcnn, write
from tests.reference import image

# Layers of MMDetection 0.6 beside the backbone, with the shapes of their weights; all have a bias.
LAYERS = {
    'neck.lateral_convs.0.conv': (256, 256, 1, 1),
    'neck.lateral_convs.1.conv': (256, 512, 1, 1),
    'neck.lateral_convs.2.conv': (256, 1024, 1, 1),
    'neck.lateral_convs.3.conv': (256, 2048, 1, 1),
    **{f'neck.fpn_convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
    'rpn_head.rpn_conv': (256, 256, 3, 3),
    'rpn_head.rpn_cls': (3, 256, 1, 1),
    'rpn_head.rpn_reg': (12, 256, 1, 1),
    'bbox_head.fc_cls': (81, 1024),
    'bbox_head.fc_reg': (324, 1024),
    'bbox_head.shared_fcs.0': (1024, 12544),
    'bbox_head.shared_fcs.1': (1024, 1024),
    **{f'mask_head.convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
    'mask_head.upsample': (256, 256, 2, 2),
    'mask_head.conv_logits': (81, 256, 1, 1),
}


@pytest.fixture(scope='module')
def theirs():
    """State dict of the authors' detector with values by the formula."""
    tensors = mask_rcnn(Formula())
    for layer, shape in LAYERS.items():
        for leaf, size in ('weight', shape), ('bias', shape[:1]):
            tensors[f'module.{layer}.{leaf}'] = torch.from_numpy(tensor(f'{layer}.{leaf}', size))
    return tensors


@pytest.fixture(scope='module')
def ours(theirs):
    return convert_detector(theirs)


def build(config):
    cfg = Config.fromfile(ROOT / 'transfer' / config).model
    cfg.backbone.weights = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg).eval()


@pytest.fixture(scope='module')
def detector(ours):
    model = build('mask_rcnn_slim_reference.py')
    model.load_state_dict(ours)  # strictly
    return model


def layer(theirs, name, x, apply=F.linear):
    return apply(x, *(theirs[f'module.{name}.{leaf}'] for leaf in ('weight', 'bias')))


@torch.inference_mode()
@pytest.mark.parametrize('width', DEFAULT_WIDTHS)
def test_authors_numbers(detector, width):
    """The backbone gives the features recorded from their implementation at each width."""
    with detector.set_width(width):
        features = detector.backbone(image('input', 2))[-1].mean((2, 3))
    assert_close(features, FORWARD[f'backbone/pooled/{width}'])


@torch.inference_mode()
def test_classes(detector, theirs):
    """Scores, boxes and masks of class i equal those of their class i + 1; the background comes last."""
    x = torch.rand(5, 1024)
    scores, boxes = (layer(theirs, f'bbox_head.{name}', x) for name in ('fc_cls', 'fc_reg'))
    head = detector.roi_head.bbox_head
    for i in range(80):
        torch.testing.assert_close(head.fc_cls(x)[:, i], scores[:, i + 1])
        torch.testing.assert_close(head.fc_reg(x)[:, 4 * i : 4 * i + 4], boxes[:, 4 * i + 4 : 4 * i + 8])
    torch.testing.assert_close(head.fc_cls(x)[:, 80], scores[:, 0])
    maps = torch.rand(2, 256, 7, 7)
    masks = layer(theirs, 'mask_head.conv_logits', maps, F.conv2d)
    torch.testing.assert_close(detector.roi_head.mask_head.conv_logits(maps), masks[:, 1:])


@torch.inference_mode()
def test_everything_else_stays(detector, theirs):
    """Pyramid, proposals, shared layers and masks below the classes keep their tensors."""
    found = detector.state_dict()
    for name in LAYERS:
        if name.rpartition('.')[2] in ('fc_cls', 'fc_reg', 'conv_logits'):
            continue
        for leaf in 'weight', 'bias':
            key = f'{name}.{leaf}' if name.startswith(('neck', 'rpn')) else f'roi_head.{name}.{leaf}'
            assert torch.equal(found[key], theirs[f'module.{name}.{leaf}'])


def test_classes_are_those_of_mmdetection():
    assert CocoDataset.METAINFO['classes'] == CLASSES


def test_without_module(theirs, ours):
    again = convert_detector({name.removeprefix('module.'): value for name, value in theirs.items()})
    assert again.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in again.items())


def test_faster_rcnn_of_other_classes(theirs):
    """A detector without masks and with five classes converts, too."""
    rows = {'fc_cls': 6, 'fc_reg': 24}
    parts = {name: value for name, value in theirs.items() if '.mask_head.' not in name}
    tensors = {name: value[: rows[k]] if (k := name.split('.')[-2]) in rows else value for name, value in parts.items()}
    converted = convert_detector(tensors)
    expected = {name: value.shape for name, value in build('faster_rcnn_slim.py').state_dict().items()}
    for leaf, inputs in ('weight', (1024,)), ('bias', ()):
        expected[f'roi_head.bbox_head.fc_cls.{leaf}'] = (6, *inputs)
        expected[f'roi_head.bbox_head.fc_reg.{leaf}'] = (20, *inputs)
    assert {name: value.shape for name, value in converted.items()} == expected


# Errors


@pytest.mark.parametrize(
    ('name', 'shown'),
    [
        ('neck.lateral_convs.2.conv.bias', 'neck.lateral_convs.2.conv.bias'),
        ('rpn_head.rpn_cls.weight', 'rpn_head.rpn_cls.weight'),
        ('bbox_head.fc_cls.weight', 'bbox_head.fc_cls.weight'),  # where classes could be counted
        ('mask_head.conv_logits.bias', 'mask_head.conv_logits.bias'),
        ('backbone.layer2.0.conv2.weight', 'layer2.0.conv2.weight'),
        ('backbone.layer1.0.bn1.bn.0.running_var', 'layer1.0.bn1.w025.running_var'),
    ],
)
def test_missing_and_misshapen_tensors_are_named(theirs, name, shown):
    without = {key: value for key, value in theirs.items() if key != f'module.{name}'}
    with pytest.raises(InputError, match=rf'MMDetection 0\.6: .*{shown} is missing$'):
        convert_detector(without)
    with pytest.raises(InputError, match=rf'MMDetection 0\.6: .*{shown} has shape \[7\], not \[[\d, ]*\]$'):
        convert_detector({**theirs, f'module.{name}': torch.zeros(7)})


def test_numbers_that_are_none(theirs):
    for name, value in {'bbox_head.fc_cls.bias': float('nan'), 'neck.fpn_convs.0.conv.bias': float('inf')}.items():
        hostile = torch.full_like(theirs[f'module.{name}'], value)
        with pytest.raises(InputError, match=f'^{name} holds NaN or infinite values'):
            convert_detector({**theirs, f'module.{name}': hostile})


def test_all_that_is_wrong_is_said_at_once(theirs):
    wrong = {
        **theirs,
        'module.neck.fpn_convs.4.conv.weight': torch.zeros(3),
        'module.rpn_head.rpn_cls.bias': torch.ones(6),
    }
    del wrong['module.backbone.conv1.weight'], wrong['module.mask_head.upsample.bias']
    with pytest.raises(InputError) as error:
        convert_detector(wrong)
    for words in (
        'backbone.conv1.weight',
        'mask_head.upsample.bias is missing',
        'neck.fpn_convs.4.conv.weight is not expected',
        'rpn_head.rpn_cls.bias has shape [6], not [3]',
    ):
        assert words in str(error.value)


def test_other_detectors(theirs, ours):
    with pytest.raises(InputError, match='names of MMDetection 2 or 3'):
        convert_detector(ours)
    first = {name: value for name, value in theirs.items() if '.bn.' not in name or '.bn.0.' in name}
    plain = {name.replace('.bn.0.', '.'): value for name, value in first.items()}
    with pytest.raises(InputError, match='the backbone is not slimmable'):
        convert_detector(plain)
    heads = {name: value for name, value in theirs.items() if '_head.' not in name}
    assert not is_detector(heads)
    with pytest.raises(InputError, match='fc_cls and fc_reg are missing'):
        convert_detector(heads)


# The command

REFERENCE = ROOT / 'transfer' / 'mask_rcnn_slim_reference.py'


def run(*argv):
    return CliRunner().invoke(app, [*map(str, argv)])


def test_command(theirs, ours, tmp_path):
    source, target = write(theirs, tmp_path / 'theirs.pth', MASK_RCNN), tmp_path / 'new' / 'detector.pth'
    done = run('convert', source, target)
    assert done.exit_code == 0, done
    assert f'{target}: Mask R-CNN, slimclr_resnet50, widths 1.0, 0.75, 0.5, 0.25, 80 classes\n' in done.output
    assert f'mim test mmdet transfer/mask_rcnn_slim_reference.py --checkpoint {target}\n' in done.output
    saved = torch.load(target, weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == CLASSES
    assert saved['state_dict'].keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in saved['state_dict'].items())
    assert [*target.parent.iterdir()] == [target]
    # It has no config of its own to be extracted by.
    half = target.with_name('half.pth')
    extract = ['extract', target, half, '--width', 0.5, '--format', 'mmdet']
    assert 'add --config' in str(run(*extract).exception)
    assert run(*extract, '--config', REFERENCE).exit_code == 0
    dense = torch.load(half, weights_only=True)['state_dict']
    assert dense['backbone.layer4.2.bn3.weight'].shape == (1024,)
    assert torch.equal(dense['neck.lateral_convs.3.conv.weight'], ours['neck.lateral_convs.3.conv.weight'][:, :1024])
    assert "type='LegacyDeltaXYWHBBoxCoder'" in half.with_suffix('.py').read_text()
    again = run('convert', source, target)
    assert isinstance(again.exception, InputError)
    assert f'{target} is there already' in str(again.exception)
    assert run('convert', source, target, '--overwrite').exit_code == 0


def test_command_with_another_target(theirs, ours, tmp_path):
    """A file for timm holds the backbone alone, and a backbone alone is not converted to a detector."""
    source = write(theirs, tmp_path / 'theirs.pth', MASK_RCNN)
    assert run('convert', source, tmp_path / 'backbone.safetensors').exit_code == 0
    torch.save({'state_dict': ours}, tmp_path / 'ours.pth')  # as does the detector in our names
    assert run('convert', tmp_path / 'ours.pth', tmp_path / 'ours.safetensors').exit_code == 0
    tensors = [load_file(tmp_path / f'{name}.safetensors') for name in ('backbone', 'ours')]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    backbone = {name: value for name, value in theirs.items() if name.startswith('module.backbone.')}
    torch.save(backbone, tmp_path / 'backbone.pth')
    refused = run('convert', tmp_path / 'backbone.pth', tmp_path / 'detector.pth')
    assert 'detector.pth is the name of a file; give a folder' in str(refused.exception)


def test_command_on_a_part(theirs, tmp_path):
    del (part := dict(theirs))['module.bbox_head.fc_reg.bias']
    source, target = write(part, tmp_path / 'theirs.pth', MASK_RCNN), tmp_path / 'detector.pth'
    refused = run('convert', source, target)
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception).startswith(f'{source}: ')
    assert 'bbox_head.fc_reg.bias is missing' in str(refused.exception)
    assert not target.exists()
