"""Faster R-CNN R50-FPN at four widths: boxes alone."""

_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '_base_/coco_detection.py', '_base_/slimmable.py']

model = dict(
    type='SlimmableFasterRCNN',
    backbone=dict(
        _delete_=True,
        type='SlimmableResNet',
        name='slimclr_resnet50',
        widths=(1.0, 0.75, 0.5, 0.25),
        weights='slimclr_resnet50.mocov2_800e_in1k',
    ),
    neck=dict(type='SlimmableFPN'),
)
