"""One width of a trained detector, extracted by the command and opened by MMDetection alone: equal predictions."""

import ast
import copy
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope
from typer.testing import CliRunner

from slimclr_hub.cli import app
from slimclr_hub.detection.extract import (
    SlimmableDetectorFile,
    dense_config,
    dense_state_dict,
    extract_detector,
    read_detector,
)
from slimclr_hub.detection.mmengine_files import parse_values
from slimclr_hub.detection.ops import install_ops, linked_ops
from slimclr_hub.errors import InputError
from tests.hub.files import ROOT
from tests.networks import randomise_batchnorm

CONFIGS = {'MaskRCNN': 'mask_rcnn_slim_coins', 'FasterRCNN': 'faster_rcnn_slim', 'RetinaNet': 'retinanet_slim'}
CLASSES = ('penny', 'groat', 'florin')


def config(kind='MaskRCNN', **backbone):
    """Return the config of a training with everything that this package adds to one."""
    cfg = Config.fromfile(ROOT / 'transfer' / f'{CONFIGS[kind]}.py')
    cfg.model.backbone.update(backbone)
    if kind == 'MaskRCNN':
        heads = cfg.model.roi_head
        heads.bbox_head.num_classes = heads.mask_head.num_classes = len(CLASSES)
        cfg.model.test_cfg.rcnn.score_thr = 0.01
        cfg.train_dataloader.dataset.dataset.type = 'CocoFolder'
    cfg.val_cfg.widths = [0.5]
    cfg.work_dir, cfg.load_from, cfg.resume = 'work_dirs/first', 'start.pth', True
    return cfg


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg.model).eval()


def trained(cfg):
    """Build a detector whose normalisations have their own statistics at every width, as after training."""
    torch.manual_seed(0)
    model = build(cfg)
    randomise_batchnorm(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(('cls.weight', 'reg.weight', 'logits.weight')):
                parameter.normal_(std=0.03)  # otherwise all predictions are alike
    return model


def save(model, text, path):
    """Write a checkpoint like mmengine's runner, with its log and the state of the optimizer."""
    about = {'epoch': 12, 'iter': 96, 'cfg': text, 'dataset_meta': {'classes': CLASSES}}
    log = HistoryBuffer([1.0, 0.5], [1, 1])
    content = {'meta': about, 'state_dict': model.state_dict(), 'message_hub': {'log_scalars': {'train/loss': log}}}
    torch.save({**content, 'optimizer': {'state': {}, 'param_groups': [{'lr': 0.02}]}}, path)
    return path


@pytest.fixture(scope='module')
def mask_rcnn():
    cfg = config()
    return cfg, trained(cfg)


@pytest.fixture(scope='module')
def text(mask_rcnn):
    """The config's text, as mmengine keeps it in checkpoints."""
    return mask_rcnn[0].pretty_text


@pytest.fixture(scope='module')
def checkpoint(mask_rcnn, tmp_path_factory):
    """A checkpoint whose config has a call of os.system wherever mmengine would make one."""
    cfg = copy.deepcopy(mask_rcnn[0])
    call = dict(type='os.system', command='touch was_run')  # mmengine imports and calls any name with dots
    for part in (
        'test_evaluator',
        'val_evaluator',
        'test_cfg',
        'optim_wrapper',
        'visualizer',
        'log_processor',
        'strange',
    ):
        cfg[part] = call
    cfg.custom_imports = dict(imports=['antigravity'])
    cfg.custom_hooks = cfg.vis_backends = [call]
    cfg.default_hooks = dict(visualization=call, checkpoint=call)
    cfg.test_dataloader.sampler = cfg.test_dataloader.collate_fn = call
    cfg.test_dataloader.dataset.pipeline.append(call)
    cfg.model.backbone.init_cfg = cfg.model.neck.init_cfg = dict(type='Pretrained', checkpoint='/etc/hostname')
    return save(mask_rcnn[1], cfg.pretty_text, tmp_path_factory.mktemp('run') / 'epoch_12.pth')


def run(*argv):
    return CliRunner().invoke(app, [*map(str, argv)])


def refused(*argv):
    ended = run(*argv)
    assert isinstance(ended.exception, InputError), ended
    return str(ended.exception)


PREDICT = """
import sys
import torch
from mmdet.structures import DetDataSample

def predict(model, images):
    about = {'img_shape': (128, 128), 'ori_shape': (128, 128), 'scale_factor': (1.0, 1.0)}
    samples = [DetDataSample(metainfo=about) for _ in images]
    with torch.inference_mode():
        found = model.test_step({'inputs': list(images), 'data_samples': samples})
    return [dict(sample.pred_instances.items()) for sample in found]
"""

ALONE = f"""
import sys
sys.modules['transformers'] = None  # whose optimizers mmengine would import for seconds
from slimclr_hub.detection.mmengine_files import parse_values
from slimclr_hub.detection.ops import install_ops  # mmcv-lite has none
install_ops()
{PREDICT}
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

register_all_modules()
found = {{}}
for name in sys.argv[1:]:
    cfg = Config.fromfile(f'{{name}}.py')
    Runner.from_cfg(Config({{**cfg.to_dict(), 'work_dir': 'work_dirs', 'experiment_name': name}}))
    model = MODELS.build(cfg.model).eval()
    content = torch.load(f'{{name}}.pth')
    model.load_state_dict(content['state_dict'])
    assert content['meta']['dataset_meta'] == {{'classes': {CLASSES}}}
    kinds = {{type(module) for module in model.modules()}}
    assert 'MaskRCNN' in {{kind.__name__ for kind in kinds}}
    assert not any(kind.__module__.startswith('slimclr_hub') for kind in kinds)
    found[name] = predict(model, torch.load('images.pth'))
assert 'slimclr_hub.detection.mmdetection' not in sys.modules
torch.save(found, 'found.pth')
"""


def test_predictions_of_mmdetection_alone(mask_rcnn, checkpoint, tmp_path):
    model, names = mask_rcnn[1], {'half': 0.5, 'quarter': 0.25}
    for name, width in names.items():
        target = tmp_path / f'{name}.pth'
        done = run('extract', checkpoint, target, '--width', width, '--format', 'mmdet')
        assert done.exit_code == 0, done
        assert f'mim test mmdet {tmp_path}/{name}.py --checkpoint {target}\n' in done.output
        linkable = install_ops() == 'torchvision' and not linked_ops().exists()
        assert ('slimclr-hub doctor --link-ops' in done.output) == linkable
    assert sorted(path.name for path in tmp_path.iterdir()) == ['half.pth', 'half.py', 'quarter.pth', 'quarter.py']
    images = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / 'images.pth')
    subprocess.run([sys.executable, '-c', ALONE, *names], cwd=tmp_path, check=True)
    assert not (tmp_path / 'was_run').exists()
    assert not re.search('os.system|antigravity|init_cfg|slimclr', (tmp_path / 'half.py').read_text())
    found = torch.load(tmp_path / 'found.pth')
    exec(PREDICT, scope := {})
    for name, width in names.items():
        with model.set_width(width):
            expected = scope['predict'](model, images)
        for image, wanted in zip(found[name], expected, strict=True):
            assert image.keys() == wanted.keys() == {'bboxes', 'scores', 'labels', 'masks'}
            assert len(wanted['scores']) > 20
            assert len(set(wanted['labels'].tolist())) > 1
            assert 0.01 < wanted['masks'].float().mean() < 0.99
            for key in 'labels', 'masks':
                assert torch.equal(image[key], wanted[key])
            for key in 'bboxes', 'scores':
                torch.testing.assert_close(image[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*(found[name][0]['bboxes'][:20] for name in names))


@pytest.mark.parametrize('width', [0.75, 0.25])
@pytest.mark.parametrize(('kind', 'backbone'), [('FasterRCNN', {'widths': (1.0, 0.75, 0.25)}), ('RetinaNet', {})])
def test_other_detectors(kind, backbone, width):
    """RetinaNet derives a level of the pyramid from the backbone's last map."""
    cfg = config(kind, **backbone)
    model = trained(cfg)
    dense = build(dense_config(cfg, width))
    assert type(dense).__name__ == kind
    dense.load_state_dict(dense_state_dict(cfg, model.state_dict(), width))  # strictly
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), model.set_width(width):
        expected, found = model.double().extract_feat(x.double()), dense.double().extract_feat(x.double())
    assert len(expected) == 5
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('in_channels', [[128, 256, 512, 1024], [256, 512, 1024, 2048]])
@pytest.mark.parametrize('width', [0.5, 0.25])
def test_largest_width_below_one(in_channels, width):
    """A neck may have the inputs of the largest width, as in `mask_rcnn_slim_w050.py`, or those of width 1.0."""
    cfg = config('FasterRCNN', widths=(0.5, 0.25))
    cfg.model.neck.in_channels = in_channels
    model = trained(cfg)
    dense = build(dense_config(cfg, width))
    dense.load_state_dict(dense_state_dict(cfg, model.state_dict(), width))  # strictly
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), model.set_width(width):
        expected, found = model.double().extract_feat(x.double()), dense.double().extract_feat(x.double())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# The config


def unscoped(section):
    """Leave out the scope that mmengine adds to sections of a base config."""
    return {key: value for key, value in section.items() if key != '_scope_'}


def test_config():
    cfg = config(frozen_stages=1, with_cp=True, out_indices=(0, 1, 2, 3))
    cfg.custom_imports.imports.append('other.module')
    before = copy.deepcopy(cfg.to_dict())
    dense = dense_config(cfg, 0.25)
    assert cfg.to_dict() == before
    assert not re.search('slim', dense.pretty_text, re.IGNORECASE)
    assert unscoped(dense.model.backbone) == {
        'type': 'ResNet',
        'depth': 50,
        'base_channels': 16,
        'stem_channels': 16,
        'num_stages': 4,
        'out_indices': (0, 1, 2, 3),
        'frozen_stages': 1,
        'with_cp': True,
        'norm_eval': False,
        'norm_cfg': {'type': 'BN', 'requires_grad': True},
        'style': 'pytorch',
    }
    assert unscoped(dense.model.neck) == {
        'type': 'FPN',
        'in_channels': [64, 128, 256, 512],
        'out_channels': 64,
        'num_outs': 5,
    }
    assert unscoped(dense.val_cfg) == {'type': 'ValLoop'}
    assert unscoped(dense.test_cfg) == {'type': 'TestLoop'}
    assert [hook.type for hook in dense.custom_hooks] == ['SyncBuffersHook']  # mmengine's own
    assert dense.custom_imports.imports == ['other.module']
    assert 'model_wrapper_cfg' not in dense
    assert not {'work_dir', 'load_from', 'resume'} & dense.keys()
    train, val = dense.train_dataloader.dataset, dense.val_dataloader.dataset
    assert (train.type, train.dataset.type, val.type) == ('RepeatDataset', 'CocoDataset', 'CocoDataset')
    assert 'metainfo' not in train.dataset
    assert val.metainfo['classes'] == ('coin',)
    for same in 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'default_hooks':
        assert dense[same] == cfg[same]
    assert dense.model.roi_head == cfg.model.roi_head


def test_config_of_another_detector(mask_rcnn):
    with pytest.raises(InputError, match='type ResNet, not SlimmableResNet'):
        dense_config(get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'), 0.5)
    for width in 0.3, 2:
        with pytest.raises(InputError, match=rf'width {width} is not one of .*1\.0, 0\.75, 0\.5, 0\.25'):
            dense_config(mask_rcnn[0], width)


# Mistakes


def test_tensors_that_do_not_fit(mask_rcnn):
    cfg, tensors = mask_rcnn[0], mask_rcnn[1].state_dict()
    with pytest.raises(InputError, match=r"width 0\.3 is not one of this network's widths"):
        dense_state_dict(cfg, tensors, 0.3)
    with pytest.raises(InputError, match=r'layer1\.0\.conv1\.weight is missing$'):
        dense_state_dict(cfg, {k: v for k, v in tensors.items() if k != 'backbone.network.layer1.0.conv1.weight'}, 0.5)
    with pytest.raises(InputError, match='not a slimmable detector'):
        dense_state_dict(cfg, {k: v for k, v in tensors.items() if k.startswith('backbone.')}, 0.5)


def test_tensors_that_are_no_numbers(mask_rcnn):
    """At the width that is taken; what it has no part in does not matter."""
    cfg, tensors = mask_rcnn[0], mask_rcnn[1].state_dict()
    for name in 'neck.fpn_convs.0.conv.bias', 'backbone.network.bn1.w050.running_mean':
        hostile = {**tensors, name: torch.full_like(tensors[name], torch.nan)}
        with pytest.raises(InputError, match=r'(fpn_convs\.0\.conv\.bias|bn1\.running_mean) holds NaN or infinite'):
            dense_state_dict(cfg, hostile, 0.5)
    assert all(tensor.isfinite().all() for tensor in dense_state_dict(cfg, hostile, 0.25).values())
    name = 'roi_head.bbox_head.fc_cls.weight'
    with pytest.raises(InputError, match=r'fc_cls\.weight is of torch\.int32'):
        dense_state_dict(cfg, {**tensors, name: tensors[name].int()}, 0.5)


def test_classes_that_a_config_cannot_hold(mask_rcnn, text, tmp_path):
    """The checkpoint names them; without them MMDetection would evaluate on the classes of COCO."""
    tensors = mask_rcnn[1].state_dict()
    for classes, kept in ((("driver's licence", 'b', 'c'), True), (None, False), (('\x1b[2J', 'b', 'c'), False)):
        meta = {'cfg': text, 'dataset_meta': {'classes': classes}}
        detector = SlimmableDetectorFile(tmp_path / 'epoch_12.pth', tensors, meta)
        written, evaluated = extract_detector(detector, tmp_path / 'half.pth', 0.5, overwrite=True)
        assert not evaluated
        assert 'dataloader' not in written.read_text()
        found = torch.load(tmp_path / 'half.pth')['meta']
        assert found.get('dataset_meta') == ({'classes': classes} if kept else None)


def test_checkpoint_of_the_format_before_archives(mask_rcnn, text, tmp_path):
    meta = {'cfg': text, 'options': Namespace(seed=1)}  # which `convert` reads, too
    torch.save({'meta': meta, 'state_dict': mask_rcnn[1].state_dict()}, path := tmp_path / 'new.pth')
    old = tmp_path / 'old.pth'
    torch.save(
        {'meta': {'cfg': text}, 'state_dict': mask_rcnn[1].state_dict()}, old, _use_new_zipfile_serialization=False
    )
    for file in path, old:
        assert read_detector(file).meta['cfg'] == text


def test_both_files_or_none(checkpoint, tmp_path):
    arguments = ['--width', 0.5, '--format', 'mmdet']
    for there in 'half.pth', 'half.py':
        (tmp_path / there).write_text('precious')
        assert f'{there} is there already' in refused('extract', checkpoint, tmp_path / 'half.pth', *arguments)
        assert [path.read_text() for path in tmp_path.iterdir()] == ['precious']
        (tmp_path / there).unlink()
    (tmp_path / 'half.py').write_text('precious')
    assert run('extract', checkpoint, tmp_path / 'half.pth', *arguments, '--overwrite').exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['half.pth', 'half.py']
    assert Config.fromfile(tmp_path / 'half.py').model.type == 'MaskRCNN'


@pytest.mark.parametrize(
    ('target', 'options', 'words'),
    [
        ('half.pth', [], 'is a detector, which --format timm has not; --format mmdet has it'),
        ('half.pth', ['--format', 'torchvision'], 'is a detector, which --format torchvision has not'),
        ('half.safetensors', ['--format', 'mmdet'], 'half.safetensors does not end in .pth'),
        ('half.pth', ['--format', 'mmdet', '--width', 0.3], 'width 0.3 is not one of'),
    ],
)
def test_extraction_that_cannot_be(checkpoint, tmp_path, target, options, words):
    assert words in refused('extract', checkpoint, tmp_path / target, '--width', 0.5, *options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('value', ['None', '5', "'x'", '[]', '[5]', '{}'])
@pytest.mark.parametrize('part', ['backbone', 'neck', 'roi_head'])
def test_parts_of_another_kind(mask_rcnn, text, tmp_path, part, value):
    values = {**parse_values(text)['model'], part: ast.literal_eval(value)}
    detector = SlimmableDetectorFile(tmp_path / 'run.pth', mask_rcnn[1].state_dict(), {'cfg': f'model = {values!r}'})
    with pytest.raises(InputError, match=f'^{tmp_path}/run.pth: '):
        extract_detector(detector, tmp_path / 'half.pth', 0.5)


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        (None, None, 'there is no config in its meta'),
        ('', 'import os\n', 'line 1 assigns no value to a name'),
        ('', "x = print('it was run')\n", 'holds more than values, and was not run'),
        ('', "x = open('run', 'w')\n", 'holds more than values, and was not run'),
        ('', 'x = (\n', 'holds more than values'),
        (
            "type='StandardRoIHead'",
            "type='builtins.print'",
            "model.roi_head.type in the config of its meta is 'builtins",
        ),
        ("type='StandardRoIHead'", "type='ATSSHead'", 'model.roi_head.type in the config of its meta is'),
        ("type='StandardRoIHead'", "type='RPNHead'", 'builds no detector: '),
        ('num_convs=2', 'num_convs=999999', 'model.roi_head.mask_head.num_convs in the config of its meta is 999999'),
        (
            'out_channels=64',
            'out_channels=99999',
            'lateral_convs.0.conv.weight has shape [64, 128, 1, 1], not [99999',
        ),
        ('', 'x = ' + '-' * 99999 + '1\n', 'holds more than values, and was not run'),
        ('fc_out_channels=256', 'fc_out_channels=9', 'roi_head.bbox_head.fc_cls.weight has shape [4, 256], not [4, 9]'),
        ('num_convs=2', 'num_convs=3', 'roi_head.mask_head.convs.2.conv.weight is missing'),
        ('widths=(', "widths=('x', ", "widths ('x', 1.0, 0.75, 0.5, 0.25) are no numbers"),
        ("name='slimclr_resnet50'", "name='slimclr_resnet50', out_indices=(0, 9)", 'out_indices (0, 9) are no stages'),
        ("name='slimclr_resnet50'", "name='slimclr_resnet50', out_indices=None", 'out_indices None are no stages'),
    ],
)
def test_configs_that_do_not_fit(mask_rcnn, text, tmp_path, capfd, old, new, words):
    meta = {}
    if old is not None:
        assert old in text
        meta['cfg'] = text.replace(old, new) if old else new + text
    detector = SlimmableDetectorFile(tmp_path / 'epoch_12.pth', mask_rcnn[1].state_dict(), meta)
    with pytest.raises(InputError, match=f'^{tmp_path}/epoch_12.pth: .*{re.escape(words)}'):
        extract_detector(detector, tmp_path / 'half.pth', 0.5)
    assert 'it was run' not in capfd.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_checkpoints_of_other_kinds(mask_rcnn, tmp_path):
    torch.save({'state_dict': mask_rcnn[1].backbone.state_dict()}, tmp_path / 'backbone.pth')
    assert read_detector(tmp_path / 'backbone.pth') is None
    words = refused('extract', tmp_path / 'backbone.pth', tmp_path / 'half.pth', '--width', 0.5, '--format', 'mmdet')
    assert 'is a PyTorch checkpoint, not safetensors' in words
