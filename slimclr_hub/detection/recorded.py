"""The config that a detector's checkpoint records, carried over value by value.

A config of MMDetection is a program: hooks, visualizers, data sets and initial weights are called by the names in it,
and modules are imported. So of a checkpoint's config only the network goes on, by the types and keys named here, and
from the data set the paths and sizes; the rest of the config of an extracted detector is written here.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from slimclr_hub.detection.mmengine_files import parse_values
from slimclr_hub.errors import InputError
from slimclr_hub.text import last_part

if TYPE_CHECKING:
    from mmengine.config import Config

# Of MMDetection and mmcv; each reads its arguments alone, and no file.
_TYPE_NAMES = """
    SlimmableMaskRCNN SlimmableFasterRCNN SlimmableRetinaNet SlimmableResNet SlimmableFPN DetDataPreprocessor RPNHead
    RetinaHead StandardRoIHead SingleRoIExtractor RoIAlign Shared2FCBBoxHead Shared4Conv1FCBBoxHead ConvFCBBoxHead
    FCNMaskHead AnchorGenerator LegacyAnchorGenerator DeltaXYWHBBoxCoder LegacyDeltaXYWHBBoxCoder CrossEntropyLoss
    FocalLoss L1Loss SmoothL1Loss IoULoss GIoULoss BN SyncBN GN LN ReLU Conv deconv nearest bilinear nms soft_nms
"""
# Of the network, of its boxes, of the losses, which choose the channels of classifiers, and of images and predictions.
_KEY_NAMES = """
    backbone neck rpn_head roi_head bbox_head mask_head data_preprocessor name widths overlap out_indices
    frozen_stages norm_eval with_cp in_channels out_channels num_outs start_level end_level add_extra_convs
    relu_before_extra_convs no_norm_on_lateral feat_channels stacked_convs num_convs num_classes conv_out_channels
    fc_out_channels roi_feat_size reg_class_agnostic with_avg_pool num_shared_convs num_shared_fcs num_cls_convs
    num_cls_fcs num_reg_convs num_reg_fcs conv_kernel_size class_agnostic norm_cfg conv_cfg act_cfg upsample_cfg
    requires_grad num_groups eps momentum scale_factor mode inplace reg_decoded_bbox predict_box_type
    anchor_generator bbox_coder scales ratios strides base_sizes octave_base_scale scales_per_octave center_offset
    centers target_means target_stds clip_border add_ctr_clamp ctr_clamp bbox_roi_extractor mask_roi_extractor
    roi_layer featmap_strides finest_scale output_size sampling_ratio aligned pool_mode spatial_scale
    loss_cls loss_bbox loss_mask loss_weight use_sigmoid use_mask reduction beta gamma alpha avg_non_ignore
    ignore_index class_weight activated
    mean std bgr_to_rgb rgb_to_bgr pad_mask pad_size_divisor pad_value mask_pad_value test_cfg rpn rcnn nms nms_pre
    max_per_img min_bbox_size score_thr iou_threshold mask_thr_binary min_score sigma split_thr
"""
_TYPES, _KEYS = frozenset(_TYPE_NAMES.split()), frozenset(_KEY_NAMES.split())
_LEFT_OUT = ('init_cfg', 'weights', 'train_cfg', '_scope_')  # they are of no use to a trained network
_COUNTED = re.compile(r'(num|stacked)_\w*(convs|fcs|outs)$')  # keys of the number of layers
_WORD = re.compile(r'[A-Za-z]\w{0,40}')
_PATH = re.compile(r'[^\x00-\x1f"\'{}\\]{1,1000}')  # mmengine fills in what stands in braces
_MOST_ITEMS, _LARGEST = 64, 100_000
_LARGEST_IMAGE, _LARGEST_DIVISOR = 10_000, 256  # pixels
_COCO = ('CocoDataset', 'CocoFolder', 'CoinsFolder')
_META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')


def recorded_config(meta: Mapping[str, Any], tensors: int) -> 'Config':
    """Make the config of a slimmable detector from a checkpoint's `meta`: its network, and evaluation on its data.

    Evaluation is written here, for data in COCO's format; without such data in the config it is left out, and without
    names of the classes that a config can hold, since MMDetection would take those of COCO.

    Args:
        meta: Record of a run of mmengine, in which `cfg` is the text of the config.
        tensors: Number of the checkpoint's tensors, which bounds that of layers.

    Raises:
        InputError: There is no config, or its network has a type, key or value that is not carried over.
    """
    from mmengine.config import Config

    values = parse_values(meta.get('cfg'))
    model = values.get('model')
    if not isinstance(model, dict):
        raise InputError('the config in its meta has no model; add --config')
    network = {**_part(model, 'model', tensors), 'train_cfg': None}
    heads = network.get('roi_head')
    masks = isinstance(heads, dict) and heads.get('mask_head') is not None
    evaluation = _evaluation(values.get('test_dataloader'), classes_of(meta), masks)
    return Config({'default_scope': 'mmdet', 'model': network, **evaluation})


def classes_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes in a checkpoint's `meta`; none if they are not there or no printable names."""
    about = meta.get('dataset_meta')
    names = about.get('classes') if isinstance(about, Mapping) else None
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n.isprintable() for n in names):
        return ()
    return tuple(names)


def _part(part: Mapping[str, Any], where: str, tensors: int) -> dict[str, Any]:
    taken = {}
    for key, value in part.items():
        if key in _LEFT_OUT:
            continue
        name = f'{where}.{key}'
        if key == 'type':
            if (kind := last_part(value)) not in _TYPES:
                raise _stranger(name, value)
            taken[key] = kind
        elif key not in _KEYS:
            raise _stranger(name, value)
        else:
            largest = tensors if _COUNTED.match(key) else _LARGEST_DIVISOR if key == 'pad_size_divisor' else _LARGEST
            taken[key] = _value(value, name, tensors, largest)
    return taken


def _value(value: Any, name: str, tensors: int, largest: int) -> Any:
    match value:
        case dict():
            return _part(value, name, tensors)
        case list() | tuple() if len(value) <= _MOST_ITEMS:
            return type(value)(_value(item, name, tensors, largest) for item in value)
        case None | bool():
            return value
        case int() | float() if -largest <= value <= largest:
            return value
        case str() if _WORD.fullmatch(value):
            return value
    raise _stranger(name, value)


def _stranger(name: str, value: object) -> InputError:
    text = repr(value)
    text = text if len(text) < 60 else f'{text[:56]} ...'
    return InputError(
        f'{name} in the config of its meta is {text}, which is not taken from a checkpoint; add --config, with the '
        'config of your own that it was trained with'
    )


def _evaluation(loader: Any, classes: tuple[str, ...], masks: bool) -> dict[str, Any]:
    dataset = loader.get('dataset') if isinstance(loader, dict) else None
    if not isinstance(dataset, dict) or last_part(dataset.get('type')) not in _COCO:
        return {}
    prefix = dataset.get('data_prefix')
    images = prefix.get('img') if isinstance(prefix, dict) else None
    paths = [dataset.get('data_root'), dataset.get('ann_file'), images]
    if not all(isinstance(path, str) and _PATH.fullmatch(path) and '://' not in path for path in paths):
        return {}
    root, annotations, images = map(str, paths)
    if not annotations.endswith('.json') or not classes or not all(map(_PATH.fullmatch, classes)):
        return {}
    data = {
        'type': 'CocoDataset',
        'data_root': root,
        'ann_file': annotations,
        'data_prefix': {'img': images},
        'metainfo': {'classes': classes},
        'test_mode': True,
        'pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'Resize', 'scale': _scale(dataset.get('pipeline')), 'keep_ratio': True},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': masks},
            {'type': 'PackDetInputs', 'meta_keys': _META_KEYS},
        ],
    }
    evaluator = {
        'type': 'CocoMetric',
        'ann_file': str(PurePosixPath(root) / annotations),
        'metric': ['bbox', 'segm'] if masks else 'bbox',
    }
    loader = {
        'batch_size': 1,
        'num_workers': 2,
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'dataset': data,
    }
    drawn = {'type': 'DetLocalVisualizer', 'name': 'visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]}
    return {
        'test_dataloader': loader,
        'test_evaluator': evaluator,
        'test_cfg': {'type': 'TestLoop'},
        'default_hooks': {'visualization': {'type': 'DetVisualizationHook'}},  # for --show-dir
        'visualizer': drawn,
    }


def _scale(pipeline: Any) -> tuple[int, int]:
    """Size of images in a pipeline's resizing, else MMDetection's."""
    for step in pipeline if isinstance(pipeline, list) else ():
        if isinstance(step, dict) and last_part(step.get('type')) == 'Resize':
            match step.get('scale'):
                case [int(first), int(second)] if min(first, second) > 0 and max(first, second) <= _LARGEST_IMAGE:
                    return first, second
    return 1333, 800
