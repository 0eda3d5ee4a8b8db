"""The method of a run: which one, and its numbers."""

from dataclasses import dataclass, fields
from typing import Any

from slimclr_hub.errors import InputError
from slimclr_hub.methods.losses import DISTILLATIONS
from slimclr_hub.settings import above, at_least, one_of, share

MOMENTUM_SCHEDULES = ('constant', 'cosine')

_EVERY_METHOD: dict[str, Any] = {
    'distillation': 'kd',
    'distillation_squared': True,
    'weights': 'full_plus_sum',
    'slow_start_epochs': None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    'mocov2': {
        **_EVERY_METHOD,
        'dim': 128,
        'hidden_dim': None,
        'queue_size': 65536,
        'temperature': 0.2,
        'momentum': 0.999,
        'momentum_schedule': 'constant',
        'distillation_temperature': 5.0,
        'bn_splits': 1,
        'shuffle_keys': True,
        'sync_bn': False,
    },
    'mocov3': {
        **_EVERY_METHOD,
        'dim': 256,
        'hidden_dim': 4096,
        'temperature': 1.0,
        'momentum': 0.99,
        'momentum_schedule': 'cosine',
        'distillation_temperature': 1.0,
        'sync_bn': True,
    },
    'simclr': {
        **_EVERY_METHOD,
        'dim': 128,
        'hidden_dim': None,
        'temperature': 0.1,
        'distillation_temperature': 5.0,
        'sync_bn': True,
    },
    'supervised': {
        **_EVERY_METHOD,
        'weights': 'none',
        'slow_start_epochs': 0.0,
        'distillation_temperature': 1.0,
        'num_classes': None,
        'sync_bn': False,
    },
}
METHODS = tuple(_DEFAULTS)
_LEAST = {'dim': 1, 'hidden_dim': 1, 'queue_size': 0, 'bn_splits': 1, 'slow_start_epochs': 0, 'num_classes': 2}


@dataclass(frozen=True)
class MethodConfig:
    """The method, by default MoCo v2 with everything of SlimCLR; what is null has the method's own value.

    Args:
        name: mocov2, mocov3, simclr or supervised.
        dim: Dimension of the embedding: 128; 256 for mocov3.
        hidden_dim: Hidden features of the heads at width 1.0: as many as the network has; 4096 for mocov3.
        queue_size: Keys that mocov2 keeps as negatives, a multiple of data.batch_size: 65536. 0 takes the keys of
            the other images of the batch instead.
        temperature: tau_1, of InfoNCE: 0.2; 1 for mocov3, 0.1 for simclr.
        momentum: Momentum of the key encoder at the first step: 0.999; 0.99 for mocov3.
        momentum_schedule: constant for mocov2, cosine (to 1) for mocov3.
        distillation: kd, mse, dkd, atkd or none: kd.
        distillation_temperature: tau_2, of kd: 5; 1 for mocov3 and supervised.
        distillation_squared: Multiply kd by tau_2 squared, as the reference code does: true.
        weights: Loss weights: full_plus_sum, full_plus_max, proportional, cumulative, none, or a number for each width:
            full_plus_sum; none for supervised.
        bn_splits: Parts of the batch that mocov2 normalises apart on each process; 1 where several processes train: 1.
        shuffle_keys: Permute keys over processes and parts before mocov2 encodes them: true.
        sync_bn: Normalise over all processes: true for mocov3 and simclr.
        slow_start_epochs: S, the epochs that train the full width alone: half of all epochs; 0 for supervised.
        num_classes: Classes that supervised tells apart; it has to be given.
    """

    name: str = 'mocov2'
    dim: int | None = None
    hidden_dim: int | None = None
    queue_size: int | None = None
    temperature: float | None = None
    momentum: float | None = None
    momentum_schedule: str | None = None
    distillation: str | None = None
    distillation_temperature: float | None = None
    distillation_squared: bool | None = None
    weights: str | tuple[float, ...] | None = None
    bn_splits: int | None = None
    shuffle_keys: bool | None = None
    sync_bn: bool | None = None
    slow_start_epochs: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        one_of('method.name', self.name, METHODS)
        defaults = _DEFAULTS[self.name]
        for name in (field.name for field in fields(self) if field.name != 'name'):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                owners = ', '.join(method for method, known in _DEFAULTS.items() if name in known)
                raise InputError(
                    f'method.{name} {value} is not for method.name {self.name} but for {owners}; set it to null'
                )
        one_of('method.distillation', self.distillation, DISTILLATIONS)
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        for name, least in _LEAST.items():
            if name in given:
                at_least(f'method.{name}', given[name], least)
        for name in 'temperature', 'distillation_temperature':
            if name in given:
                above(f'method.{name}', given[name], 0)
        if 'momentum' in given:
            share('method.momentum', given['momentum'])
            one_of('method.momentum_schedule', self.momentum_schedule, MOMENTUM_SCHEDULES)
        if self.name == 'supervised' and self.num_classes is None:
            raise InputError('method.num_classes is null, and supervised needs it; give the number of classes')
        if self.sync_bn and (self.bn_splits or 1) > 1:
            raise InputError(
                f'method.bn_splits {self.bn_splits} normalises parts of the batch, method.sync_bn true all of it; '
                'drop one'
            )

    def arguments(self) -> dict[str, Any]:
        """Arguments of the method's class."""
        outside = {'momentum', 'momentum_schedule', 'sync_bn', 'slow_start_epochs', 'num_classes'}
        return {name: getattr(self, name) for name in _DEFAULTS[self.name] if name not in outside}
