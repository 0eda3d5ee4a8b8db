"""Mask R-CNN at four widths on the coins of scikit-image: real images, few enough for two CPU cores.

Pyramid and heads are narrower than on COCO, and weights start at random. The first run writes the images.
"""

_base_ = 'mask_rcnn_slim.py'

data_root = '{{$COINS_ROOT:data/coins}}'
channels = 64
regions = dict(sampler=dict(num=64))

model = dict(
    backbone=dict(weights=None),
    neck=dict(out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=1),
    ),
    train_cfg=dict(rpn=regions, rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=regions),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

size = (192, 192)  # pixels, at most
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=4,
        dataset=dict(
            type='CoinsFolder',
            data_root=data_root,
            ann_file='annotations/train.json',
            data_prefix=dict(img='train'),
            pipeline=train_pipeline,
        ),
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type='CoinsFolder',
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/val.json')
test_evaluator = val_evaluator

sync_bn = None
train_cfg = dict(max_epochs=10, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=40),
    dict(type='MultiStepLR', begin=0, end=10, by_epoch=True, milestones=[7, 9], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=10, norm_type=2))
default_hooks = dict(logger=dict(interval=8), checkpoint=dict(interval=2))
