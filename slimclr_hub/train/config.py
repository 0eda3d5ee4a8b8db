"""The configuration of a pre-training run: frozen dataclasses that check themselves on construction."""

from dataclasses import dataclass, field
from typing import Any

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.errors import InputError
from slimclr_hub.methods.loss_weights import loss_weights
from slimclr_hub.methods.losses import DISTILLATIONS
from slimclr_hub.models.widths import DEFAULT_WIDTHS, check_widths

METHODS = ('mocov2',)
TRACKERS = ('none', 'tensorboard', 'wandb', 'trackio', 'mlflow', 'comet_ml', 'aim', 'clearml', 'swanlab')
PRECISIONS = ('no', 'fp16', 'bf16')


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise InputError(f'{name} {value!r} is not one of {", ".join(map(str, choices))}')


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InputError(f'{name} is {value}; give {least} or more')


def _above(name: str, value: float, bound: float) -> None:
    if not value > bound:
        raise InputError(f'{name} is {value}; give more than {bound}')


@dataclass(frozen=True)
class ModelConfig:
    """The network to pre-train.

    Args:
        name: Name in timm's registry, such as slimclr_resnet50.
        widths: Widths to train; a single one is that individual network.
        weights: What to start from instead of random weights: a folder that timm opens, a .safetensors file (both of
            which `slimclr-hub convert` makes of a plain ResNet), or `pretrained` for the tag in the name.
        args: Further arguments of the network, such as drop_path_rate.
    """

    name: str = 'slimclr_resnet20'
    widths: tuple[float, ...] = DEFAULT_WIDTHS
    weights: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_widths(self.widths)
        except InputError as error:
            raise InputError(f'model.widths {list(self.widths)}: {error}') from error


@dataclass(frozen=True)
class MethodConfig:
    """The method, by default MoCo v2 with everything of SlimCLR.

    Args:
        name: mocov2.
        dim: Dimension of the embedding.
        hidden_dim: Hidden features of the head at width 1.0; as many as the network has where null.
        queue_size: Keys kept as negatives; a multiple of data.batch_size.
        temperature: tau_1, of InfoNCE.
        momentum: Momentum of the key encoder, each step.
        distillation: kd, mse, dkd, atkd or none.
        distillation_temperature: tau_2.
        distillation_squared: Multiply kd by tau_2 squared, as the reference code does.
        weights: Loss weights: full_plus_sum, full_plus_max, proportional, cumulative, none, or a number for each width.
        bn_splits: Parts of the batch that are normalised apart on each process; 1 where several processes train.
        slow_start_epochs: S, the epochs that train the full width alone; half of all epochs where null.
    """

    name: str = 'mocov2'
    dim: int = 128
    hidden_dim: int | None = None
    queue_size: int = 65536
    temperature: float = 0.2
    momentum: float = 0.999
    distillation: str = 'kd'
    distillation_temperature: float = 5.0
    distillation_squared: bool = True
    weights: str | tuple[float, ...] = 'full_plus_sum'
    bn_splits: int = 1
    slow_start_epochs: float | None = None

    def __post_init__(self) -> None:
        _one_of('method.name', self.name, METHODS)
        _one_of('method.distillation', self.distillation, DISTILLATIONS)
        for name in 'dim', 'queue_size', 'bn_splits':
            _at_least(f'method.{name}', getattr(self, name), 1)
        if self.hidden_dim is not None:
            _at_least('method.hidden_dim', self.hidden_dim, 1)
        for name in 'temperature', 'distillation_temperature':
            _above(f'method.{name}', getattr(self, name), 0)
        if not 0 <= self.momentum < 1:
            raise InputError(f'method.momentum is {self.momentum}; give 0 or more and less than 1')
        if self.slow_start_epochs is not None:
            _at_least('method.slow_start_epochs', self.slow_start_epochs, 0)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate, which rises linearly in the warm-up and falls to zero by a cosine.

    Args:
        name: An optimizer of timm's; momentum is plain SGD with momentum (timm's sgd is Nesterov's).
        lr: Highest learning rate.
        weight_decay: Weight decay, on every parameter.
        momentum: Momentum of the optimizer.
        epochs: Epochs to train.
        warmup_epochs: Epochs of warm-up.
    """

    name: str = 'momentum'
    lr: float = 0.06
    weight_decay: float = 1e-4
    momentum: float = 0.9
    epochs: int = 8
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _above('optim.lr', self.lr, 0)
        _at_least('optim.weight_decay', self.weight_decay, 0)
        if not 0 <= self.momentum < 1:
            raise InputError(f'optim.momentum is {self.momentum}; give 0 or more and less than 1')
        _at_least('optim.epochs', self.epochs, 1)
        _at_least('optim.warmup_epochs', self.warmup_epochs, 0)
        if self.warmup_epochs > self.epochs:
            raise InputError(f'optim.warmup_epochs {self.warmup_epochs} exceeds optim.epochs {self.epochs}; lower it')


@dataclass(frozen=True)
class KNNConfig:
    """Weighted k-NN accuracy at every width while training (Wu et al. 2018), before the first epoch and after the last.

    Args:
        every: Epochs from one evaluation to the next; 0 for none.
        k: Neighbours; as many as there are images where those are fewer.
        temperature: tau in the weight exp(similarity / tau) of a neighbour's vote.
        bank: Training images to search at most; all where null.
    """

    every: int = 1
    k: int = 200
    temperature: float = 0.1
    bank: int | None = None

    def __post_init__(self) -> None:
        _at_least('knn.every', self.every, 0)
        _at_least('knn.k', self.k, 1)
        _above('knn.temperature', self.temperature, 0)
        if self.bank is not None:
            _at_least('knn.bank', self.bank, 1)


@dataclass(frozen=True)
class RunConfig:
    """Where and how to run.

    Args:
        output: Folder of the runs.
        name: Folder of this run within it; one that is free is chosen where null.
        seed: Seed of initialisation, order and views.
        precision: no for float32, bf16 or fp16; what accelerate was told where null.
        channels_last: Memory layout of convolutions in which the channels of a pixel lie together.
        checkpoint_every: Epochs from one checkpoint to the next.
        keep_checkpoints: Checkpoints kept; older ones are removed after a newer one is complete.
        log_every: Steps from one line of the log to the next.
        tracker: none, or a tracker of accelerate's: tensorboard, wandb, trackio, ...
        project: Name of the project at the tracker.
    """

    output: str = 'runs'
    name: str | None = None
    seed: int = 0
    precision: str | None = None
    channels_last: bool = True
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    log_every: int = 10
    tracker: str = 'none'
    project: str = 'slimclr'

    def __post_init__(self) -> None:
        if self.precision is not None:
            _one_of('run.precision', self.precision, PRECISIONS)
        _one_of('run.tracker', self.tracker, TRACKERS)
        for name in 'checkpoint_every', 'keep_checkpoints', 'log_every':
            _at_least(f'run.{name}', getattr(self, name), 1)
        if not 0 <= self.seed < 2**32:
            raise InputError(f'run.seed is {self.seed}; give 0 to 2**32 - 1')
        if self.name is not None and (self.name in ('', '.', '..') or '/' in self.name):
            raise InputError(f'run.name {self.name!r} is not the name of a folder; run.output says where it lies')


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run.

    Args:
        model: The network.
        method: The method.
        data: The images.
        views: The augmentations.
        optim: Optimizer and learning rate.
        knn: The evaluation while training.
        run: Where and how to run.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        try:
            weights = loss_weights(self.method.weights, check_widths(self.model.widths))
        except InputError as error:
            raise InputError(f'method.weights {self.method.weights}: {error}') from error
        if min(weights) < 0:
            raise InputError(f'method.weights {list(weights)} holds one below 0')
        if self.method.queue_size % self.data.batch_size:
            nearest = max(round(self.method.queue_size / self.data.batch_size), 1) * self.data.batch_size
            raise InputError(
                f'method.queue_size {self.method.queue_size} is not a multiple of data.batch_size '
                f'{self.data.batch_size}; give {nearest}'
            )
        if self.data.batch_size % self.method.bn_splits:
            raise InputError(
                f'data.batch_size {self.data.batch_size} does not divide into method.bn_splits {self.method.bn_splits}'
            )
        if self.slow_start > self.optim.epochs:
            raise InputError(
                f'method.slow_start_epochs {self.slow_start:g} exceeds optim.epochs {self.optim.epochs}; '
                'sub-networks would never train'
            )

    @property
    def slow_start(self) -> float:
        """S, the epochs that train the full width alone (paper, section 3.2)."""
        if self.method.slow_start_epochs is None:
            return self.optim.epochs / 2
        return self.method.slow_start_epochs
