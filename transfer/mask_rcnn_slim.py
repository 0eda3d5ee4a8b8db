"""Mask R-CNN R50-FPN at four widths, as in section 4.3 of the paper: 1x, SyncBN in the backbone, nothing frozen."""

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '_base_/coco_instance.py', '_base_/slimmable.py']

model = dict(
    type='SlimmableMaskRCNN',
    backbone=dict(
        _delete_=True,
        type='SlimmableResNet',
        name='slimclr_resnet50',
        widths=(1.0, 0.75, 0.5, 0.25),
        weights='slimclr_resnet50.mocov2_800e_in1k',
    ),
    neck=dict(type='SlimmableFPN'),
)
