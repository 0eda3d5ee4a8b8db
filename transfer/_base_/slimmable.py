"""What every slimmable detector here shares: training and evaluation of each width, and MMDetection's 1x schedule."""

_base_ = ['mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['slimclr_hub.detection.mmdetection'], allow_failed_imports=False)
model_wrapper_cfg = dict(type='SlimmableDistributedDataParallel')
sync_bn = 'torch'  # over the GPUs; one process has ordinary normalisation
val_cfg = dict(type='SlimmableValLoop')
test_cfg = dict(type='SlimmableTestLoop')  # one width: --cfg-options test_cfg.widths=0.5
custom_hooks = [
    dict(type='WidthReportHook'),
    dict(type='CheckpointGuardHook'),
    dict(type='SyncBuffersHook'),  # where there is no SyncBN, the mean of the processes' statistics
]
