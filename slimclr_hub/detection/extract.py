"""Extract one width of a slimmable detector: a checkpoint and a config of MMDetection that need no slimclr_hub."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimclr_hub.detection.authors import NETWORK
from slimclr_hub.detection.mmengine_files import allow_mmengine_checkpoints, parse_values, run_config
from slimclr_hub.detection.pretrained import create_backbone
from slimclr_hub.detection.recorded import classes_of, recorded_config
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.files import atomic_files, encoded
from slimclr_hub.hub.folder import check_file
from slimclr_hub.hub.formats import mmdet_config, mmdet_state_dict
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.widths import scale_channels
from slimclr_hub.text import last_part
from slimclr_hub.weights.checkpoint import check_values, load_pickle, read_checkpoint
from slimclr_hub.weights.layouts import mismatches
from slimclr_hub.weights.tensor_file import save_pickle

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.registry import Registry

_DROPPED = object()
_STAGES = 4  # of every ResNet of MMDetection

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SlimmableDetectorFile:
    """Checkpoint of a slimmable detector; `meta` is mmengine's record of the run, with the text of its config."""

    path: Path
    tensors: Tensors
    meta: Mapping[str, Any]


def is_slimmable_detector(names: Iterable[str]) -> bool:
    """True if tensors of these names belong to a detector with a `SlimmableResNet`."""
    names = tuple(names)
    return any(n.startswith(NETWORK) for n in names) and not all(n.startswith('backbone.') for n in names)


def dense_state_dict(cfg: 'Config', tensors: Tensors, width: float) -> dict[str, torch.Tensor]:
    """Extract the tensors of one width for the stock detector of `dense_config`, which loads them strictly.

    They are the width's channels of the backbone, and the input channels of the neck's convolutions over its maps: the
    lateral ones, and the one that derives a further level from the last map (`add_extra_convs='on_input'`). Everything
    else is the same at every width.

    Raises:
        InputError: The tensors are not those of the config, or not of finite real numbers, or as in `dense_config`.
    """
    if not is_slimmable_detector(tensors):
        raise InputError(f'not a slimmable detector: its tensors are {shorten([*tensors], 3)}, none {NETWORK}conv1')
    expected = _build(dense_config(cfg, width))
    network = _network(cfg.model.backbone)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(NETWORK)}
    _check_same({NETWORK + name: tensor for name, tensor in network.state_dict().items()}, own)
    network.load_state_dict({name.removeprefix(NETWORK): tensor for name, tensor in own.items()}, assign=True)
    dense = {f'backbone.{name}': tensor for name, tensor in mmdet_state_dict(network, width).items()}
    for name, tensor in tensors.items():
        if name not in own:
            slices = name.startswith('neck.') and tensor.ndim == 4 and name in expected
            # A copy, since saving a view would save all that it looks into.
            dense[name] = tensor[:, : expected[name].shape[1]].clone() if slices else tensor
    _check_same(expected, dense)
    for name, tensor in dense.items():
        if expected[name].is_floating_point():
            check_values(name, tensor)
    return dense


def dense_config(cfg: 'Config', width: float) -> 'Config':
    """Convert the config of a slimmable detector into that of a stock detector of one width.

    Each type of this package becomes the type of MMDetection or mmengine that it extends. Removed are hooks that extend
    none, the wrapper for distributed runs, the import of this package, initial weights, the folder of the run and the
    checkpoint to resume from.

    Raises:
        InputError: The backbone is no `SlimmableResNet`, does not hold `width`, or MMDetection has no such network: 64
            times the width must be whole.
    """
    from mmengine.config import Config

    # Registers the types, and lets MMDetection be imported where mmcv has no compiled operators.
    import slimclr_hub.detection.mmdetection  # noqa: F401

    plain: dict[str, Any] = cfg.to_dict()
    for key in ('work_dir', 'load_from', 'resume'):
        plain.pop(key, None)
    own = _own_types()
    model = _section(plain, 'model')
    backbone = _section(model, 'backbone')
    if last_part(backbone.get('type')) != 'SlimmableResNet':
        raise InputError(f'model.backbone of the config has the type {backbone.get("type")}, not SlimmableResNet')
    model['backbone'] = _dense_backbone(backbone, width)
    necks = model.get('neck')
    for neck in necks if isinstance(necks, list) else [necks]:
        if isinstance(neck, dict) and last_part(neck.get('type')) in own and 'in_channels' in neck:
            neck['in_channels'] = [scale_channels(channels, width) for channels in _maps(backbone)]
    if last_part(_section(plain, 'model_wrapper_cfg').get('type')) in own:
        del plain['model_wrapper_cfg']
    imports = _section(plain, 'custom_imports')
    plain.pop('custom_imports', None)
    modules = imports.get('imports', [])
    modules = [modules] if isinstance(modules, str) else modules
    if others := [module for module in modules if not _is_own(module)]:
        plain['custom_imports'] = {**imports, 'imports': others}
    return Config(_stock(plain, own))


def read_detector(path: Path) -> SlimmableDetectorFile | None:
    """Read a slimmable detector's checkpoint, as `read_checkpoint` does; None for a checkpoint of another kind."""
    installed = find_spec('mmengine') is not None  # checkpoints of other kinds do without
    if installed:
        allow_mmengine_checkpoints()
    try:
        tensors = read_checkpoint(path)
    except InputError as error:
        if installed or 'mmengine' not in str(error):
            raise
        message = f'{path} is a checkpoint of mmengine: pip install "slimclr-hub[transfer]" to read it'
        raise InputError(message) from error
    if not is_slimmable_detector(tensors):
        return None
    meta = load_pickle(path).get('meta')
    return SlimmableDetectorFile(path, tensors, meta if isinstance(meta, Mapping) else {})


def extract_detector(
    detector: SlimmableDetectorFile, target: Path, width: float, overwrite: bool = False, config: Path | None = None
) -> tuple[Path, bool]:
    """Write one width as `TARGET.pth` and `TARGET.py`, a checkpoint and a config of MMDetection, both or none.

    Args:
        detector: Checkpoint of a training run.
        target: File to write, ending in `.pth`.
        width: One of the detector's widths.
        overwrite: Replace existing files.
        config: Config of the detector, which is run and carried over whole; without it, `recorded_config` takes the
            network and the paths of the data from the checkpoint, and nothing else.

    Returns:
        Path of the config of the width, and true if it names data to evaluate on.

    Raises:
        InputError: The target is there already, there is no config, or as in `dense_state_dict`.
    """
    if target.suffix != '.pth':
        raise InputError(f'{target} does not end in .pth, as checkpoints of MMDetection do')
    written = target.with_suffix('.py')
    for path in (target, written):
        check_file(path, overwrite)
    try:
        cfg = recorded_config(detector.meta, len(detector.tensors)) if config is None else run_config(config)
        tensors = dense_state_dict(cfg, detector.tensors, width)
    except InputError as error:
        raise InputError(f'{detector.path}: {error}') from error
    dense = dense_config(cfg, width)
    text = dense.pretty_text
    if parse_values(text) != dense.to_dict():  # mmengine does not quote all that it prints
        raise InputError(f'{detector.path}: the config of this width cannot be written as a file')
    classes = classes_of(detector.meta)
    meta = {'dataset_meta': {'classes': classes}} if classes else {}
    with atomic_files(target.parent) as partial:
        save_pickle({'meta': {**meta, 'cfg': text}, 'state_dict': tensors}, partial / target.name)
        text = f'# {target.name!r}: width {width:g} of {detector.path.name!r}\n{text}'
        (partial / written.name).write_bytes(encoded(text))
    return written, 'test_dataloader' in dense


def _section(cfg: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of a config that is a dictionary; an empty one where it is none."""
    part = cfg.get(key)
    return part if isinstance(part, dict) else {}


def _maps(backbone: Mapping[str, Any]) -> list[int]:
    """Channels at width 1.0 of the maps that a config's backbone returns."""
    stages, last = backbone.get('out_indices', range(_STAGES)), _network(backbone).full_features
    channels = {stage: last >> (_STAGES - 1 - stage) for stage in range(_STAGES)}  # they double from stage to stage
    try:
        return [channels[stage] for stage in stages]
    except (TypeError, KeyError):
        raise InputError(f'model.backbone.out_indices {reprlib.repr(stages)} are no stages, from 0 on') from None


def _network(backbone: Mapping[str, Any]) -> SlimmableResNet:
    """Create the network of a config's backbone, without memory for its tensors."""
    name, overlap = backbone.get('name', 'slimclr_resnet50'), backbone.get('overlap', True)
    return create_backbone(name, backbone.get('widths', DEFAULT_WIDTHS), overlap=overlap, device='meta')


def _dense_backbone(backbone: Mapping[str, Any], width: float) -> dict[str, Any]:
    dense = mmdet_config(_network(backbone), width, '')
    del dense['init_cfg']
    if '.' in backbone['type']:
        dense['type'] = 'mmdet.models.backbones.resnet.ResNet'  # as configs of pure Python name types
    kept = ('out_indices', 'frozen_stages', 'norm_eval', 'with_cp')
    # MMDetection keeps the statistics of normalisation unless told, SlimmableResNet does not.
    return {**dense, 'norm_eval': False, **{key: backbone[key] for key in kept if key in backbone}}


def _registries() -> 'list[Registry]':
    import mmdet.registry
    import mmengine.registry

    values = [*vars(mmengine.registry).values(), *vars(mmdet.registry).values()]
    return [value for value in values if isinstance(value, mmengine.registry.Registry)]


def _own_types() -> dict[str, tuple[type, type | None]]:
    """Return registered name -> class and its nearest stock base, for classes of this package and their subclasses."""
    named = [item for registry in _registries() for item in registry.module_dict.items() if isinstance(item[1], type)]
    own = [(name, cls) for name, cls in named if any(_is_own(base.__module__) for base in cls.__mro__)]
    stock = {cls for _, cls in named} - {cls for _, cls in own}
    return {name: (cls, next((base for base in cls.__mro__ if base in stock), None)) for name, cls in own}


def _is_own(module: str) -> bool:
    return module.partition('.')[0] == 'slimclr_hub'


def _stock(value: Any, own: Mapping[str, tuple[type, type | None]]) -> Any:
    """Replace the types of this package in a part of a config by those that they extend."""
    if isinstance(value, list | tuple):
        return type(value)(part for item in value if (part := _stock(item, own)) is not _DROPPED)
    if not isinstance(value, dict):
        return value
    if found := own.get(last_part(value.get('type'))):
        cls, stock = found
        if stock is None:
            return _DROPPED
        qualified = '.' in value['type']
        value = {**value, 'type': f'{stock.__module__}.{stock.__name__}' if qualified else stock.__name__}
        value.pop('widths', None)  # an argument of the loops
        if (about := getattr(cls, 'METAINFO', None)) != getattr(stock, 'METAINFO', None):
            value.setdefault('metainfo', about)  # classes of a data set
    return {key: part for key, item in value.items() if (part := _stock(item, own)) is not _DROPPED}


def _build(cfg: 'Config') -> Tensors:
    """Build the stock detector of a config; return its state dict."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    register_all_modules(init_default_scope=False)
    # mmengine imports and calls a name with dots, of whatever module.
    known = {f'{cls.__module__}.{cls.__name__}' for registry in _registries() for cls in registry.module_dict.values()}
    known |= {f'{registry.scope}.{name}' for registry in _registries() for name in registry.module_dict}
    if strangers := {kind for kind in _types(cfg.model) if '.' in kind} - known:
        raise InputError(f'the config at this width names {", ".join(sorted(strangers))}, which MMDetection does not')
    try:
        # Without memory for tensors, which a config may ask to be of any size.
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'), torch.device('meta'):
            return MODELS.build(cfg.model).state_dict()
    except Exception as error:  # whatever a part of it raises
        raise InputError(f'the config at this width builds no detector: {" ".join(str(error).split())}') from error


def _check_same(expected: Tensors, found: Tensors) -> None:
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, found))
    if problems := mismatches(*shapes):
        raise InputError(f'the tensors are not those of the config: {shorten(problems)}')


def _types(value: Any) -> Iterator[str]:
    """Yield every type that a part of a config names."""
    if isinstance(value, dict):
        if isinstance(kind := value.get('type'), str):
            yield kind
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _types(item)
