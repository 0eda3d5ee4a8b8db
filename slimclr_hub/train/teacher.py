"""The teacher that a recipe names: opened, brought to the student's views, and recognised when a run goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.network import check_network, folder_of
from slimclr_hub.hub.open import open_any
from slimclr_hub.hub.plain import is_timm, open_timm, slimmable_of
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_width
from slimclr_hub.train.config import PretrainConfig, TeacherConfig
from slimclr_hub.weights.checkpoint import read_checkpoint

_MAX_MESSAGE = 300  # characters


def open_teacher(config: PretrainConfig) -> Teacher | None:
    """Open the teacher of a recipe; None where it has none. No random number is drawn.

    Its mean and standard deviation are those of its own configuration, or where that has none, as for a file, those of
    the student's views. A teacher of RGB images sees gray views in three equal channels.

    Raises:
        InputError: There is no such network, its weights cannot be had, it does not have the width, or does not take
            images of this size or number of channels.
    """
    if config.teacher.network is None:
        return None
    name, size = config.teacher.network, config.views.size or config.data.size
    with torch.random.fork_rng(devices=[]):  # random weights are drawn before those of the file replace them
        network = _open(config.teacher).eval()
    cfg: Mapping[str, Any] = {} if folder_of(name).is_file() else getattr(network, 'pretrained_cfg', {})
    channels = getattr(network, 'in_chans', cfg.get('input_size', (3,))[0])
    if config.data.channels not in (1, channels):
        raise InputError(
            f'teacher.network {name} takes images of {channels} channels, and data.channels is {config.data.channels}'
        )
    look = config.data.mean, config.data.std, cfg.get('mean') or config.data.mean, cfg.get('std') or config.data.std
    mean, std, its_mean, its_std = (_for_channels(name, values, channels) for values in look)
    scale = [ours / its for ours, its in zip(std, its_std, strict=True)]
    shift = [(ours - its) / by for ours, its, by in zip(mean, its_mean, its_std, strict=True)]
    return Teacher(network, _features(name, network, channels, size), scale, shift)


def identity(config: TeacherConfig, teacher: Teacher) -> dict[str, Any]:
    """What a checkpoint says of the teacher: its name and the hash of its weights."""
    return {'network': config.network, 'hash': teacher.hash()}


def check_identity(teacher: Mapping[str, Any], state: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Raise an InputError if a checkpoint's state tells of a teacher with other weights."""
    before = state.get('teacher', teacher)
    if before['hash'] != teacher['hash']:
        raise InputError(
            f'teacher.network {teacher["network"]} has weights {teacher["hash"][:8]}, and the teacher of {checkpoint} '
            f'had {before["hash"][:8]}; restore it, or start a new run'
        )


def _open(config: TeacherConfig) -> nn.Module:
    name = config.network
    assert name is not None
    path = folder_of(name)
    network: Any
    try:
        if path.is_file() and path.suffix != '.safetensors':
            network = slimmable_of(read_checkpoint(path), name, (1.0,))
        elif is_timm(name):
            network = open_timm(name)
        else:
            check_network(name)
            network = open_any(name)
        if isinstance(network, SlimmableResNet):
            width = network.widths[0] if config.width is None else check_width(config.width, network.widths)
            network = network.extract(width)
        elif config.width is not None:
            raise InputError(f'it has no widths; drop teacher.width {config.width}')
    except InputError as error:
        raise InputError(f'teacher.network {name}: {error}') from error
    network.reset_classifier(0)
    return network


def _for_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise InputError(f'teacher.network {name} takes {channels} channels, and is normalised by {list(values)}')
    return tuple(values) if len(values) == channels else tuple(values) * channels


def _features(name: str, network: nn.Module, channels: int, size: int) -> int:
    """Dimension of the features of an image of `size`, by a forward."""
    try:
        with torch.no_grad():
            features = network(torch.zeros(1, channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        words = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(
            f'teacher.network {name} does not take views of {size} pixels: {words[:_MAX_MESSAGE]}; give --views.size, '
            'or another teacher'
        ) from error
    if features.ndim != 2:
        raise InputError(f'teacher.network {name} gives {list(features.shape)} for an image, not a row of features')
    return features.shape[1]
