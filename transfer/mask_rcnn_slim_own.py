"""Mask R-CNN at four widths on images and classes of your own, in COCO's format; docs/detection.md says more.

The folder is the environment variable COCO_ROOT. Classes are those that its annotations/train.json names.
"""

_base_ = 'mask_rcnn_slim.py'  # before the import, or mmengine takes this for a config of its other kind

from slimclr_hub.detection.mmdetection.datasets import class_names  # noqa: E402

data_root = '{{$COCO_ROOT:data/mine}}'
classes = class_names(data_root)

heads = dict(num_classes=len(classes))
model = dict(roi_head=dict(bbox_head=heads, mask_head=heads))


def images(split: str) -> dict:
    """Data of one split."""
    return dict(
        dataset=dict(
            data_root=data_root,
            ann_file=f'annotations/{split}.json',
            data_prefix=dict(img=split),
            metainfo=dict(classes=classes),
        )
    )


train_dataloader = images('train')
val_dataloader = images('val')
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/val.json')
test_evaluator = val_evaluator
