"""Mask R-CNN at four widths with the settings of the authors' code for MMDetection 0.6.

It also evaluates the authors' detector, converted by `slimclr-hub convert`: box coding, anchors and RoIAlign are
those of that version.
"""

_base_ = 'mask_rcnn_slim.py'

legacy_coder = dict(type='LegacyDeltaXYWHBBoxCoder')
proposals = dict(nms_pre=2000, max_per_img=2000)
pooling = dict(roi_layer=dict(sampling_ratio=2, aligned=False))

model = dict(
    rpn_head=dict(
        anchor_generator=dict(type='LegacyAnchorGenerator', center_offset=0.5),
        bbox_coder=legacy_coder,
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0),
    ),
    roi_head=dict(
        bbox_roi_extractor=pooling,
        mask_roi_extractor=pooling,
        bbox_head=dict(bbox_coder=legacy_coder, loss_bbox=dict(type='SmoothL1Loss', beta=1.0)),
    ),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rpn_proposal=proposals,
        rcnn=dict(assigner=dict(match_low_quality=True)),
    ),
    test_cfg=dict(rpn=proposals),
)
train_dataloader = dict(batch_size=8, num_workers=4)  # on each of eight GPUs
optim_wrapper = dict(optimizer=dict(lr=0.08), clip_grad=dict(max_norm=35, norm_type=2))
auto_scale_lr = dict(base_batch_size=64)
