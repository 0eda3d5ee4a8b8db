"""Create a detector's backbone and load pre-trained weights strictly, with a report of what was loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv

from slimclr_hub.errors import InputError
from slimclr_hub.hub.open import open_network
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.convert import convert
from slimclr_hub.models.loading import FIRST_CONV, checkpoint_filter_fn
from slimclr_hub.models.registry import slimmable_models
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import layout_of
from slimclr_hub.weights.slices import key_width, switched_key
from slimclr_hub.weights.source import WEIGHTS
from slimclr_hub.weights.tensor_file import TensorFile

_FILES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')


def create_backbone(name: str, widths: Sequence[float] = DEFAULT_WIDTHS, **kwargs: Any) -> SlimmableResNet:
    """Create a slimmable network without a head by its timm name without a tag; an InputError if there is none."""
    if name not in slimmable_models():
        raise InputError(f'name {name!r} is none of {", ".join(slimmable_models())}; a tag goes into `weights`')
    network = timm.create_model(name, num_classes=0, widths=widths, **kwargs)
    assert isinstance(network, SlimmableResNet)
    return network


def load_backbone(network: SlimmableResNet, source: str) -> str:
    """Load every tensor of a backbone, or none if one does not fit.

    The network may hold fewer widths than the source; it then takes the leading part of the tensors. A head of the
    source is left out. From a network of one width, such as a ResNet-50 of torchvision or timm, each width takes the
    leading part of the normalisations, whose statistics at narrow widths then come from no image.

    Args:
        network: Network without a head.
        source: A tag (`slimclr_resnet50.mocov2_800e_in1k`), `hf-hub:USER/NAME`, a folder that timm opens, a
            pre-training run, one of its checkpoints, or a file: `.safetensors`, or any checkpoint that
            `slimclr-hub convert` takes, such as the authors' or a plain ResNet's.

    Returns:
        A report of what was loaded and what of the source was left out.

    Raises:
        InputError: The source does not exist, is damaged, belongs to another network, or lacks a width or a tensor; the
            message names it.
    """
    if network.num_classes > 0:
        raise InputError(f'the network has a head of {network.num_classes} classes; a backbone needs num_classes=0')
    try:
        tensors = _tensors(source, network.widths)
        fitted = checkpoint_filter_fn(tensors, network)
    except InputError as error:
        raise InputError(str(error) if source in str(error) else f'{source}: {error}') from error
    channels = fitted[FIRST_CONV].shape[1]
    fitted[FIRST_CONV] = adapt_input_conv(network.in_chans, fitted[FIRST_CONV], base_chans=channels)
    network.load_state_dict(fitted)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    report = f'Backbone weights from {source}: all {len(fitted)} tensors of the network were loaded, '
    report += f'{parameters:,} parameters, for {_listed(network.widths)}. '
    report += f'Left out of the source: {_left_out(tensors, network.widths)}.'
    if unseen := _untrained_widths(fitted):
        report += f' The normalisations of {_listed(unseen)} have counted no batch: they come from a network of one '
        report += 'width, or were never trained.'
    if channels != network.in_chans:
        report += f' The first convolution was adapted from images of {channels} channels to {network.in_chans}, '
        report += 'as timm does.'
    return report


def _tensors(source: str, widths: tuple[float, ...]) -> Mapping[str, torch.Tensor]:
    path = Path(source.removeprefix('local-dir:'))
    if path.is_dir() and not (path / 'config.json').is_file():
        path = _file_in(path)
    if path.is_file() and not _is_ours(path):
        # A plain network has width 1.0; the widths that are asked for take its leading part.
        return convert(read_checkpoint(path), widths=sorted({1.0, *widths}, reverse=True))
    if not path.exists() and path.suffix in _FILES:
        raise InputError(f'{source} does not exist')
    # With all that it holds, so that the report names what does not belong to the backbone.
    return open_network(str(path) if path.is_file() else source).state_dict()


def _file_in(path: Path) -> Path:
    if (path / WEIGHTS).is_file():  # a checkpoint of a run
        return path / WEIGHTS
    if checkpoints := sorted((path / 'checkpoints').glob('step-????????')):
        raise InputError(f'{path} is a run that has not finished; give one of its checkpoints, {checkpoints[-1]}')
    raise InputError(f'{path} has neither config.json nor {WEIGHTS}, so it is no folder of a network')


def _is_ours(path: Path) -> bool:
    if path.suffix != '.safetensors':
        return False
    with TensorFile(path) as file:
        return FIRST_CONV in file.shapes and any(map(switched_key, file.shapes))


def _left_out(tensors: Mapping[str, torch.Tensor], widths: tuple[float, ...]) -> str:
    layout = layout_of({name: tensor.shape for name, tensor in tensors.items()})
    head = [f'its head of {layout.num_classes} classes'] if layout.num_classes else []
    others = tuple(width for width in layout.widths if width not in widths)
    return ', '.join([*head, _listed(others)] if others else head) or 'nothing'


def _untrained_widths(tensors: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
    counts = {switched_key(name): int(t) for name, t in tensors.items() if name.endswith('num_batches_tracked')}
    return tuple(key_width(key) for key, count in counts.items() if key and not count)


def _listed(widths: tuple[float, ...]) -> str:
    return f'width{"s" if len(widths) > 1 else ""} {", ".join(map(str, widths))}'
