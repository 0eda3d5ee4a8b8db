"""Mask R-CNN at width 0.5 alone: the individual network, from the same weights."""

_base_ = 'mask_rcnn_slim.py'

model = dict(backbone=dict(widths=(0.5,)), neck=dict(in_channels=[128, 256, 512, 1024]))
