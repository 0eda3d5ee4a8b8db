"""The configs of `transfer/`: values, and steps on small images."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from slimclr_hub.detection.mmdetection.detectors import SlimmableDetector
from tests.detection.small import batch

TRANSFER = Path(__file__).parents[2] / 'transfer'
CONFIGS = sorted(path.stem for path in TRANSFER.glob('*_slim*.py'))


@cache
def parsed(name, **environment):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('COCO_ROOT', raising=False)
        for key, value in environment.items():
            patch.setenv(key, value)
        return Config.fromfile(TRANSFER / f'{name}.py')


def read(name, **environment):
    return copy.deepcopy(parsed(name, **environment))


def test_configurations_are_found():
    assert {'mask_rcnn_slim', 'mask_rcnn_slim_w050', 'faster_rcnn_slim', 'retinanet_slim'} < {*CONFIGS}
    assert len(CONFIGS) == 9


# The other configs change a schedule or a source of weights; the coins train by the real command.
@pytest.mark.parametrize(
    'name', ['mask_rcnn_slim', 'mask_rcnn_slim_w050', 'mask_rcnn_slim_reference', 'faster_rcnn_slim', 'retinanet_slim']
)
def test_takes_a_step_at_every_width(name):
    """One step with few regions, everything else as in the config."""
    config = read(name)
    if 'roi_head' in config.model:
        config.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        config.model.train_cfg.rcnn.sampler.num = 8
    if len(config.model.backbone.widths) > 2:
        config.model.backbone.widths = (1.0, 0.25)
    torch.manual_seed(0)
    model = MODELS.build(config.model).train()
    assert isinstance(model, SlimmableDetector)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clip = config.optim_wrapper.get('clip_grad')
    data = batch(size=128)
    log = model.train_step(data, OptimWrapper(optimizer, clip_grad=None if clip is None else dict(clip)))
    assert all(value.isfinite().all() for value in log.values())
    assert [key for key in log if key.endswith('/loss')] == [f'width_{width:.2f}/loss' for width in model.widths]
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    if config.model.get('rpn_head', {}).get('anchor_generator', {}).get('type') == 'LegacyAnchorGenerator':
        # With `allowed_border=0` anchors of the coarse levels do not fit into so small an image.
        still = {name for name in still if not name.startswith(('neck.fpn_convs.2', 'neck.fpn_convs.3'))}
    # Convolutions and normalisations inside a block whose last normalisation is zero have no gradient yet.
    assert not [name for name in still if '.conv3.' not in name and 'network.layer' not in name]
    assert not [name for name in still if '.bn3.' in name and name.endswith('weight')]


def test_the_papers_setting():
    config = read('mask_rcnn_slim')
    assert config.model.backbone.widths == (1.0, 0.75, 0.5, 0.25)
    assert config.model.backbone.weights == 'slimclr_resnet50.mocov2_800e_in1k'
    assert config.sync_bn == 'torch'
    assert config.train_cfg.max_epochs == 12
    assert config.optim_wrapper.optimizer.lr == 0.02
    assert config.auto_scale_lr.base_batch_size == 16
    model = MODELS.build(config.model).train()
    assert all(p.requires_grad for p in model.parameters())
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert all(m.training for m in norms.values())
    assert all(name.startswith('backbone.') for name in norms)  # none in neck or heads


def test_the_reference_codes_setting():
    config = read('mask_rcnn_slim_reference')
    model = config.model
    assert config.optim_wrapper.optimizer.lr == 0.08
    assert config.optim_wrapper.clip_grad.max_norm == 35
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 64
    assert model.rpn_head.loss_bbox == {'type': 'SmoothL1Loss', 'beta': 1 / 9, 'loss_weight': 1.0}
    assert model.roi_head.bbox_head.loss_bbox == {'type': 'SmoothL1Loss', 'beta': 1.0, 'loss_weight': 1.0}
    for proposals in model.train_cfg.rpn_proposal, model.test_cfg.rpn:
        assert proposals.nms_pre == proposals.max_per_img == 2000
    resize = next(step for step in config.train_dataloader.dataset.pipeline if step.type == 'Resize')
    assert resize.scale == (1333, 800)  # a single scale


@pytest.mark.parametrize('name', ['mask_rcnn_slim', 'faster_rcnn_slim'])
def test_the_folder_of_coco_is_named_once(name):
    config = read(name, COCO_ROOT='/data/elsewhere')
    for loader in config.train_dataloader, config.val_dataloader, config.test_dataloader:
        assert loader.dataset.data_root == '/data/elsewhere'
        assert loader.dataset.type == 'CocoFolder'
    for evaluator in config.val_evaluator, config.test_evaluator:
        assert evaluator.ann_file == '/data/elsewhere/annotations/instances_val2017.json'
    assert read(name).train_dataloader.dataset.data_root == 'data/coco'


def test_derived_configurations():
    assert read('mask_rcnn_slim_2x').train_cfg.max_epochs == 24
    assert read('mask_rcnn_slim_2x').param_scheduler[1].milestones == [16, 22]
    assert read('mask_rcnn_slim_supervised').model.backbone.weights == 'runs/supervised_resnet50_imagenet_100e'
    single = read('mask_rcnn_slim_w050').model
    assert single.backbone.widths == (0.5,)
    assert single.neck.in_channels == [128, 256, 512, 1024]
    assert read('faster_rcnn_slim').val_evaluator.metric == 'bbox'
    assert read('retinanet_slim').optim_wrapper.optimizer.lr == 0.01
