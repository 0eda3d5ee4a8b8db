"""From a configuration to what trains: network, method, schedule, optimizer."""

from inspect import signature
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_layer_decay
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS, CompRess
from slimclr_hub.methods.registry import training_of
from slimclr_hub.methods.teacher import Teacher
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.registry import slimmable_models
from slimclr_hub.runs.schedule import Schedule
from slimclr_hub.train.config import ModelConfig, OptimizerConfig, PretrainConfig


def make_backbone(
    config: ModelConfig, in_chans: int, num_classes: int = 0, head: str = 'switchable'
) -> SlimmableResNet:
    """The network, with a classifier of the kind `head` for `num_classes` if any.

    Raises:
        InputError: There is no such network, or it is not slimmable, or it does not take an argument.
    """
    name = config.name
    if not timm.is_model(name.partition('.')[0]):
        raise InputError(f'model.name {name!r} is not known; slimmable: {", ".join(slimmable_models())}')
    not_slimmable = InputError(f'model.name {name!r} is not slimmable; these are: {", ".join(slimmable_models())}')
    kwargs: dict[str, Any] = {
        'num_classes': num_classes,
        'in_chans': in_chans,
        'widths': config.widths,
        'overlap': config.overlap,
        **({'head': head} if num_classes else {}),
        **config.args,
    }
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
        if 'widths' in str(error):  # which every slimmable network takes
            raise not_slimmable from error
        raise InputError(f'model.name {name}, model.args {config.args}: {error}') from error
    if not isinstance(backbone, SlimmableResNet):
        raise not_slimmable
    return backbone


def make_method(config: PretrainConfig, teacher: Teacher | None = None) -> nn.Module:
    """The method around its network, in float32; it has attributes `backbone` and `widths`.

    A method with a teacher takes that of `open_teacher`.
    """
    training = training_of(config.method.name)
    backbone = make_backbone(
        config.model, config.data.channels, config.method.num_classes or 0, training.classifier or 'switchable'
    )
    return METHODS[config.method.name](backbone, *([teacher] if training.teacher else []), **config.method.arguments())


def arrange(config: PretrainConfig, method: Any) -> None:
    """Put a method into the memory format it trains in, and compile it where that is asked for; in place.

    Its normalisation layers have to be those that it will train with.
    """
    if config.run.channels_last:
        method.to(memory_format=torch.channels_last)
    if config.run.compile:
        method.backbone.compile_widths()
        if config.method.momentum is not None:
            each_width = isinstance(method, CompRess)
            for encoder in method.key_backbones.values() if each_width else [method.key_backbone]:
                encoder.compile(dynamic=False)


def make_schedule(config: PretrainConfig, steps_per_epoch: int) -> Schedule:
    """What changes over training, with `steps_per_epoch` optimizer steps in each epoch."""
    return Schedule(
        epochs=config.optim.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.optim.warmup_epochs,
        lr=config.optim.lr,
        widths=tuple(sorted(config.model.widths, reverse=True)),
        slow_start_epochs=config.slow_start,
        lr_after_slow_start=config.optim.lr_after_slow_start,
        momentum=config.method.momentum or 0.0,
        momentum_schedule=config.method.momentum_schedule or 'constant',
    )


def make_optimizer(
    config: OptimizerConfig, method: nn.Module, fused: bool = True, layer_decay: float | None = None
) -> torch.optim.Optimizer:
    """Optimizer over all parameters that have a gradient.

    Weight decay is on every one of them, which is MoCo v2's choice, or with `filter_bias_and_bn` on none of one
    dimension, which is MoCo v3's. With `layer_decay`, `lr_scale` of a group is that to the power of the number of
    layers after it, as timm counts them in a network (BEiT; Bao et al. 2021). `fused` steps by one kernel, where the
    optimizer is PyTorch's and has one.

    Raises:
        InputError: timm has no such optimizer, or it does not take an argument.
    """
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups: list[Any] = parameters
    if layer_decay is not None:
        exclude = config.filter_bias_and_bn
        groups = param_groups_layer_decay(
            method, config.weight_decay, weight_decay_exclude_1d=exclude, layer_decay=layer_decay
        )
    elif config.filter_bias_and_bn:
        groups = [
            {'params': [p for p in parameters if p.ndim > 1]},
            {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0},
        ]
    arguments = {'lr': config.lr, 'weight_decay': config.weight_decay, 'momentum': config.momentum, **config.args}
    if fused and not {'foreach', 'dampening'} & set(config.args) and _has_fused(config.name):
        arguments.setdefault('fused', True)
    try:
        optimizer = create_optimizer_v2(groups, opt=config.name, **arguments)
    except (ValueError, AssertionError) as error:
        raise InputError(f'optim.name {config.name!r}: {error}; timm.optim.list_optimizers() lists them') from error
    except TypeError as error:
        raise InputError(
            f'optim.name {config.name}, optim.args {config.args}: {error}; drop what is not known'
        ) from error
    if isinstance(optimizer, torch.optim.SGD) and arguments.get('fused'):
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Zeros as the momentum of parameters that have not been stepped yet, which gives what none gives.

    PyTorch's fused kernel wants a momentum of every parameter or of none (2.14), and those of narrow widths are stepped
    for the first time at the end of slow start.
    """
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if group['momentum'] and parameter.grad is not None:
                state = optimizer.state[parameter]
                if state.get('momentum_buffer') is None:
                    state['momentum_buffer'] = torch.zeros_like(parameter)


def _has_fused(name: str) -> bool:
    try:
        optimizer: Any = get_optimizer_class(name, bind_defaults=False)
    except ValueError:  # there is none of that name, which its making says better
        return False
    return optimizer.__module__.startswith('torch.optim.') and 'fused' in signature(optimizer).parameters
