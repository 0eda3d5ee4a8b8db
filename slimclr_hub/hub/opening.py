"""Opening a network by whatever names it: a tag, a repository on the Hub, a folder or a file."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import parse_model_name
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import OF_A_TAG
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.weights.layouts import layout_of
from slimclr_hub.weights.source import from_hub
from slimclr_hub.weights.tensor_file import TensorFile

_ENOUGH = 500  # characters
_KINDS = 'a tag such as slimclr_resnet50.mocov2_200e_in1k, a folder, a .safetensors file, or hf-hub:USER/NAME'


def open_network(name: str, **kwargs: Any) -> SlimmableResNet:
    """As `open_any`, but nothing other than a slimmable network.

    Raises:
        InputError: It is another one, or as in `open_any`.
    """
    model = _open(name, kwargs, slimmable=True)
    if not isinstance(model, SlimmableResNet):
        raise InputError(f'{name} is a {type(model).__name__}, not a slimmable network')
    return model


def open_any(name: str, **kwargs: Any) -> nn.Module:
    """Open a network with its weights.

    Args:
        name: A name of timm's registry, `hf-hub:USER/NAME`, a folder that timm opens, or a safetensors file.
        kwargs: Arguments for `timm.create_model`, such as `width`.

    Raises:
        InputError: There is no such network, or its weights cannot be had or do not fit.
    """
    return _open(name, kwargs)


def _open(name: str, kwargs: dict[str, Any], slimmable: bool = False) -> nn.Module:
    path = Path(name.removeprefix('local-dir:'))
    if path.is_file():
        name, kwargs = _from_file(path, kwargs)
    elif path.is_dir():
        if not (path / 'config.json').is_file():
            raise InputError(f'{path} has no config.json; it is not a folder that timm opens')
        _check_config(path / 'config.json', path, slimmable)
        name = f'local-dir:{path}'
    else:
        _check_name(name, slimmable)
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except (TypeError, RuntimeError, KeyError) as error:
        words = ' '.join(str(error).split())  # PyTorch lists tensors that do not fit, each on a line
        raise InputError(f'{name}: {words[:_ENOUGH]}{"..." if len(words) > _ENOUGH else ""}') from error


def _from_file(path: Path, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    with TensorFile(path) as file:
        layout = layout_of(file.shapes)
    if layout.architecture is None or not layout.widths:
        raise InputError(f'{path} holds {layout}, which is none of the slimmable networks here')
    found = {'widths': layout.widths, 'num_classes': layout.num_classes, 'in_chans': layout.in_chans}
    if layout.num_classes:
        found['head'] = layout.head
    if not layout.overlap:
        found['overlap'] = False
    # The architecture's default tag would otherwise be taken for that of the file.
    overlay = {**dict.fromkeys(OF_A_TAG), 'file': str(path)}
    return layout.architecture, {**found, 'pretrained_cfg_overlay': overlay, **kwargs}


def _check_name(name: str, slimmable: bool) -> None:
    try:
        source, rest = parse_model_name(name)
    except ValueError as error:
        raise InputError(f'{name!r} is not {_KINDS}') from error
    if source == 'hf-hub':
        # For its errors: timm fetches the configuration by itself, and would show the client's.
        _check_config(from_hub(rest, 'config.json'), name, slimmable)
    elif source == 'local-dir':
        raise InputError(f'{rest} does not exist')
    elif not timm.is_model(rest.partition('.')[0]) or not rest.startswith('slimclr_'):
        raise InputError(f'{name!r} is not {_KINDS}')


def _check_config(file: Path, name: object, slimmable: bool) -> None:
    # Of a wrong one timm shows what Python says of it, and of another network than ours only after its download.
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f'{name}: its config.json is not JSON ({error})') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise InputError(f"{name}: its config.json is not timm's, which names an architecture")
    if slimmable and not config['architecture'].startswith('slimclr_'):
        raise InputError(f'{name} is a {config["architecture"]}, not a slimmable network')
