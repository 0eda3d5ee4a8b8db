"""timm's factory, with weights that are found before it builds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

from slimclr_hub.errors import InputError
from slimclr_hub.models.dense import DenseResNet
from slimclr_hub.models.loading import checkpoint_filter_fn
from slimclr_hub.models.slimmable_resnet import SlimmableResNet
from slimclr_hub.weights import source
from slimclr_hub.weights.published import ARCHITECTURE, PUBLISHED, hub_name

Network = TypeVar('Network', SlimmableResNet, DenseResNet)


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
    """Build a network as timm does, but find its weights first: a file, the Hub, or the authors' release.

    timm takes the first source that a configuration names and tries no other.

    Args:
        cls: Class of the network; its `load_pretrained(path)` loads a safetensors file.
        variant: Name of the architecture.
        pretrained: Whether to load weights.
        pretrained_cfg: As timm's factory has it.
        pretrained_cfg_overlay: As timm's factory has it; `file` names a file or folder of one's own.
        cache_dir: Where downloads are kept.
        kwargs: Arguments of the class and of timm's factory.

    Raises:
        InputError: There are no weights, they cannot be had, or they do not fit.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = pretrained_cfg_overlay
    if pretrained and not cfg.state_dict:
        path = _locate(cfg, variant, None if cache_dir is None else Path(cache_dir), kwargs.get('overlap', True))
        overlay = {**(overlay or {}), 'file': str(path), 'source': '', 'custom_load': True}
    model = build_model_with_cfg(
        _unfilled(cls) if pretrained and not cfg.state_dict else cls,
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
            # and one (5.23; transformers pull request 43520 tells of the same).
            vars(module)['_is_hf_initialized'] = True
    # What the network tells of its weights is what was asked for, not how timm came to them.
    for key in ('file', 'source', 'custom_load'):
        value = getattr(cfg, key)
        if value is None:
            model.pretrained_cfg.pop(key, None)
        else:
            model.pretrained_cfg[key] = value
    return model


def _unfilled(cls: type[Network]) -> Callable[..., Network]:
    """The class, but without random weights that loading would replace: they take longer than loading does."""

    def make(*, device: Any = None, **kwargs: Any) -> Network:
        model = cls(device='meta', **kwargs)
        model.to_empty(device=torch.get_default_device() if device is None else device)
        model.init_head()  # the one part that weights may leave out
        return model

    return make


def _locate(cfg: PretrainedCfg, variant: str, cache_dir: Path | None, overlap: bool) -> Path:
    if cfg.source != 'hf-hub' and cfg.file:
        return source.from_file(Path(cfg.file))
    if cfg.source != 'hf-hub' and cfg.tag is not None and cfg.tag in PUBLISHED and cfg.hf_hub_id == hub_name(cfg.tag):
        if not overlap:
            raise InputError(f'overlap=False: the widths of the published {cfg.tag} overlap; leave overlap out')
        return source.published(cfg.tag, cache_dir)
    if cfg.hf_hub_id:
        return source.from_hub(cfg.hf_hub_id, cfg.hf_hub_filename or source.WEIGHTS, cache_dir)
    raise InputError(
        f'there are no pretrained weights of {variant}; there are of {ARCHITECTURE}, with the tags '
        f'{", ".join(PUBLISHED)}. pretrained=False gives a network of random weights'
    )
