"""Our networks filled with the weights that the recorded numbers of the authors' implementation belong to."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimclr_hub.models.convert import backbone_name
from tests.formula import tensor, uniform

DATA = Path(__file__).parent / 'data'
TRAINING = json.loads((DATA / 'training_steps.json').read_text())
DESCENDING = ('w100', 'w075', 'w050', 'w025')
"""Keys of the widths in the order in which the authors' pre-training checkpoints number them."""

_STAGES = (3, 4, 6, 3)
_STARTS = dict(zip(('layer1', 'layer2', 'layer3', 'layer4'), (0, *np.cumsum(_STAGES)), strict=False))


def reference_name(name: str) -> str:
    """The authors' name of a slimmable ResNet-50's tensor; checked against the package's translation back."""
    parts = name.split('.')
    if parts[0] in _STARTS:
        parts[:2] = ['features', str(_STARTS[parts[0]] + int(parts[1]))]
    parts = ['shortcut' if part == 'downsample' else part for part in parts]
    holder = 'linears' if parts[0] == 'fc' else 'bn'
    reference = '.'.join(f'{holder}.{DESCENDING.index(part)}' if part in DESCENDING else part for part in parts)
    assert backbone_name(reference, _STAGES, DESCENDING) == name
    return reference


def fill(module: nn.Module, names: dict[str, str]) -> None:
    """Fill each tensor of `module` by the formula, under the authors' name that `names` gives it."""
    state = {key: torch.from_numpy(tensor(names[key], value.shape)) for key, value in module.state_dict().items()}
    module.load_state_dict(state)


def fill_backbone(backbone: nn.Module) -> None:
    fill(backbone, {name: reference_name(name) for name in backbone.state_dict()})


def image(name: str, batch: int, size: int = 64) -> torch.Tensor:
    shape = (batch, 3, size, size)
    return torch.from_numpy((uniform(name, int(np.prod(shape))).reshape(shape) * 4 - 2).astype(np.float32))
