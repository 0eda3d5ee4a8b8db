"""Convert the authors' detector, a checkpoint of MMDetection 0.6, to the names and class order of MMDetection 3."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.files import atomic_files
from slimclr_hub.hub.folder import check_file
from slimclr_hub.models.convert import convert
from slimclr_hub.weights.checkpoint import check_values, read_checkpoint
from slimclr_hub.weights.layouts import Layout, layout_of, mismatches
from slimclr_hub.weights.tensor_file import save_pickle

NETWORK = 'backbone.network.'
"""Prefix of the backbone's tensors in a slimmable detector, before their names in this package."""

_CATEGORIES = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories']
CLASSES = tuple(name for name in _CATEGORIES if name not in ('__background__', 'N/A'))
"""The 80 classes of COCO by ascending id, the order in every version of MMDetection."""

_ROI_HEADS = ('bbox_head.', 'mask_head.')
_DETECTOR = ('rpn_head.', 'roi_head.', *_ROI_HEADS)
_ROWS = {'bbox_head.fc_cls': 1, 'bbox_head.fc_reg': 4, 'mask_head.conv_logits': 1}
"""Layers with outputs for each class -> outputs of one class."""
_LEAVES = ('weight', 'bias')
_SWITCHED = re.compile(r'\bbn\.\d+\.')

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ConvertedDetector:
    """Detector in a converted file: its backbone, its classes without the background, and True for a Mask R-CNN."""

    backbone: Layout
    num_classes: int
    has_masks: bool


def is_detector(names: Iterable[str]) -> bool:
    """True if tensors of these names belong to a detector, not to a backbone alone."""
    return any(name.removeprefix('module.').startswith(_DETECTOR) for name in names)


def convert_detector(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Convert the tensors of the authors' Mask R-CNN, or of a Faster R-CNN like it, for `SlimmableMaskRCNN`.

    In MMDetection 0.6 the background is class 0 and has a box and a mask; since 2.0 it comes after the classes and has
    neither (MMDetection's notes on compatibility, "Codebase Conventions"). So the first row of the classifier becomes
    its last, and the first box and mask are dropped, in weights and biases alike. (MMDetection's own
    `upgrade_model_version.py` cuts the biases at the other end, which gives each class the bias of the one before it.)

    Box coding, anchors and RoIAlign differ as well; these are up to the config, `transfer/mask_rcnn_slim_reference.py`.
    Names may begin with `module.`.

    Raises:
        InputError: A tensor is missing, unexpected, misshapen or not of finite real numbers, and is named, or this is
            no such detector.
    """
    names = {name.removeprefix('module.'): tensor for name, tensor in tensors.items()}
    if any(name.startswith('roi_head.') for name in names):
        raise InputError('the tensors have the names of MMDetection 2 or 3 (roi_head) already; 0.6 has bbox_head')
    backbone = {name: tensor for name, tensor in names.items() if name.startswith('backbone.')}
    if backbone and not any(map(_SWITCHED.search, backbone)):
        raise InputError('the backbone is not slimmable: it has no normalisation for each width (backbone.bn1.bn.0)')
    network: dict[str, torch.Tensor] = {}
    problems = []
    try:
        network = convert(backbone)
    except InputError as error:
        problems.append(f'backbone: {error}')
    parts = {name: tensor for name, tensor in names.items() if name not in backbone}
    expected = _shapes(_num_classes(parts), any(name.startswith('mask_head.') for name in parts))
    problems += mismatches(expected, {name: tensor.shape for name, tensor in parts.items()})
    problems += [f'backbone.{name} is not expected' for name in network if name.startswith('fc.')]
    if problems:
        raise InputError(f"not the authors' detector of MMDetection 0.6: {shorten(problems)}")
    for name, tensor in parts.items():
        check_values(name, tensor)
    return {
        **{NETWORK + name: tensor for name, tensor in network.items()},
        **{f'roi_head.{n}' if n.startswith(_ROI_HEADS) else n: _reordered(n, parts[n]) for n in expected},
    }


def convert_detector_file(source: Path, target: Path, overwrite: bool = False) -> ConvertedDetector | None:
    """Convert a checkpoint by `convert_detector` into one that MMDetection 3 reads, and write it atomically.

    Its `meta` names the classes if there are 80, as in COCO. Without `overwrite` no file is replaced.

    Returns:
        The converted detector, or None if the source is no detector.

    Raises:
        InputError: The source cannot be read or is another detector, or the target exists.
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
    meta = {'dataset_meta': {'classes': CLASSES}} if num_classes == len(CLASSES) else {}
    with atomic_files(target.parent) as partial:
        save_pickle({'meta': meta, 'state_dict': converted}, partial / target.name)
    network = {name.removeprefix(NETWORK): t.shape for name, t in converted.items() if name.startswith(NETWORK)}
    return ConvertedDetector(layout_of(network), num_classes, 'roi_head.mask_head.conv_logits.weight' in converted)


def _num_classes(parts: Tensors) -> int:
    # By majority, so that a misshapen layer is found.
    names = {f'{layer}.{leaf}': rows for layer, rows in _ROWS.items() for leaf in _LEAVES}
    votes = Counter(len(parts[n]) // rows - 1 for n, rows in names.items() if n in parts and parts[n].ndim)
    if not votes or (most := votes.most_common(1)[0][0]) < 1:
        raise InputError('no box detector: bbox_head.fc_cls and fc_reg are missing or have no class')
    return most


def _shapes(num_classes: int, has_masks: bool) -> dict[str, tuple[int, ...]]:
    """Return names in MMDetection 0.6 and shapes of all tensors but the backbone's."""
    layers: dict[str, tuple[int, ...]] = {
        **{f'neck.lateral_convs.{i}.conv': (256, 256 * 2**i, 1, 1) for i in range(4)},
        **{f'neck.fpn_convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
        'rpn_head.rpn_conv': (256, 256, 3, 3),
        'rpn_head.rpn_cls': (3, 256, 1, 1),
        'rpn_head.rpn_reg': (12, 256, 1, 1),
        'bbox_head.fc_cls': (num_classes + 1, 1024),
        'bbox_head.fc_reg': (4 * (num_classes + 1), 1024),
        'bbox_head.shared_fcs.0': (1024, 256 * 7 * 7),
        'bbox_head.shared_fcs.1': (1024, 1024),
    }
    if has_masks:
        layers |= {f'mask_head.convs.{i}.conv': (256, 256, 3, 3) for i in range(4)}
        layers |= {'mask_head.upsample': (256, 256, 2, 2), 'mask_head.conv_logits': (num_classes + 1, 256, 1, 1)}
    return {f'{name}.{leaf}': s if leaf == 'weight' else s[:1] for name, s in layers.items() for leaf in _LEAVES}


def _reordered(name: str, tensor: torch.Tensor) -> torch.Tensor:
    rows = _ROWS.get(name.rpartition('.')[0])
    if rows is None:
        return tensor.contiguous()
    background, classes = tensor[:rows], tensor[rows:]
    # A copy, since saving a view would save all that it looks into.
    return torch.cat([classes, background]) if '.fc_cls.' in name else classes.clone()
