"""Opening a network by any name for it: a tag, a repository on the Hub, a folder or a file."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import CustomDatasetInfo
from timm.models import parse_model_name
from torch import nn

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.hub.folder import OF_A_TAG, WIDTH, check_overlap
from slimclr_hub.hub.formats import identity_projection
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.models import DenseResNet, SlimmableResNet
from slimclr_hub.models.layers import check_sizes
from slimclr_hub.models.registry import slimmable_models
from slimclr_hub.models.widths import check_width, width_key
from slimclr_hub.weights.bounded import read_json
from slimclr_hub.weights.layouts import ARCHITECTURES, ELSEWHERE, layout_of
from slimclr_hub.weights.slices import leading, unswitch_name
from slimclr_hub.weights.source import from_hub
from slimclr_hub.weights.tensor_file import TensorFile

# Errors of timm and PyTorch about arguments, which a config.json may have of any kind.
_OF_ARGUMENTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
_LEAST_CROP = 0.05
_HOW = {
    'interpolation': ('bicubic', 'bilinear', 'lanczos', 'nearest', 'box', 'hamming'),
    'crop_mode': ('center', 'squash', 'border'),
}
_OF_EXTRACTED = {'in_chans', 'num_classes', 'global_pool', 'channels', 'output_stride'}
_MAX_MESSAGE = 500  # characters
_MOST = 1e6  # of a mean or a standard deviation of pixels: far above any
_KINDS = 'a tag such as slimclr_resnet50.mocov2_200e_in1k, a folder, a .safetensors file, or hf-hub:USER/NAME'


def open_network(name: str, **kwargs: Any) -> SlimmableResNet:
    """Open a slimmable network with its weights, or a dense one as a network of its only width; see `open_any`.

    Raises:
        InputError: It is a network without widths, or as in `open_any`.
    """
    name, kwargs, config = _resolve(name, kwargs)
    architecture = config['architecture']
    if architecture in slimmable_models() or _is_users(architecture):
        model = _create(name, kwargs)
        if isinstance(model, SlimmableResNet):
            return model
    elif architecture.startswith('slimclr_') or (WIDTH in config and architecture in ELSEWHERE.values()):
        with _one_line(name):
            _check_extracted(config)
        asked, drop = kwargs.pop('width', None), kwargs.pop('drop_path_rate', 0.0)
        kwargs.pop('lazy', None)  # one width is all there is to read
        dense = _create(name, kwargs)
        with _one_line(name):
            model = _of_one_width(dense, dense.width if isinstance(dense, DenseResNet) else config[WIDTH], config, drop)
        if asked is not None:
            check_width(asked, model.widths)
        return model
    raise InputError(f'{name.removeprefix("local-dir:")} is a {architecture}, not a slimmable network')


def _is_users(architecture: str) -> bool:
    """True if a user's own file registered an architecture, as `--import` does."""
    if not timm.is_model(architecture):
        return False
    return not timm.models.model_entrypoint(architecture).__module__.startswith(('timm.', 'slimclr_hub.'))


def open_any(name: str, **kwargs: Any) -> nn.Module:
    """Open a network with its weights.

    Args:
        name: A name of timm's registry, `hf-hub:USER/NAME`, a folder that timm opens, or a safetensors file.
        kwargs: Arguments for `timm.create_model`, such as `width` and `lazy`.

    Raises:
        InputError: There is no such network, or its weights cannot be had or do not fit.
    """
    name, kwargs, _ = _resolve(name, kwargs)
    return _create(name, kwargs)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    with _one_line(name):
        return timm.create_model(name, pretrained=True, **kwargs)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn errors of timm and PyTorch about arguments into one line that names the network."""
    try:
        yield
    except InputError:
        raise
    except _OF_ARGUMENTS as error:
        # PyTorch lists tensors that do not fit, each on a line; of an assertion there may be no words at all.
        words = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'{name}: {words[:_MAX_MESSAGE]}{"..." if len(words) > _MAX_MESSAGE else ""}') from error


def _resolve(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Translate a name to timm's name and arguments, and to the configuration, which names the architecture."""
    path = Path(name.removeprefix('local-dir:'))
    if path.is_file():
        return _from_file(path, kwargs)
    if path.is_dir():
        if not (path / 'config.json').is_file():
            raise InputError(f'{path} has no config.json; it is not a folder that timm opens')
        return f'local-dir:{path}', kwargs, read_config(path / 'config.json', path)
    try:
        source, rest = parse_model_name(name)
    except ValueError as error:
        raise InputError(f'{name!r} is not {_KINDS}') from error
    if source == 'hf-hub':
        return name, kwargs, read_config(from_hub(rest, 'config.json'), name)
    if source == 'local-dir':
        raise InputError(f'{rest} does not exist')
    architecture = rest.partition('.')[0]
    if not timm.is_model(architecture) or not architecture.startswith('slimclr_'):
        raise InputError(f'{name!r} is not {_KINDS}')
    return name, kwargs, {'architecture': architecture}


def _from_file(path: Path, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    with TensorFile(path) as file:
        layout = layout_of(file.shapes)
    if layout.architecture is None or not layout.widths:
        raise InputError(f'{path} holds {layout}, which is none of the slimmable networks here')
    check_overlap(layout.overlap, path)
    found = {'widths': layout.widths, 'num_classes': layout.num_classes, 'in_chans': layout.in_chans}
    if layout.num_classes:
        found['head'] = layout.head
    # The architecture's default tag would otherwise be taken for that of the file.
    overlay = {**dict.fromkeys(OF_A_TAG), 'file': str(path)}
    arguments = {**found, 'pretrained_cfg_overlay': overlay, **kwargs}
    return layout.architecture, arguments, {'architecture': layout.architecture}


def read_config(file: Path, name: object) -> dict[str, Any]:
    """The configuration of a network in timm's `config.json`; an InputError says what no such file has."""
    # timm's own errors about a wrong one are Python's, and come after the download of the weights.
    try:
        config = read_json(file)
    except OSError as error:
        raise InputError(f'{name}: its config.json cannot be read: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise InputError(f'{name}: its config.json is not JSON ({error})') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise InputError(f"{name}: its config.json is not timm's, which names an architecture")
    for key in ('pretrained_cfg', 'model_args'):
        if not isinstance(config.get(key, {}), dict):
            raise InputError(f'{name}: {key} in its config.json is {reprlib.repr(config[key])}, not a dictionary')
    cfg = config.get('pretrained_cfg', config)  # of old versions of timm in itself
    for key in ('input_size', 'mean', 'std'):
        value = cfg.get(key, [])
        if not isinstance(value, list) or not all(isinstance(number, int | float) for number in value):
            raise InputError(f'{name}: {key} in its config.json is {reprlib.repr(value)}, not a list of numbers')
    for key, least in ('mean', -_MOST), ('std', 0):
        if not all(least < number < _MOST for number in cfg.get(key, [])):  # nor NaN
            raise InputError(f'{name}: {key} in its config.json is {reprlib.repr(cfg[key])}, which normalises no image')
    size = cfg.get('input_size', [])
    if not all(isinstance(number, int) and 0 < number <= MAX_IMAGE_SIZE for number in size) or len(size) not in (0, 3):
        raise InputError(f'{name}: input_size in its config.json is {size}, not channels, height and width of images')
    names, about = (config.get(key, cfg.get(key)) for key in ('label_names', 'label_descriptions'))
    if not isinstance(names, list | None):
        raise InputError(f'{name}: label_names in its config.json is {reprlib.repr(names)}, not a list')
    if names:
        try:
            CustomDatasetInfo(names, about)
        except (ValueError, TypeError) as error:
            raise InputError(f'{name}: label_names or label_descriptions in its config.json: {error}') from error
    for key in ('crop_pct', 'num_classes'):
        if not isinstance(cfg.get(key), int | float | None):
            raise InputError(f'{name}: {key} in its config.json is {reprlib.repr(cfg[key])}, not a number')
    crop = cfg.get('crop_pct')
    if crop is not None and not _LEAST_CROP <= crop <= 1:  # an image is resized to the size over it
        raise InputError(f'{name}: crop_pct in its config.json is {crop}, not from {_LEAST_CROP} to 1')
    for key, known in _HOW.items():
        if cfg.get(key, known[0]) not in known:
            problem = f'{key} in its config.json is {reprlib.repr(cfg[key])}'
            raise InputError(f'{name}: {problem}, not one of {", ".join(known)}')
    return config


def _check_extracted(config: dict[str, Any]) -> None:
    """Check the width of a folder of timm's own ResNet, and the sizes that it asks memory for."""
    width, arguments = config.get(WIDTH, 1.0), config.get('model_args', {})
    if not isinstance(width, int | float) or not 0 < width <= 1:
        raise InputError(f'{WIDTH} in its config.json is {width!r:.60}, not a width')
    if unknown := arguments.keys() - _OF_EXTRACTED:
        raise InputError(f'model_args in its config.json has {shorten(sorted(unknown))}, of no extracted network')
    channels = arguments.get('channels', (64, 128, 256, 512))
    for classes in (config.get('num_classes', 0), arguments.get('num_classes', 0)):
        check_sizes((3, 8, 36, 3)[: len(channels)], channels, (1.0,), arguments.get('in_chans', 3), classes)


def _of_one_width(dense: Any, width: float, config: dict[str, Any], drop_path_rate: float) -> SlimmableResNet:
    """Build a slimmable network that holds the tensors of a dense one, without channels of zeros, as its only width."""
    tensors = dense.state_dict()
    layout = layout_of({name: tensor.shape for name, tensor in tensors.items()})
    architecture = config['architecture'].rpartition('_')[0]
    if architecture not in slimmable_models():
        architecture = ARCHITECTURES[layout.expansion, layout.stages, 64]
    model = timm.create_model(
        architecture,
        pretrained_cfg={**dense.pretrained_cfg, 'architecture': architecture, 'classifier': f'fc.{width_key(width)}'},
        widths=(width,),
        num_classes=dense.num_classes,
        in_chans=layout.in_chans,
        global_pool=dense.global_pool.pool_type,
        output_stride=config.get('model_args', {}).get('output_stride', 32),
        drop_path_rate=drop_path_rate,
        device='meta',
    )
    assert isinstance(model, SlimmableResNet)
    runs = model.global_pool.feat_mult()  # times that the features stand side by side in the head's input
    fitted = {}
    for name, wanted in model.state_dict().items():
        tensor, shape = tensors[unswitch_name(name)], tuple(wanted.shape)
        if name.startswith('fc.') and len(shape) == 2:
            tensor, shape = tensor.unflatten(1, (runs, -1)), (shape[0], runs, shape[1] // runs)
        fitted[name] = leading(tensor, shape).reshape(wanted.shape)
    if left := tensors.keys() - map(unswitch_name, fitted):
        identity = identity_projection(dense)
        if left != identity.keys() or not all(torch.equal(tensors[key], identity[key]) for key in left):
            raise InputError(f'{shorten(sorted(left))}: trained, and of no {architecture}; open the network with timm')
    model.load_state_dict(fitted, assign=True)
    return model.train(dense.training)
