"""The authors' detector, a checkpoint of MMDetection 0.6, in the names and class order of MMDetection 3."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from slimclr_hub.detection.coco import CLASSES
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.files import atomic_files
from slimclr_hub.hub.conversion import check_file
from slimclr_hub.models.convert import convert
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import Layout, differences, layout_of

NETWORK = 'backbone.network.'
"""What the backbone's tensors are called in a slimmable detector, before their names in this package."""

_ROI_HEADS = ('bbox_head.', 'mask_head.')
_DETECTOR = ('rpn_head.', 'roi_head.', *_ROI_HEADS)
_ROWS = {'bbox_head.fc_cls': 1, 'bbox_head.fc_reg': 4, 'mask_head.conv_logits': 1}
"""Layers with outputs for each class -> how many for one."""
_LEAVES = ('weight', 'bias')
_SWITCHED = re.compile(r'\bbn\.\d+\.')
_LEVELS, _CHANNELS, _HIDDEN, _POOLED, _ANCHORS = (256, 512, 1024, 2048), 256, 1024, 7, 3

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ConvertedDetector:
    """What a conversion made.

    Args:
        path: The file.
        backbone: The network in it.
        num_classes: Classes, the background not counted.
        has_masks: Whether it is a Mask R-CNN, and not a Faster R-CNN.
    """

    path: Path
    backbone: Layout
    num_classes: int
    has_masks: bool


def is_detector(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a detector, and not of a backbone alone."""
    return any(name.removeprefix('module.').startswith(_DETECTOR) for name in names)


def convert_detector(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of the authors' Mask R-CNN, or of a Faster R-CNN like it, for `SlimmableMaskRCNN`.

    MMDetection 0.6 counts the background as class 0, and has a box and a mask for it; since 2.0 it comes after the
    classes, and has neither (MMDetection's notes on compatibility, "Codebase Conventions"). So the first row of the
    classifier becomes its last, and the first box and mask go: weights and biases alike, whereas MMDetection's own
    `upgrade_model_version.py` cuts the biases at the other end, which gives each class the bias of the one before it.

    Boxes, anchors and the pooling of regions are computed differently there, too, which no tensor can tell: a config
    has to, as `transfer/mask_rcnn_slim_reference.py` does.

    Args:
        tensors: State dict of the checkpoint, with or without `module.`.

    Raises:
        InputError: A tensor is missing, unexpected or misshapen, which is named, or it is not such a detector.
    """
    names = {name.removeprefix('module.'): tensor for name, tensor in tensors.items()}
    if any(name.startswith('roi_head.') for name in names):
        raise InputError('the tensors have the names of MMDetection 2 or 3 (roi_head) already; 0.6 has bbox_head')
    backbone = {name: tensor for name, tensor in names.items() if name.startswith('backbone.')}
    if backbone and not any(map(_SWITCHED.search, backbone)):
        raise InputError('the backbone is not slimmable: it has no normalisation for each width (backbone.bn1.bn.0)')
    problems = []
    network: dict[str, torch.Tensor] = {}
    try:
        network = convert(backbone)
    except InputError as error:
        problems.append(f'backbone: {error}')
    parts = {name: tensor for name, tensor in names.items() if name not in backbone}
    expected = _shapes(_num_classes(parts), any(name.startswith('mask_head.') for name in parts))
    problems += differences(expected, {name: tensor.shape for name, tensor in parts.items()})
    problems += [f'backbone.{name} is not expected' for name in network if name.startswith('fc.')]
    if problems:
        raise InputError(f"not the authors' detector of MMDetection 0.6: {shorten(problems)}")
    return {
        **{NETWORK + name: tensor for name, tensor in network.items()},
        **{_new_name(name): _reordered(name, parts[name]) for name in expected},
    }


def convert_detector_file(source: Path, target: Path, overwrite: bool = False) -> ConvertedDetector | None:
    """Convert a checkpoint as `convert_detector` does into one that MMDetection 3 reads, whole or not at all.

    Its `meta` names the classes if they are COCO's 80.

    Args:
        source: A checkpoint of MMDetection 0.6.
        target: The file to write, in `.pth`.
        overwrite: Replace it if it is there.

    Returns:
        What was made, or nothing where the source is no detector at all.

    Raises:
        InputError: The source cannot be read or is not such a detector, or the target is there already.
    """
    tensors = read_checkpoint(source)
    if not is_detector(tensors):
        return None
    check_file(target, overwrite)
    try:
        converted = convert_detector(tensors)
    except InputError as error:
        raise InputError(f'{source}: {error}') from error
    num_classes = len(converted['roi_head.bbox_head.fc_cls.bias']) - 1
    known = num_classes == len(CLASSES)
    content = {
        'meta': {'dataset_meta': {'classes': CLASSES}} if known else {},
        'state_dict': converted,
    }
    with atomic_files(target.parent) as partial:
        torch.save(content, partial / target.name)
    network = {name.removeprefix(NETWORK): t.shape for name, t in converted.items() if name.startswith(NETWORK)}
    has_masks = any(name.startswith('roi_head.mask_head.') for name in converted)
    return ConvertedDetector(target, layout_of(network), num_classes, has_masks)


def _num_classes(parts: Tensors) -> int:
    # By majority, so that one that is misshapen is found to be.
    votes: Counter[int] = Counter()
    for layer, rows in _ROWS.items():
        for leaf in _LEAVES:
            if (name := f'{layer}.{leaf}') in parts and parts[name].ndim:
                votes[len(parts[name]) // rows - 1] += 1
    if not votes or (most := votes.most_common(1)[0][0]) < 1:
        raise InputError('no detector of boxes: bbox_head.fc_cls and fc_reg are missing or have no class')
    return most


def _shapes(num_classes: int, has_masks: bool) -> dict[str, tuple[int, ...]]:
    """Name in MMDetection 0.6 and shape of each tensor beside the backbone's, of which only the neck sees the depth."""
    layers: dict[str, tuple[int, ...]] = {}
    for i, channels in enumerate(_LEVELS):
        layers[f'neck.lateral_convs.{i}.conv'] = (_CHANNELS, channels, 1, 1)
    for i in range(len(_LEVELS)):
        layers[f'neck.fpn_convs.{i}.conv'] = (_CHANNELS, _CHANNELS, 3, 3)
    layers['rpn_head.rpn_conv'] = (_CHANNELS, _CHANNELS, 3, 3)
    layers['rpn_head.rpn_cls'] = (_ANCHORS, _CHANNELS, 1, 1)
    layers['rpn_head.rpn_reg'] = (4 * _ANCHORS, _CHANNELS, 1, 1)
    layers['bbox_head.fc_cls'] = (num_classes + 1, _HIDDEN)
    layers['bbox_head.fc_reg'] = (4 * (num_classes + 1), _HIDDEN)
    layers['bbox_head.shared_fcs.0'] = (_HIDDEN, _CHANNELS * _POOLED**2)
    layers['bbox_head.shared_fcs.1'] = (_HIDDEN, _HIDDEN)
    if has_masks:
        for i in range(4):
            layers[f'mask_head.convs.{i}.conv'] = (_CHANNELS, _CHANNELS, 3, 3)
        layers['mask_head.upsample'] = (_CHANNELS, _CHANNELS, 2, 2)
        layers['mask_head.conv_logits'] = (num_classes + 1, _CHANNELS, 1, 1)
    return {f'{name}.{leaf}': s if leaf == 'weight' else s[:1] for name, s in layers.items() for leaf in _LEAVES}


def _new_name(name: str) -> str:
    return f'roi_head.{name}' if name.startswith(_ROI_HEADS) else name


def _reordered(name: str, tensor: torch.Tensor) -> torch.Tensor:
    rows = _ROWS.get(name.rpartition('.')[0])
    if rows is None:
        return tensor.contiguous()
    background, classes = tensor[:rows], tensor[rows:]
    # A copy in any case: saving a view saves all that it looks into.
    return torch.cat([classes, background]) if '.fc_cls.' in name else classes.clone()
