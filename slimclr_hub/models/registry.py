"""Registration of the networks in timm, and a factory that finds their weights before it builds."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import _factory, build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

from slimclr_hub.errors import InputError
from slimclr_hub.models.budget import Budget, Choice, Setting, choose
from slimclr_hub.models.convert import convert
from slimclr_hub.models.dense import DenseResNet
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.models.loading import check_fits, check_head, checkpoint_filter_fn
from slimclr_hub.models.resolutions import Resolutions, load_resolutions
from slimclr_hub.models.slimmable_resnet import BasicBlock, Bottleneck, SlimmableFeatureGetter, SlimmableResNet
from slimclr_hub.models.widths import DEFAULT_WIDTHS, check_width, check_widths, width_key
from slimclr_hub.weights import source
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import ARCHITECTURES
from slimclr_hub.weights.published import (
    AUTHORS_REPOSITORY,
    LICENSE_NOTE,
    PAPER,
    PAPER_ID,
    PUBLISHED,
    SHIPPED,
    Shipped,
    hub_name,
    published_names,
)

__all__: list[str] = []

_logger = logging.getLogger(__name__)

_OURS = (SlimmableResNet, LazySlimmableResNet, DenseResNet)

Network = TypeVar('Network', SlimmableResNet, DenseResNet)


def slimmable_models() -> list[str]:
    """Names of the slimmable networks in timm's registry, without tags."""
    return list(ARCHITECTURES.values())


def _arch(variant: str) -> dict[str, Any]:
    expansion, layers, stem = next(key for key, name in ARCHITECTURES.items() if name == variant)
    return {
        'block': Bottleneck if expansion > 1 else BasicBlock,
        'layers': layers,
        'channels': tuple(stem * 2**stage for stage in range(len(layers))),
        'small_stem': len(layers) == 3,
    }


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        'paper_name': PAPER,
        'paper_ids': PAPER_ID,
        **kwargs,
    }


def _slimmable_cfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(classifier=tuple(f'fc.{width_key(width)}' for width in DEFAULT_WIDTHS), **kwargs)


_SMALL = {'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0}


def _published(variant: str, cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Every width of an architecture loads from the one file of its tag.
    return {
        f'{variant}.{tag}': {
            **cfg,
            'hf_hub_id': hub_name(tag),
            'num_classes': network.num_classes,
            'license': 'other',
            'description': f'SlimCLR on {network.method}, {network.epochs} epochs on ImageNet-1k without labels',
            'origin_url': AUTHORS_REPOSITORY,
            'notes': (LICENSE_NOTE,),
        }
        for tag, network in PUBLISHED.items()
    }


def _shipped(variant: str, cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Grey images are read as colours that are equal, so that timm's transforms serve as they are; the first convolution
    # then has a third of its weight for each.
    return {
        f'{variant}.{tag}': {
            **cfg,
            'file': str(network.weights),
            'num_classes': network.num_classes,
            'input_size': (3, network.size, network.size),
            'pool_size': (network.size // 4,) * 2,
            'crop_pct': 1.0,
            'mean': (network.mean,) * 3,
            'std': (network.std,) * 3,
            'description': f'SlimCLR on {network.method}, {network.epochs} epochs on {network.data} without labels',
        }
        for tag, network in SHIPPED.items()
    }


default_cfgs = generate_default_cfgs(
    {
        **_published('slimclr_resnet50', _slimmable_cfg()),
        **{name: _slimmable_cfg() for name in ('slimclr_resnet18', 'slimclr_resnet34')},
        'slimclr_resnet101': _slimmable_cfg(),
        'slimclr_resnet152': _slimmable_cfg(),
        **_shipped('slimclr_resnet20', _slimmable_cfg()),
        'slimclr_resnet20x4': _slimmable_cfg(**_SMALL),
        **_published('slimclr_resnet50_075', _cfg()),
        **_published('slimclr_resnet50_050', _cfg()),
        **_published('slimclr_resnet50_025', _cfg()),
        **{f'slimclr_resnet{depth}_{width}': _cfg() for depth in (18, 34) for width in ('075', '050', '025')},
        **_shipped('slimclr_resnet20_075', _cfg()),
        **_shipped('slimclr_resnet20_050', _cfg()),
        **_shipped('slimclr_resnet20_025', _cfg()),
    }
)


def build(
    cls: type[Network],
    variant: str,
    pretrained: bool,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Network:
    """Build a network by timm's factory, after finding its weights: a file, the Hub, or the authors' release.

    timm alone takes the first source that a configuration names and tries no other. Arguments are timm's; `file` in
    `pretrained_cfg_overlay` names a file or folder of one's own, and `cls.load_pretrained(path)` loads safetensors.
    `file` and `state_dict` in a `pretrained_cfg` that is a dictionary are ignored.

    Raises:
        InputError: There are no weights, they cannot be had, or they do not fit.
    """
    pretrained_cfg = _without_files(pretrained_cfg)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = pretrained_cfg_overlay
    make: Callable[..., Network] = cls
    if pretrained and cfg.state_dict:
        overlay = {**(overlay or {}), 'source': ''}  # by another one, timm would load past the tensors in its own way
    elif pretrained:
        width = _largest_needed(cls, kwargs)
        path = _locate(cfg, variant, width, None if cache_dir is None else Path(cache_dir), kwargs.get('overlap', True))
        if path.name == source.PICKLED_WEIGHTS:
            if cls is LazySlimmableResNet:
                raise InputError(f'{path}: lazy=True reads safetensors; leave lazy out')
            overlay = {**(overlay or {}), 'state_dict': read_checkpoint(path)}
        else:
            num_classes = kwargs.get('num_classes', cfg.num_classes)
            # A config.json may ask for any number; a network of a user's own may name its head otherwise.
            if cls in _OURS and num_classes == cfg.num_classes != 0:
                check_head(path, num_classes, width)
            overlay = {**(overlay or {}), 'file': str(path), 'source': '', 'custom_load': True}
            make = _uninitialised(cls, path)
    model = build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )
    if pretrained:
        for module in model.modules():
            # transformers' TimmBackbone sets the statistics of a batch normalisation without this mark back to zero
            # and one (5.23; transformers pull request 43520 reports the same).
            vars(module)['_is_hf_initialized'] = True
        if (shipped := _in_package(cfg.tag, cfg.file)) is not None:
            # Here and not in timm's table of configurations: a head without these weights has classes of its own.
            model.pretrained_cfg['label_names'] = shipped.classes
    # The configuration that was asked for, not the one that timm was given.
    for key in ('file', 'source', 'custom_load', 'state_dict'):
        value = getattr(cfg, key)
        if value is None:
            model.pretrained_cfg.pop(key, None)
        else:
            model.pretrained_cfg[key] = value
    return model


def _reading_ours_first() -> None:
    """Let `hf-hub:` and `local-dir:` names of what is not there end in this package's words inside of timm, too.

    timm reads a `config.json` before it knows whose network it is.
    """
    from_hub, from_path = _factory.load_model_config_from_hf, _factory.load_model_config_from_path

    def read_from_hub(model_id: str, cache_dir: str | Path | None = None) -> Any:
        source.from_hub(model_id, 'config.json', None if cache_dir is None else Path(cache_dir))
        return from_hub(model_id, cache_dir=cache_dir)

    def read_from_path(model_path: str | Path) -> Any:
        if not (Path(model_path) / 'config.json').is_file():
            missing = 'has no config.json; it is not a folder that timm opens'
            raise NoFolderError(f'{model_path} {missing if Path(model_path).exists() else "does not exist"}')
        return from_path(model_path)

    _factory.load_model_config_from_hf = read_from_hub
    _factory.load_model_config_from_path = read_from_path


class NoFolderError(InputError, FileNotFoundError):
    """A `local-dir:` is none; also what timm raises then."""


_reading_ours_first()


def _without_files(cfg: Any) -> Any:
    """A configuration without tensors and paths, which only the caller's overlay may name.

    A `config.json` from anywhere comes here as a dictionary. timm itself sets the path of a `local-dir:`.
    """
    if not isinstance(cfg, Mapping):
        return cfg
    own_file = cfg.get('source') == 'local-dir' or _in_package(cfg.get('tag'), cfg.get('file')) is not None
    names = ('state_dict',) if own_file else ('state_dict', 'file')
    return {key: value for key, value in cfg.items() if key not in names}


def _in_package(tag: Any, file: Any) -> Shipped | None:
    """The network in the package that has this tag, if `file` is its own."""
    shipped = SHIPPED.get(tag or '')
    return shipped if shipped is not None and file == str(shipped.weights) else None


def _uninitialised(cls: type[Network], path: Path) -> Callable[..., Network]:
    """The class without its random initialisation, which takes longer than loading and is replaced by it.

    Shapes are compared with those of the weights in `path` before there is memory for them.
    """

    def make(*, device: Any = None, **kwargs: Any) -> Network:
        model = cls(device='meta', **kwargs)
        if cls in _OURS:
            check_fits(model, path)
        model.to_empty(device=torch.get_default_device() if device is None else device)
        model.init_head()  # the one part that weights may leave out
        return model

    return make


def _largest_needed(cls: type[Network], kwargs: Mapping[str, Any]) -> float:
    """The width up to which a network needs weights."""
    if cls is DenseResNet:
        return kwargs.get('width', 1.0)
    if cls not in _OURS or not kwargs.get('overlap', True):
        return 1.0
    widths = check_widths(kwargs.get('widths', DEFAULT_WIDTHS))
    width = kwargs.get('width')
    if width is not None:
        width = check_width(width, widths)
    return width if width is not None and cls is LazySlimmableResNet else widths[0]


def _locate(cfg: PretrainedCfg, variant: str, width: float, cache_dir: Path | None, overlap: bool) -> Path:
    shipped = _in_package(cfg.tag, cfg.file)
    if shipped is not None and not cfg.hf_hub_id:  # which whoever overlays it prefers
        return source.from_package(shipped)
    if cfg.source != 'hf-hub' and cfg.file and not shipped:
        return source.from_file(Path(cfg.file))
    if cfg.source != 'hf-hub' and cfg.tag is not None and cfg.tag in PUBLISHED and cfg.hf_hub_id == hub_name(cfg.tag):
        if not overlap:
            raise InputError(f'overlap=False: the widths of the published {cfg.tag} overlap; leave overlap out')
        return source.published(cfg.tag, convert, cache_dir, width)
    if cfg.hf_hub_id:
        filename = cfg.hf_hub_filename or source.WEIGHTS
        if filename != source.WEIGHTS:
            return source.from_hub(cfg.hf_hub_id, filename, cache_dir)
        return source.weights_from_hub(cfg.hf_hub_id, width, cache_dir)
    raise InputError(
        f'there are no pretrained weights of {variant}; there are of '
        f'{", ".join(published_names())}. pretrained=False gives a network of random weights'
    )


def _levels(arch: dict[str, Any]) -> tuple[int, ...]:
    """Feature levels that differ in size, as decoders expect: the small stem has that of the first stage."""
    return tuple(range(arch['small_stem'], len(arch['layers']) + 1))


def _slimmable(
    variant: str,
    pretrained: bool,
    lazy: bool = False,
    pad_channels: bool = False,
    max_ms: float | None = None,
    max_mib: float | None = None,
    max_macs: float | None = None,
    resolutions: str | Path | None = None,
    **kwargs: Any,
) -> SlimmableResNet:
    if resolutions is not None and (lazy or not pretrained or kwargs.get('features_only')):
        raise InputError('resolutions=FILE is of whole networks: give pretrained=True, without lazy and features_only')
    found = None if resolutions is None else load_resolutions(Path(resolutions))
    size = None
    if budget := Budget(max_ms, max_mib, max_macs):
        choice = _best_within(variant, budget, found, kwargs)
        kwargs['width'], size = choice.width, choice.size
    if pad_channels and not kwargs.get('features_only'):
        raise InputError('pad_channels=True is for the maps of features_only=True; leave it out, or give both')
    if lazy and not pretrained:
        raise InputError('lazy=True reads widths from the weights when they are asked for; it needs pretrained=True')
    if lazy and not kwargs.get('overlap', True):
        raise InputError('lazy=True is for widths that overlap; with overlap=False leave lazy out')
    arch = _arch(variant)
    features: dict[str, Any] = {'out_indices': _levels(arch), 'feature_cls': SlimmableFeatureGetter}
    if pad_channels:  # timm's own wrappers, which a user may ask for, do not know it
        features['pad_channels'] = True
    cls = LazySlimmableResNet if lazy else SlimmableResNet
    model = build(cls, variant, pretrained, feature_cfg=features, **{**arch, **kwargs})
    if resolutions is not None:
        model.load_resolutions(resolutions)
        if size is not None:
            model.set_resolution(size)
    return model


def _dense(variant: str, pretrained: bool, **kwargs: Any) -> DenseResNet:
    arch = _arch(variant.rpartition('_')[0])
    arguments = {**arch, 'block': arch['block'].dense, **kwargs}
    features = {'feature_cls': 'getter', 'out_indices': _levels(arch)}
    return build(DenseResNet, variant, pretrained, feature_cfg=features, **arguments)


def _best_within(variant: str, budget: Budget, resolutions: Resolutions | None, kwargs: Mapping[str, Any]) -> Choice:
    if 'width' in kwargs:
        raise InputError(f'width={kwargs["width"]} and a budget both choose the width; give one of them')
    of_features = ('features_only', 'out_indices')
    arguments = {key: value for key, value in kwargs.items() if key not in of_features}
    model = build(SlimmableResNet, variant, False, **{**_arch(variant), **arguments, 'device': 'meta'})
    device = torch.device(kwargs.get('device') or torch.get_default_device()).type
    choice = choose(model, budget, Setting(model.pretrained_cfg['input_size'][-1], device=device), resolutions)
    _logger.info('Within the budget %s', choice.why)
    return choice


@register_model
def slimclr_resnet18(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-18, of basic blocks."""
    return _slimmable('slimclr_resnet18', pretrained, **kwargs)


@register_model
def slimclr_resnet34(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-34, of basic blocks."""
    return _slimmable('slimclr_resnet34', pretrained, **kwargs)


@register_model
def slimclr_resnet50(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-50."""
    return _slimmable('slimclr_resnet50', pretrained, **kwargs)


@register_model
def slimclr_resnet101(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-101."""
    return _slimmable('slimclr_resnet101', pretrained, **kwargs)


@register_model
def slimclr_resnet152(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-152."""
    return _slimmable('slimclr_resnet152', pretrained, **kwargs)


@register_model
def slimclr_resnet20(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-20 for images of 32x32: three stages of 16, 32 and 64 channels."""
    return _slimmable('slimclr_resnet20', pretrained, **kwargs)


@register_model
def slimclr_resnet20x4(pretrained: bool = False, **kwargs: Any) -> SlimmableResNet:
    """Slimmable ResNet-20 with four times the channels, the small-scale network of the paper (section 4.4)."""
    return _slimmable('slimclr_resnet20x4', pretrained, **kwargs)


@register_model
def slimclr_resnet18_075(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-18 at width 0.75."""
    return _dense('slimclr_resnet18_075', pretrained, width=0.75, **kwargs)


@register_model
def slimclr_resnet18_050(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-18 at width 0.5."""
    return _dense('slimclr_resnet18_050', pretrained, width=0.5, **kwargs)


@register_model
def slimclr_resnet18_025(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-18 at width 0.25."""
    return _dense('slimclr_resnet18_025', pretrained, width=0.25, **kwargs)


@register_model
def slimclr_resnet34_075(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-34 at width 0.75."""
    return _dense('slimclr_resnet34_075', pretrained, width=0.75, **kwargs)


@register_model
def slimclr_resnet34_050(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-34 at width 0.5."""
    return _dense('slimclr_resnet34_050', pretrained, width=0.5, **kwargs)


@register_model
def slimclr_resnet34_025(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-34 at width 0.25."""
    return _dense('slimclr_resnet34_025', pretrained, width=0.25, **kwargs)


@register_model
def slimclr_resnet50_075(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-50 at width 0.75."""
    return _dense('slimclr_resnet50_075', pretrained, width=0.75, **kwargs)


@register_model
def slimclr_resnet50_050(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-50 at width 0.5."""
    return _dense('slimclr_resnet50_050', pretrained, width=0.5, **kwargs)


@register_model
def slimclr_resnet50_025(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-50 at width 0.25."""
    return _dense('slimclr_resnet50_025', pretrained, width=0.25, **kwargs)


@register_model
def slimclr_resnet20_075(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-20 at width 0.75."""
    return _dense('slimclr_resnet20_075', pretrained, width=0.75, **kwargs)


@register_model
def slimclr_resnet20_050(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-20 at width 0.5."""
    return _dense('slimclr_resnet20_050', pretrained, width=0.5, **kwargs)


@register_model
def slimclr_resnet20_025(pretrained: bool = False, **kwargs: Any) -> DenseResNet:
    """Dense ResNet-20 at width 0.25."""
    return _dense('slimclr_resnet20_025', pretrained, width=0.25, **kwargs)
