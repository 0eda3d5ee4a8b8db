"""Mask R-CNN at four widths from supervised pre-training, the paper's baseline: what a run of ours left."""

_base_ = 'mask_rcnn_slim.py'

model = dict(backbone=dict(weights='runs/supervised_resnet50_imagenet_100e'))
