"""From a configuration to what trains: network, method, optimizer."""

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2

from slimclr_hub.errors import InputError
from slimclr_hub.methods import MoCoV2
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.train.config import ModelConfig, OptimConfig, PretrainConfig


def make_backbone(config: ModelConfig, in_chans: int) -> SlimmableResNet:
    """The network, without a classifier.

    Raises:
        InputError: There is no such network, or it is not slimmable, or it does not take an argument.
    """
    name = config.name
    if not timm.is_model(name.partition('.')[0]):
        raise InputError(f'model.name {name!r} is not known; slimmable: {", ".join(_slimmable())}')
    if name.partition('.')[0] not in _slimmable():
        raise InputError(f'model.name {name!r} is not slimmable; these are: {", ".join(_slimmable())}')
    kwargs: dict[str, Any] = {'num_classes': 0, 'in_chans': in_chans, 'widths': config.widths, **config.args}
    if config.weights is not None:
        kwargs['pretrained'] = True
        if config.weights != 'pretrained':
            kwargs['pretrained_cfg_overlay'] = {'file': config.weights}
    try:
        backbone = timm.create_model(name, **kwargs)
    except InputError as error:
        if config.weights is None:
            raise
        raise InputError(f'model.weights {config.weights}: {error}') from error
    except (TypeError, RuntimeError) as error:
        raise InputError(f'model.name {name}, model.args {config.args}: {error}') from error
    assert isinstance(backbone, SlimmableResNet)
    return backbone


def make_method(config: PretrainConfig) -> MoCoV2:
    """The method around its network, in float32."""
    method = config.method
    return MoCoV2(
        make_backbone(config.model, config.data.channels),
        dim=method.dim,
        hidden_dim=method.hidden_dim,
        queue_size=method.queue_size,
        temperature=method.temperature,
        distillation=method.distillation,
        distillation_temperature=method.distillation_temperature,
        distillation_squared=method.distillation_squared,
        weights=method.weights,
        bn_splits=method.bn_splits,
    )


def make_optimizer(config: OptimConfig, method: torch.nn.Module) -> torch.optim.Optimizer:
    """Optimizer over all parameters that have a gradient, weight decay on every one of them (MoCo v2's choice).

    Raises:
        InputError: timm has no such optimizer.
    """
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    try:
        return create_optimizer_v2(
            parameters, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except (ValueError, AssertionError) as error:
        raise InputError(f'optim.name {config.name!r}: {error}; timm.optim.list_optimizers() lists them') from error


def _slimmable() -> list[str]:
    return [name for name in timm.list_models('slimclr_*') if name[-4] != '_']
