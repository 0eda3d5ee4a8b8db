"""A small detector for tests: a slimmable ResNet-20 with narrow heads, on random images."""

import copy
from functools import cache
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from tests.hub.files import ROOT
from tests.networks import randomise_batchnorm

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SIZE = 32  # pixels
_CHANNELS = 8
_ALL = 10**6  # more than there are, so that the samplers draw nothing at random

DefaultScope.get_instance('tests', scope_name='mmdet')


@cache
def _config() -> Config:
    anchors = dict(scales=[6], ratios=[1.0], strides=[1, 2, 4, 8])
    extractor = dict(out_channels=_CHANNELS, featmap_strides=[1, 2, 4])
    regions = dict(
        assigner=dict(pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.2), sampler=dict(num=_ALL, pos_fraction=0.5)
    )
    proposals = dict(nms_pre=60, max_per_img=20)
    small = dict(
        backbone=dict(name='slimclr_resnet20', widths=WIDTHS, out_indices=(0, 1, 2)),
        neck=dict(in_channels=[16, 32, 64], out_channels=_CHANNELS, num_outs=4),
        rpn_head=dict(in_channels=_CHANNELS, feat_channels=_CHANNELS, anchor_generator=anchors),
        roi_head=dict(
            bbox_roi_extractor=dict(**extractor, roi_layer=dict(output_size=3, sampling_ratio=1)),
            bbox_head=dict(in_channels=_CHANNELS, fc_out_channels=16, roi_feat_size=3),
            mask_roi_extractor=dict(**extractor, roi_layer=dict(output_size=4, sampling_ratio=1)),
            mask_head=dict(num_convs=1, in_channels=_CHANNELS, conv_out_channels=_CHANNELS),
        ),
        train_cfg=dict(rpn=regions, rpn_proposal=proposals, rcnn=dict(**regions, mask_size=8)),
        test_cfg=dict(rpn=proposals, rcnn=dict(score_thr=0.0, max_per_img=10)),
    )
    config = Config.fromfile(ROOT / 'transfer' / 'mask_rcnn_slim_coins.py')
    config.merge_from_dict(dict(model=small))
    return config


def config(**changes: Any) -> ConfigDict:
    """Return the config of a Mask R-CNN of one class whose samplers take every region."""
    merged = copy.deepcopy(_config().model)
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    return merged


def detector(seed: int = 0, **changes: Any) -> Any:
    """Build the detector with normalisations that differ between widths."""
    torch.manual_seed(seed)
    model = MODELS.build(config(**changes))
    model.init_weights()
    randomise_batchnorm(model)
    return model


def batch(count: int = 2, seed: int = 0, size: int = SIZE) -> dict[str, Any]:
    """Return images with one or two squares, in the form of the data loader."""
    generator = torch.Generator().manual_seed(seed)
    images, samples = [], []
    for i in range(count):
        images.append(torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8))
        boxes = torch.tensor([[2.0, 3.0, 10.0 + 2 * i, 11.0], [15.0, 14.0, 23.0, 24.0 + 3 * i]])[: 2 - (seed + i) % 2]
        boxes = boxes * size / SIZE
        masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(img_id=i, img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0))
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long), masks=BitmapMasks(masks.numpy(), size, size)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return {'inputs': images, 'data_samples': samples}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copy every parameter's gradient, zeros if it has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def width_gradients(model: Any, data: dict[str, Any], width: float) -> dict[str, torch.Tensor]:
    """Return the gradients of one width's losses by MMDetection's own forward."""
    model.zero_grad()
    with model.set_width(width):
        losses = model(**model.data_preprocessor(data, True), mode='loss')
        model.parse_losses(losses)[0].backward()
    return gradients(model)
