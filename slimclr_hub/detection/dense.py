"""One width of a trained slimmable detector, as a detector of MMDetection that needs nothing of this package."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from slimclr_hub.detection.authors import NETWORK
from slimclr_hub.detection.checkpoints import allow_mmengine_checkpoints
from slimclr_hub.detection.config_text import read_config, run_config
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.files import written_whole
from slimclr_hub.hub.conversion import check_file
from slimclr_hub.hub.dense import mmdet_config, mmdet_state_dict
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.widths import check_width, scale_channels
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import check_complete, differences
from slimclr_hub.weights.slices import leading

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.registry import Registry

_OWN = 'slimclr_hub'
_BACKBONE = 'backbone.'
_LATERAL = re.compile(r'^neck\.(?:\d+\.)?lateral_convs\.\d+\.conv\.weight$')
_OUTPUT = re.compile(r'^neck\.(?:\d+\.)?fpn_convs\.\d+\.conv\.weight$')
_DROPPED = object()
_MAPS = (256, 512, 1024, 2048)  # channels of the stages at width 1.0, of every ResNet that MMDetection has

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SlimmableDetectorFile:
    """A slimmable detector's checkpoint, as mmengine writes it.

    Args:
        path: The file.
        tensors: Its state dict.
        meta: What mmengine notes of the run: `cfg`, the text of its config, and `dataset_meta`, the classes.
    """

    path: Path
    tensors: Tensors
    meta: Mapping[str, Any]


def is_slimmable_detector(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a detector with a `SlimmableResNet`."""
    names = tuple(names)
    return any(n.startswith(NETWORK) for n in names) and not all(n.startswith(_BACKBONE) for n in names)


def dense_state_dict(tensors: Tensors, width: float) -> dict[str, torch.Tensor]:
    """The tensors of one width for the stock detector that `dense_config` describes, which loads them strictly.

    Of the backbone it takes the width's channels, and of the neck the inputs that the backbone then gives: of the
    lateral convolutions, and of the one that makes a further level out of the backbone's last map
    (`add_extra_convs='on_input'`). Everything else is the same at every width.

    Args:
        tensors: State dict of a slimmable detector.
        width: One of its widths.

    Raises:
        InputError: It is no slimmable detector, does not hold `width`, or MMDetection has no such network.
    """
    network = {name.removeprefix(NETWORK): tensor for name, tensor in tensors.items() if name.startswith(NETWORK)}
    if not is_slimmable_detector(tensors):
        raise InputError(f'not a slimmable detector: its tensors are {shorten([*tensors], 3)}, none {NETWORK}conv1')
    layout = check_complete({name: tensor.shape for name, tensor in network.items()})
    if layout.architecture is None:
        raise InputError(f'the backbone is {layout}, none of the networks here')
    model = _without_memory(layout.architecture, widths=layout.widths, overlap=layout.overlap, in_chans=layout.in_chans)
    model.load_state_dict(network, assign=True)
    dense = {_BACKBONE + name: tensor for name, tensor in mmdet_state_dict(model, width).items()}
    dense |= {name: tensor for name, tensor in tensors.items() if not name.startswith(NETWORK)}
    # Among the convolutions after the lateral ones, only that of the backbone's map changes the channel count.
    inputs = {
        name: tensor.shape[1]
        for name, tensor in dense.items()
        if _LATERAL.match(name) or (_OUTPUT.match(name) and tensor.shape[0] != tensor.shape[1])
    }
    for name, channels in _used(inputs, layout.widths, width).items():
        dense[name] = leading(dense[name], (len(dense[name]), channels, *dense[name].shape[2:]))
    return dense


def dense_config(cfg: 'Config', width: float) -> 'Config':
    """The config of a slimmable detector's training, as that of a stock detector of one width.

    Each type of this package becomes the one of MMDetection or mmengine that it extends; hooks that extend none go, as
    do the wrapper for distributed runs and the import of this package. Initial weights, the folder of the run and where
    to resume from go, too.

    Args:
        cfg: Config with a `SlimmableResNet` as `model.backbone`.
        width: One of its widths, of which 64 times must be whole.

    Raises:
        InputError: The backbone is another one, does not hold `width`, or MMDetection has no such network.
    """
    from mmengine.config import Config

    # Registers the types, and lets MMDetection be imported where mmcv has no compiled operators.
    import slimclr_hub.detection.mmdetection  # noqa: F401

    plain = cfg.to_dict()
    for key in ('work_dir', 'load_from', 'resume'):
        plain.pop(key, None)
    own = _own_types()
    model = plain.get('model', {})
    backbone = model.get('backbone', {}) if isinstance(model, dict) else {}
    if _last(backbone.get('type')) != 'SlimmableResNet':
        raise InputError(f'model.backbone of the config has the type {backbone.get("type")}, not SlimmableResNet')
    model['backbone'] = _dense_backbone(backbone, width)
    necks = model.get('neck')
    for neck in necks if isinstance(necks, list) else [necks]:
        if neck and _last(neck.get('type')) in own and 'in_channels' in neck:
            stages = backbone.get('out_indices', range(len(_MAPS)))
            neck['in_channels'] = [scale_channels(_MAPS[stage], width) for stage in stages]
    if _last(plain.get('model_wrapper_cfg', {}).get('type')) in own:
        del plain['model_wrapper_cfg']
    _drop_own_imports(plain)
    return Config(_stock(plain, own))


def read_detector(path: Path) -> SlimmableDetectorFile | None:
    """Read a slimmable detector's checkpoint; nothing if the file is another kind of checkpoint.

    Raises:
        InputError: As in `read_checkpoint`.
    """
    installed = find_spec('mmengine') is not None  # checkpoints of other kinds do without
    if installed:
        allow_mmengine_checkpoints()
    try:
        tensors = read_checkpoint(path)
    except InputError as error:
        if installed or 'mmengine' not in str(error):
            raise
        raise InputError(
            f'{path} is a checkpoint of mmengine: pip install "slimclr-hub[transfer]" to read it'
        ) from error
    if not is_slimmable_detector(tensors):
        return None
    # A second look, at what is not tensors.
    content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    meta = content.get('meta')
    return SlimmableDetectorFile(path, tensors, meta if isinstance(meta, Mapping) else {})


def extract_detector(
    detector: SlimmableDetectorFile, target: Path, width: float, overwrite: bool = False, config: Path | None = None
) -> Path:
    """Write one width as `TARGET.pth` and `TARGET.py`, a checkpoint and a config of MMDetection, both or none.

    Before that, a detector is built from the config and compared with the checkpoint.

    Args:
        detector: The checkpoint of a training run.
        target: The file to write, in `.pth`.
        width: One of the detector's widths.
        overwrite: Replace files that are there.
        config: Config of the detector, which is run; that in the checkpoint unless given.

    Returns:
        The path of the config of the width.

    Raises:
        InputError: The target is there already or does not end in `.pth`, the checkpoint holds no config, or as in
            `dense_state_dict` and `dense_config`.
    """
    if target.suffix != '.pth':
        raise InputError(f'{target} does not end in .pth, as checkpoints of MMDetection do')
    written = target.with_suffix('.py')
    for path in (target, written):
        check_file(path, overwrite)
    try:
        cfg = read_config(detector.meta.get('cfg')) if config is None else run_config(config)
        dense = dense_config(cfg, width)
        tensors = dense_state_dict(detector.tensors, width)
        _check_strictly(dense, tensors)
    except InputError as error:
        raise InputError(f'{detector.path}: {error}') from error
    about = {key: detector.meta[key] for key in ('dataset_meta',) if key in detector.meta}
    text = dense.pretty_text
    if read_config(text).to_dict() != dense.to_dict():  # mmengine does not quote all that it prints
        raise InputError(f'{detector.path}: the config in its meta cannot be written as a file')
    content = {'meta': {**about, 'cfg': text}, 'state_dict': tensors}
    with written_whole(target.parent) as partial:
        torch.save(content, partial / target.name)
        (partial / written.name).write_text(f'# {target.name}: width {width:g} of {detector.path.name}\n{text}')
    return written


def _without_memory(architecture: str, **kwargs: Any) -> SlimmableResNet:
    if not timm.is_model(architecture):
        raise InputError(f'{architecture!r} is no network of this package')
    model = timm.create_model(architecture, num_classes=0, device='meta', **kwargs)
    assert isinstance(model, SlimmableResNet)
    return model


def _dense_backbone(backbone: Mapping[str, Any], width: float) -> dict[str, Any]:
    widths = tuple(backbone.get('widths', DEFAULT_WIDTHS))
    model = _without_memory(
        backbone.get('name', 'slimclr_resnet50'), widths=widths, overlap=backbone.get('overlap', True)
    )
    dense = mmdet_config(model, check_width(width, model.widths), '')
    del dense['init_cfg']
    if '.' in backbone['type']:
        dense['type'] = 'mmdet.models.backbones.resnet.ResNet'  # as configs of pure Python name types
    kept = ('out_indices', 'frozen_stages', 'norm_eval', 'with_cp')
    # MMDetection keeps the statistics of normalisation unless told, SlimmableResNet does not.
    return {**dense, 'norm_eval': False, **{key: backbone[key] for key in kept if key in backbone}}


def _used(inputs: Mapping[Any, int], widths: Iterable[float], width: float) -> dict[Any, int]:
    """Channels that `width` uses of a neck's inputs, which are those of width 1.0 or of the largest width there is.

    Tensors do not tell which stages a neck sees; the config does, and what is made is compared with it.
    """
    largest = max(widths)
    whole = largest if max(inputs.values(), default=0) <= scale_channels(_MAPS[-1], largest) else 1.0
    return {key: scale_channels(channels, width / whole) for key, channels in inputs.items()}


def _drop_own_imports(plain: dict[str, Any]) -> None:
    imports = plain.get('custom_imports', {}).get('imports', [])
    others = [name for name in ([imports] if isinstance(imports, str) else imports) if name.partition('.')[0] != _OWN]
    if others:
        plain['custom_imports']['imports'] = others
    else:
        plain.pop('custom_imports', None)


# Types


def _registries() -> 'Iterator[Registry]':
    import mmdet.registry
    import mmengine.registry

    for module in (mmengine.registry, mmdet.registry):
        yield from (value for value in vars(module).values() if isinstance(value, mmengine.registry.Registry))


def _own_types() -> dict[str, type]:
    """Registered name -> class, of all that this package or who extends it has registered."""
    return {
        name: cls
        for registry in _registries()
        for name, cls in registry.module_dict.items()
        if isinstance(cls, type) and _is_own(cls)
    }


def _is_own(cls: type) -> bool:
    return any(base.__module__.partition('.')[0] == _OWN for base in cls.__mro__)


def _stock_type(cls: type) -> type | None:
    """The nearest class that `cls` extends and a config can name."""
    registered = {found for registry in _registries() for found in registry.module_dict.values()}
    return next((base for base in cls.__mro__ if not _is_own(base) and base in registered), None)


def _last(kind: object) -> str:
    """Name of a type without its module or scope."""
    return kind.rpartition('.')[2] if isinstance(kind, str) else ''


def _stock(value: Any, own: Mapping[str, type]) -> Any:
    """A part of a config without types of this package."""
    if isinstance(value, list | tuple):
        return type(value)(part for item in value if (part := _stock(item, own)) is not _DROPPED)
    if not isinstance(value, dict):
        return value
    if cls := own.get(_last(value.get('type'))):
        stock = _stock_type(cls)
        if stock is None:
            return _DROPPED
        qualified = '.' in value['type']
        value = {**value, 'type': f'{stock.__module__}.{stock.__name__}' if qualified else stock.__name__}
        value.pop('widths', None)  # of the loops
        if (about := getattr(cls, 'METAINFO', None)) != getattr(stock, 'METAINFO', None):
            value.setdefault('metainfo', about)  # classes of a data set
    return {key: part for key, item in value.items() if (part := _stock(item, own)) is not _DROPPED}


# The check


def _check_strictly(cfg: 'Config', tensors: Tensors) -> None:
    """Build the detector and compare its tensors with these by name and shape."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    register_all_modules(init_default_scope=False)
    # mmengine takes a name with dots for one to import and call, of whatever module.
    known = {f'{cls.__module__}.{cls.__name__}' for registry in _registries() for cls in registry.module_dict.values()}
    known |= {f'{registry.scope}.{name}' for registry in _registries() for name in registry.module_dict}
    if strangers := {kind for kind in _types(cfg.model) if '.' in kind} - known:
        raise InputError(f'the config at this width names {", ".join(sorted(strangers))}, which MMDetection does not')
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'):
            model = MODELS.build(cfg.model)
    except Exception as error:  # whatever a part of it asks for
        raise InputError(f'the config at this width builds no detector: {error}') from error
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if problems := differences(expected, {name: tensor.shape for name, tensor in tensors.items()}):
        raise InputError(f'the tensors are not those of the config in it: {shorten(problems)}')


def _types(value: Any) -> Iterator[str]:
    """Every type that a part of a config names."""
    if isinstance(value, dict):
        if isinstance(kind := value.get('type'), str):
            yield kind
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _types(item)
