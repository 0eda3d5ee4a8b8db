"""The projection head that a checkpoint of pre-training has beside its backbone."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.models.convert import plain_names, prefix_of
from slimclr_hub.weights.checkpoint import check_form, check_values
from slimclr_hub.weights.slices import key_width, with_batch_counts

# Those of MoCo and SwAV are a sequence; lightly's is one called `layers`, and in this package's layers have names.
_TENSOR = re.compile(
    r'(?P<head>fc|head|projector|projection_head)\.(?:layers\.)?'
    r'(?:(?P<number>\d{1,3})|(?P<name>fc|fc1|bn1|fc2|bn2))\.(?:(?P<width>w\d{3,})\.)?(?P<leaf>\w+)'
)
_NUMBERS = {'fc': 0, 'fc1': 0, 'bn1': 1, 'fc2': 3, 'bn2': 4}


def projection_head(tensors: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """Build the projection head of a checkpoint, at its largest width, in eval mode.

    Its linear layers and batch normalisations have the numbers of a `torch.nn.Sequential`, in which a ReLU has no
    tensors: where numbers are not consecutive, there is one. That is how MoCo v2 and v3, SwAV and lightly write them;
    the names that this package's own runs give are known, too.

    Args:
        tensors: State dict of the checkpoint, from which `convert` takes the backbone.

    Raises:
        InputError: There is none, or several; or a layer is of another kind, does not take what the one before gives,
            or has a NaN or infinite value.
    """
    names = with_batch_counts(plain_names(tensors))
    prefix = prefix_of(names, 'online')
    # Beside the layers of the backbone (encoder_q.fc.0), or beside the backbone (projection_head.0).
    places = {prefix, prefix[: prefix.rstrip('.').rfind('.') + 1]}
    heads: dict[str, dict[int, dict[str, tuple[float, torch.Tensor]]]] = {}
    for name, tensor in names.items():
        for place in places:
            if name.startswith(place) and (match := _TENSOR.fullmatch(name.removeprefix(place))):
                number = _NUMBERS[match['name']] if match['name'] else int(match['number'])
                layer = heads.setdefault(place + match['head'], {}).setdefault(number, {})
                width = key_width(match['width']) if match['width'] else 1.0
                if width >= layer.get(match['leaf'], (0.0,))[0]:
                    layer[match['leaf']] = width, tensor
    if not heads:
        raise InputError(
            f'it has no projection head beside {prefix}conv1.weight; its tensors are {shorten([*names], 3)}'
        )
    if len(heads) > 1:
        raise InputError(f'it has several projection heads, {", ".join(heads)}; save the state dict with one of them')
    ((name, layers),) = heads.items()
    return _sequence(name, {n: {leaf: tensor for leaf, (_, tensor) in of.items()} for n, of in layers.items()})


def _sequence(name: str, layers: dict[int, dict[str, torch.Tensor]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    before, features = -1, None
    for number, tensors in sorted(layers.items()):
        if modules and number > before + 1:
            modules.append(nn.ReLU())
        layer, takes, gives = _layer(f'{name}.{number}', tensors)
        if features not in (None, takes):
            raise InputError(f'{name}.{number} takes {takes} features, and the layer before it gives {features}')
        modules.append(layer)
        before, features = number, gives
    return nn.Sequential(*modules).eval()


def _layer(name: str, tensors: dict[str, torch.Tensor]) -> tuple[nn.Module, int, int]:
    """A layer, with the numbers of features that it takes and gives."""
    for leaf, tensor in tensors.items():
        check_form(f'{name}.{leaf}', tensor)
        check_values(f'{name}.{leaf}', tensor)
    layer: nn.Module
    if 'running_mean' in tensors:
        takes = gives = tensors['running_mean'].numel()
        layer = nn.BatchNorm1d(gives, affine='weight' in tensors, device='meta')
    elif 'weight' in tensors and tensors['weight'].ndim == 2:
        gives, takes = tensors['weight'].shape
        layer = nn.Linear(takes, gives, bias='bias' in tensors, device='meta')
    else:
        raise InputError(f'{name} is neither a linear layer nor a batch normalisation')
    if not takes or not gives:
        raise InputError(f'{name} takes {takes} features and gives {gives}; a layer has some of both')
    found = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
    if found != {leaf: tuple(tensor.shape) for leaf, tensor in layer.state_dict().items()}:
        raise InputError(f'{name} has tensors {found}, which are not those of {layer}')
    # Copies: what was read may be mapped to a file, which others write.
    floats = {leaf: tensor.float() if tensor.is_floating_point() else tensor for leaf, tensor in tensors.items()}
    layer.load_state_dict({leaf: tensor.clone() for leaf, tensor in floats.items()}, assign=True)
    return layer, takes, gives
