"""The teacher that a recipe names: opened, brought to the student's views, and recognised when a run goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from slimclr_hub.data.indexed import Known
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import FeatureCache
from slimclr_hub.evaluate.knn_eval import neighbours_in_all
from slimclr_hub.evaluate.network import check_network, folder_of
from slimclr_hub.hub.open import open_any
from slimclr_hub.hub.plain import is_timm, open_timm, slimmable_of
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.projection import projection_head
from slimclr_hub.models.widths import check_width, width_key
from slimclr_hub.runs.checkpoints import newest
from slimclr_hub.train.config import PretrainConfig, TeacherConfig
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.tensor_file import TensorFile

_MAX_MESSAGE = 300  # characters
_FOLDER = 'teacher_features'  # in run.output
_CHUNK = 1024  # images of all processes whose neighbours are searched at a time


def open_teacher(config: PretrainConfig) -> Teacher | None:
    """Open the teacher of a recipe; None where it has none. No random number is drawn.

    Its mean and standard deviation are those of its own configuration, or where that has none, as for a file, those of
    the student's views. A teacher of RGB images sees gray views in three equal channels.

    Raises:
        InputError: There is no such network, its weights cannot be had, it does not have the width or the head, or does
            not take images of this size or number of channels.
    """
    if config.teacher.network is None:
        return None
    name = config.teacher.network
    with torch.random.fork_rng(devices=[]):  # random weights are drawn before those of the file replace them
        network, head = _open(config.teacher)
    network.eval()
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
    sizes = [config.views.size or config.data.size, *([config.data.size] if looks_once(config) else [])]
    dims = [_features(name, network, channels, size) for size in sizes]
    dim = dims[0] if head is None else _projected(name, head, dims[0])
    return Teacher(network, dim, scale, shift, head)


def looks_once(config: PretrainConfig) -> bool:
    """True if the teacher looks at all training images before the first step."""
    return config.teacher.cached or config.method.neighbours is not None


def known_images(
    config: PretrainConfig, teacher: Teacher, accelerator: Accelerator, between: Callable[[], None] = lambda: None
) -> Known:
    """What a recipe wants to be known of the training images: the teacher's features of centre crops, and neighbours.

    All processes look together, once for all runs with this teacher, these images and this `run.output`. The network is
    moved to the device. Of P processes each searches the neighbours of 1/P of the images among 1/P of them. All call
    `between` before each batch of either.

    Raises:
        InputError: There are no more images than neighbours are asked for, or the features cannot be kept.
        DataError: An image cannot be read.
    """
    crops = _CentreCrops(teacher.to(accelerator.device), between)
    data = replace(config.data, max_corrupt=0)  # each image has its row
    with torch.random.fork_rng(devices=[]):
        cache = FeatureCache(Path(config.run.output) / _FOLDER, accelerator, crops, data, 'run.output', precision='no')
        path, _ = cache.file(config.data.train_split)
    with TensorFile(path) as file:
        features = file.mapped(width_key(1.0))
    k = config.method.neighbours
    neighbours = None if k is None else _neighbours(features, k, accelerator, between)
    return Known(features if config.teacher.cached else None, None if neighbours is None else neighbours.numpy())


class _CentreCrops(nn.Module):
    """A teacher as a source of features of width 1.0, whose tensors tell it from others."""

    widths = (1.0,)

    def __init__(self, teacher: Teacher, between: Callable[[], None]) -> None:
        super().__init__()
        self.network = teacher.network
        self.register_buffer('scale', teacher.scale)
        self.register_buffer('shift', teacher.shift)
        self._teacher = (teacher,)
        self._between = between

    def forward_widths(self, images: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        """Images [B, C, H, W] -> features [B, F]."""
        self._between()
        return {width: self._teacher[0].features(images) for width in widths}


def _neighbours(
    features: np.ndarray, k: int, accelerator: Accelerator, between: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Numbers of the k nearest other images of each, [N, k], by the cosine of features [N, F]."""
    count, world = len(features), accelerator.num_processes
    if k >= count:
        raise InputError(f'method.neighbours {k} is not below the {count} training images; lower it')
    mine = np.arange(accelerator.process_index, count, world)
    share, labels = (torch.from_numpy(x).to(accelerator.device) for x in (features[mine], mine))
    F.normalize(share, dim=1, out=share)  # there is no room for a second one of millions of images
    nearest = []
    for chunk in neighbours_in_all(accelerator, share, share, labels, k + 1, _CHUNK):
        between()
        nearest.append(chunk.labels)
    found = torch.cat(nearest)
    # An image is its own nearest, unless others are the same; to the end with it.
    last = (found == labels[:, None]).to(torch.uint8).argsort(dim=1, stable=True)
    others = torch.zeros(-(-count // world), k, dtype=torch.long, device=accelerator.device)
    others[: len(mine)] = found.gather(1, last)[:, :k]
    return accelerator.gather(others).view(world, -1, k).transpose(0, 1).reshape(-1, k)[:count].cpu()


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


def _open(config: TeacherConfig) -> tuple[nn.Module, nn.Module | None]:
    """The network, and its projection head if the recipe wants it."""
    name = config.network
    assert name is not None
    path = folder_of(name)
    network: Any
    head = None
    try:
        if path.is_file() and (config.head or not _is_network(path)):
            tensors = read_checkpoint(path)
            network = slimmable_of(tensors, name, (1.0,))
            head = projection_head(tensors) if config.head else None
        elif not config.head and is_timm(name):
            network = open_timm(name)
        else:
            tensors = _last_checkpoint(path) if config.head else {}
            head = projection_head(tensors) if tensors else None
            check_network(name)
            network = open_any(name)
            if tensors:
                _check_same(network, tensors)
        if isinstance(network, SlimmableResNet):
            width = network.widths[0] if config.width is None else check_width(config.width, network.widths)
            if config.head and width != network.widths[0]:
                raise InputError(f'its projection head is that of {network.widths[0]}; drop teacher.width {width}')
            network = network.extract(width)
        elif config.width is not None:
            raise InputError(f'it has no widths; drop teacher.width {config.width}')
    except InputError as error:
        raise InputError(f'teacher.network {name}: {error}') from error
    network.reset_classifier(0)
    return network, head


def _is_network(path: Path) -> bool:
    """True for the file of a network by itself, as this package writes it, whose names have no prefix."""
    if path.suffix != '.safetensors':
        return False
    with TensorFile(path) as file:
        return 'conv1.weight' in file.shapes


def _last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint of a run, which has the head that the run's own file has not."""
    found = newest(run).path if run.is_dir() else None
    if found is None:
        raise InputError(
            'it is neither the file of a checkpoint nor a run that has kept one, and no other has a projection head; '
            'drop teacher.head'
        )
    return read_checkpoint(found / 'model.safetensors')


def _check_same(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise an InputError if a run's checkpoint is of other weights than its network; statistics are averaged there."""
    if not all(p.equal(tensors.get(f'backbone.{name}', p.new_empty(0))) for name, p in network.named_parameters()):
        raise InputError(
            'its newest checkpoint has other weights than its network, which is of an earlier end; let the run end, or '
            "give a checkpoint's model.safetensors"
        )


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


def _projected(name: str, head: nn.Module, features: int) -> int:
    """Dimension of the projection of features."""
    try:
        return int(head(torch.zeros(1, features)).shape[1])
    except RuntimeError as error:
        raise InputError(f'teacher.network {name}: its head does not take {features} features, as it has') from error
