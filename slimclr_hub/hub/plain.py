"""Networks of timm's, and checkpoints of plain ResNets, as pre-training elsewhere leaves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import check_overlap
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.convert import convert
from slimclr_hub.text import first_line
from slimclr_hub.weights.layouts import layout_of


def is_timm(name: str) -> bool:
    """True for the name of a network of timm's own, with or without a tag, where there is no file of that name."""
    architecture = name.partition('.')[0]
    return not Path(name).exists() and timm.is_model(architecture) and not architecture.startswith('slimclr_')


def open_timm(name: str, **kwargs: Any) -> nn.Module:
    """Open a network of timm's with its weights; an InputError in one line if they cannot be had."""
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:  # of timm, the Hub's client and whatever lies between
        raise InputError(f'{name} of timm cannot be had: {first_line(error)}') from error


def slimmable_of(
    tensors: dict[str, torch.Tensor], name: str, widths: Sequence[float], drop_path_rate: float = 0.0
) -> SlimmableResNet:
    """A slimmable network with the tensors of a ResNet, whose narrower widths have the leading channels of them.

    Args:
        tensors: Those of a checkpoint of any kind that `convert` reads.
        name: What an error calls it.
        widths: Widths of a plain network; one that is slimmable keeps its own.
        drop_path_rate: As of the network.

    Raises:
        InputError: They are of no ResNet that this package has, or of one whose widths do not overlap.
    """
    try:
        converted = convert(tensors, widths=widths)
    except InputError as error:
        raise InputError(f'{name}: {error}') from error
    layout = layout_of({key: tensor.shape for key, tensor in converted.items()})
    assert layout.architecture is not None  # or converting had failed
    check_overlap(layout.overlap, name)
    model = timm.create_model(
        layout.architecture,
        widths=layout.widths,
        num_classes=layout.num_classes,
        in_chans=layout.in_chans,
        drop_path_rate=drop_path_rate,
        head=layout.head if layout.num_classes else 'switchable',
    )
    assert isinstance(model, SlimmableResNet)
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise InputError(
            f'{name} is no {layout.architecture} as this package builds it: {first_line(error)}'
        ) from error
    return model
