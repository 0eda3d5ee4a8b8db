"""MMDetection's COCO 2017 without masks, in the folder COCO_ROOT."""

_base_ = 'mmdet::_base_/datasets/coco_detection.py'

data_root = '{{$COCO_ROOT:data/coco}}'
coco = dict(dataset=dict(type='CocoFolder', data_root=data_root))
train_dataloader = coco
val_dataloader = coco
test_dataloader = coco
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator
