"""Mask R-CNN at four widths from supervised pre-training, the paper's baseline, as a run of that name has."""

_base_ = 'mask_rcnn_slim.py'

model = dict(backbone=dict(weights='runs/supervised_resnet50_imagenet_100e'))
