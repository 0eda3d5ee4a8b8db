"""Shared by all slimmable detectors: training and evaluation of every width, and MMDetection's 1x schedule."""

_base_ = ['mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['slimclr_hub.detection.mmdetection'], allow_failed_imports=False)
model_wrapper_cfg = dict(type='SlimmableDistributedDataParallel')
sync_bn = 'torch'  # statistics over the GPUs; one process keeps ordinary BN
val_cfg = dict(type='SlimmableValLoop')
test_cfg = dict(type='SlimmableTestLoop')  # for one width: --cfg-options test_cfg.widths=0.5
custom_hooks = [
    dict(type='WidthReportHook'),
    dict(type='CheckpointGuardHook'),
    dict(type='SyncBuffersHook'),  # without SyncBN, averages the statistics of the processes
    dict(type='ClassesGuardHook'),
]
