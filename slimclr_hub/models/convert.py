"""Conversion of others' checkpoints to this package's names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.models.loading import check_complete
from slimclr_hub.weights.checkpoint import check_form, check_values
from slimclr_hub.weights.layouts import ARCHITECTURES
from slimclr_hub.weights.slices import (
    WIDTH_DIGITS,
    leading,
    scale_channels,
    switch_name,
    switched_key,
    width_key,
    with_batch_counts,
)

_PREFIXES = {
    # MoCo v2, MoCo v3, this package's detectors, and others' or this package's backbone; a bare network has none.
    'online': ('encoder_q.', 'base_encoder.', 'student.backbone.', 'backbone.network.', 'backbone.', ''),
    'momentum': ('encoder_k.', 'momentum_encoder.', 'teacher.backbone.'),
}
_HEADS = ('projection_head', 'prototypes', 'projector', 'predictor', 'head', 'classifier')
_WRAPPERS = re.compile(r'(^|\.)(?:(?:module|_orig_mod)\.)+')  # of DistributedDataParallel and torch.compile
# Parts of a name that differ from timm's where a ResNet is a sequence, as in lightly, and in transformers.
_SEQUENCE = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
_OF_SEQUENCE = re.compile(r'^(.*\.|)4\.0\.conv1\.weight$')
_OF_TRANSFORMERS = re.compile(
    r'^(?:.*\.)?(?:embedder\.embedder|encoder\.stages\.(\d)\.layers\.(\d{1,3})\.(?:layer\.(\d)|shortcut))'
    r'\.(convolution|normalization)\.(\w+)$'
)
_FIRST = 'conv1.weight'
_AUTHORS_NORM = re.compile(r'^(.*\.|)bn\.(\d{1,4})\.weight$')
_AUTHORS_SWITCHED = re.compile(r'\.(?:bn|linears)\.(\d{1,4})\.')
_AUTHORS_BLOCK = re.compile(r'^features\.(\d{1,4})\.')

Tensors = Mapping[str, torch.Tensor]


def convert(
    tensors: Tensors, encoder: str = 'online', widths: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
) -> dict[str, torch.Tensor]:
    """Rename the tensors of a checkpoint to those of a slimmable ResNet here, and check that they are complete.

    Accepted are the authors' checkpoints (pre-training by MoCo v2 and v3, the switchable probe, Mask R-CNN), plain
    ResNets of timm, torchvision, lightly or transformers, those of pre-training scripts under a prefix of any name that
    is the only one, and this package's own, all with or without `module.` and `_orig_mod.`. Heads of pre-training are
    left out, the switchable probe is kept.

    A plain network gives a starting point for slimmable training: its convolutions, and for each of `widths` the
    leading part of its normalisations. The narrow ones have seen no batch (`num_batches_tracked` is 0), and the head
    is left out.

    Args:
        tensors: State dict of the checkpoint.
        encoder: `online` for the trained network, `momentum` for its moving average, from which widths are left out
            whose normalisation has never seen a batch.
        widths: The widths to give to a plain network.

    Raises:
        InputError: The checkpoint is of none of these kinds, or not complete; a tensor that is missing, unexpected,
            misshapen, not of real numbers, or has a NaN or infinite one, is named.
    """
    if encoder not in _PREFIXES:
        raise InputError(f'encoder {encoder!r} is not one of {", ".join(_PREFIXES)}')
    for name, tensor in tensors.items():
        check_form(name, tensor)
    names = with_batch_counts(plain_names(tensors))
    ours = _body(names, encoder)
    if not any(switched_key(name) for name in ours):
        # The switchable probe is part of the network; any other head served pre-training, or is of one width alone.
        body = {k: v for k, v in ours.items() if not k.startswith('fc.') or k.startswith('fc.linears.')}
        from_authors = any(_AUTHORS_NORM.match(name) for name in body)
        plain = {k: v for k, v in body.items() if k.partition('.')[0] not in _HEADS}
        ours = _from_authors(body, encoder) if from_authors else _from_plain(plain, widths)
    check_complete({name: tensor.shape for name, tensor in ours.items()})
    for name, tensor in ours.items():
        check_values(name, tensor)
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def plain_names(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same under timm's names, with the prefix of the network, and without `module.` and `_orig_mod.`."""
    return _renamed({_WRAPPERS.sub(r'\1', name): tensor for name, tensor in tensors.items()})


def prefix_of(names: Tensors, encoder: str) -> str:
    """What the `plain_names` of a ResNet's tensors begin with, as `encoder_q.`.

    Raises:
        InputError: There is no such network, or several.
    """
    prefix = next((prefix for prefix in _PREFIXES[encoder] if prefix + _FIRST in names), None)
    if prefix is None and encoder == 'online':
        found = [name.removesuffix(_FIRST) for name in names if name.endswith(f'.{_FIRST}')]
        networks = [prefix for prefix in found if f'{prefix}layer1.0.{_FIRST}' in names]
        if len(networks) > 1:
            raise InputError(f'several ResNets are there, {", ".join(networks)}; save the state dict of one of them')
        prefix = next(iter(networks), None)
    if prefix is None:
        wanted = ', '.join(prefix + _FIRST for prefix in _PREFIXES[encoder])
        begin = f'the tensors begin with {", ".join([*names][:3])}' if names else 'there are no tensors'
        raise InputError(f'no {encoder} network that is a ResNet: none of {wanted} is there; {begin}')
    return prefix


def backbone_name(reference: str, stages: Sequence[int], keys: Sequence[str]) -> str:
    """Translate the authors' name of a backbone's or switchable probe's tensor.

    `features.3.shortcut.1.bn.2.weight` -> `layer2.0.downsample.1.w050.weight`. Blocks are numbered through all
    `stages`, widths in the order of `keys`.
    """

    def block(match: re.Match[str]) -> str:
        index = int(match[1])
        starts = (0, *accumulate(stages))
        stage = max(i for i, start in enumerate(starts) if start <= index)
        return f'layer{stage + 1}.{index - starts[stage]}.'

    name = _AUTHORS_BLOCK.sub(block, reference).replace('.shortcut.', '.downsample.')
    return _AUTHORS_SWITCHED.sub(lambda match: f'.{keys[int(match[1])]}.', name)


def _body(names: Tensors, encoder: str) -> dict[str, torch.Tensor]:
    prefix = prefix_of(names, encoder)
    return {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}


def _renamed(names: Tensors) -> dict[str, torch.Tensor]:
    """Names of a ResNet that is a sequence, or of transformers, as timm's; others as they are."""
    sequences = [match[1] for name in names if (match := _OF_SEQUENCE.match(name)) and f'{match[1]}0.weight' in names]
    renamed = {}
    for name, tensor in names.items():
        prefix = next((prefix for prefix in sequences if name.startswith(prefix)), None)
        if prefix is not None:
            part, _, rest = name.removeprefix(prefix).partition('.')
            name = f'{prefix}{_SEQUENCE.get(part, part)}.{rest}'
        elif match := _OF_TRANSFORMERS.match(name):
            stage, block, layer, kind, leaf = match.groups()
            number = 0 if layer is None else int(layer) + 1
            module = ('conv' if kind == 'convolution' else 'bn') + str(number or 1)
            if stage is not None and not number:
                module = f'downsample.{int(kind == "normalization")}'
            name = f'{module}.{leaf}' if stage is None else f'layer{int(stage) + 1}.{block}.{module}.{leaf}'
        renamed[name] = tensor
    return renamed


def _from_authors(body: Tensors, encoder: str) -> dict[str, torch.Tensor]:
    blocks = 1 + max((int(match[1]) for name in body if (match := _AUTHORS_BLOCK.match(name))), default=-1)
    stages = next((stages for expansion, stages, _ in ARCHITECTURES if expansion == 4 and sum(stages) == blocks), ())
    if blocks and not stages:
        raise InputError(f'the network has {blocks} blocks; a ResNet-50, 101 or 152 has 16, 33 or 50')
    keys = _keys(body)
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in body.items():
        if (number := _AUTHORS_SWITCHED.search(name)) and int(number[1]) >= len(keys):
            raise InputError(f'{name} is not expected: there are {len(keys)} widths')
        ours = backbone_name(name, stages, keys)
        if ours in converted:
            raise InputError(f'{name} and another tensor are both named {ours}')
        converted[ours] = tensor
    return _without_unseen(converted) if encoder == 'momentum' else converted


def _keys(body: Tensors) -> list[str]:
    # The order of the widths differs between the authors' checkpoints, and only the shapes tell it: pre-training
    # counts down, Mask R-CNN counts up. The layers with most channels tell them best; two of them at least, so that
    # a tensor that is missing or misshapen is found to be, rather than believed.
    channels: dict[str, dict[int, int]] = {}
    for name, tensor in body.items():
        if match := _AUTHORS_NORM.match(name):
            channels.setdefault(match[1], {})[int(match[2])] = tensor.numel()
    votes = Counter(tuple(sorted(sizes.items())) for sizes in channels.values())
    trusted = max(votes, key=lambda sizes: (votes[sizes] > 1, max(dict(sizes).values())))
    largest = dict(trusted)
    if sorted(largest) != list(range(len(largest))):
        raise InputError(f'normalisations are numbered {sorted(largest)}, not from 0 on without a gap')
    full = max(largest.values())
    return [width_key(round(largest[i] / full, WIDTH_DIGITS)) for i in range(len(largest))]


def _from_plain(body: Tensors, widths: Sequence[float]) -> dict[str, torch.Tensor]:
    if 1.0 not in widths:
        raise InputError(f'widths {tuple(widths)} lack 1.0, the width of a plain network')
    for width in widths:
        if not 0 < width <= 1 or round(width, WIDTH_DIGITS) != width:
            raise InputError(f'width {width!r} is outside (0, 1] or has more than {WIDTH_DIGITS} decimals')
    norms = {name.rpartition('.')[0] for name in body if name.endswith('.running_mean')}
    if not norms:
        raise InputError(f'no batch normalisation found; the tensors are {shorten([*body], 3)}')
    converted = {}
    for name, tensor in body.items():
        module, _, leaf = name.rpartition('.')
        if module not in norms:
            converted[name] = tensor
            continue
        for width in widths:
            shape = [scale_channels(n, width) for n in tensor.shape]
            part = torch.zeros_like(tensor) if leaf == 'num_batches_tracked' and width < 1 else leading(tensor, shape)
            converted[switch_name(name, width_key(width))] = part
    return converted


def _without_unseen(tensors: Tensors) -> dict[str, torch.Tensor]:
    batches = {
        switched_key(name): bool(tensor.any())
        for name, tensor in tensors.items()
        if re.match(r'bn1\.\w+\.num_batches', name)
    }
    if not any(batches.values()):
        return dict(tensors)  # kept as it is: no width has seen anything
    return {name: tensor for name, tensor in tensors.items() if batches.get(switched_key(name), 1)}
