"""The configuration of a pre-training run: frozen dataclasses that check themselves on construction."""

from dataclasses import dataclass, field
from typing import Any

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.errors import InputError
from slimclr_hub.methods.loss_weights import loss_weights
from slimclr_hub.models.widths import DEFAULT_WIDTHS, check_widths, disjoint_widths
from slimclr_hub.settings import PRECISIONS, above, at_least, one_of, share
from slimclr_hub.train.diagnostics import DiagnosticsConfig
from slimclr_hub.train.method_config import MethodConfig
from slimclr_hub.train.speed_config import SpeedConfig

TRACKERS = ('none', 'tensorboard', 'wandb', 'trackio', 'mlflow', 'comet_ml', 'aim', 'clearml', 'swanlab')


@dataclass(frozen=True)
class ModelConfig:
    """The network to pre-train.

    Args:
        name: Name in timm's registry, such as slimclr_resnet50.
        widths: Widths to train; a single one is that individual network.
        overlap: Whether sub-networks share weights with each other. Without, each shares with the widest alone, and the
            narrower widths may add up to no more than that (the reference code's overlap_weight).
        weights: What to start from instead of random weights: a folder that timm opens, a .safetensors file (both of
            which `slimclr-hub convert` makes of a plain ResNet), or `pretrained` for the tag in the name.
        args: Further arguments of the network, such as drop_path_rate.
    """

    name: str = 'slimclr_resnet20'
    widths: tuple[float, ...] = DEFAULT_WIDTHS
    overlap: bool = True
    weights: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            disjoint_widths(check_widths(self.widths), self.overlap)
        except InputError as error:
            raise InputError(f'model.widths {list(self.widths)}, model.overlap {self.overlap}: {error}') from error


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate, which rises linearly in the warm-up and falls to zero by a cosine.

    Args:
        name: An optimizer of timm's; momentum is plain SGD with momentum (timm's sgd is Nesterov's).
        lr: Highest learning rate.
        lr_after_slow_start: What replaces it from epoch S on, on the same curve; the same where null.
        weight_decay: Weight decay, on every parameter.
        filter_bias_and_bn: Leave parameters of one dimension out of weight decay, and with lars out of its adaptation.
        momentum: Momentum of the optimizer.
        args: Further arguments of the optimizer, such as trust_coeff of lars.
        epochs: Epochs to train.
        warmup_epochs: Epochs of warm-up.
        accumulation_steps: Parts of data.batch_size that are processed one after the other before each step. The queue
            of mocov2 makes up for it; mocov3 and simclr then find their negatives within a part.
    """

    name: str = 'momentum'
    lr: float = 0.06
    lr_after_slow_start: float | None = None
    weight_decay: float = 1e-4
    filter_bias_and_bn: bool = False
    momentum: float = 0.9
    args: dict[str, Any] = field(default_factory=dict)
    epochs: int = 8
    warmup_epochs: float = 0.0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        above('optim.lr', self.lr, 0)
        if self.lr_after_slow_start is not None:
            above('optim.lr_after_slow_start', self.lr_after_slow_start, 0)
        at_least('optim.weight_decay', self.weight_decay, 0)
        share('optim.momentum', self.momentum)
        at_least('optim.epochs', self.epochs, 1)
        at_least('optim.warmup_epochs', self.warmup_epochs, 0)
        at_least('optim.accumulation_steps', self.accumulation_steps, 1)
        if self.warmup_epochs > self.epochs:
            raise InputError(f'optim.warmup_epochs {self.warmup_epochs} exceeds optim.epochs {self.epochs}; lower it')


@dataclass(frozen=True)
class KNNConfig:
    """Weighted k-NN accuracy at every width while training (Wu et al. 2018), before the first epoch and after the last.

    Args:
        every: Epochs from one evaluation to the next; 0 for none.
        k: Neighbours; as many as there are images where those are fewer.
        temperature: tau in the weight exp(similarity / tau) of a neighbour's vote.
        bank: Training images to search, and to fit the linear probe to, at most; all where null.
    """

    every: int = 1
    k: int = 200
    temperature: float = 0.1
    bank: int | None = None

    def __post_init__(self) -> None:
        at_least('knn.every', self.every, 0)
        at_least('knn.k', self.k, 1)
        above('knn.temperature', self.temperature, 0)
        if self.bank is not None:
            at_least('knn.bank', self.bank, 1)


@dataclass(frozen=True)
class ProbeConfig:
    """Accuracy of a linear classifier on frozen features at every width while training, learned as k-NN searches.

    Args:
        every: Epochs from one evaluation to the next; 0 for none.
        weight_decay: Factor of half the squared norm of its weights.
    """

    every: int = 0
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        at_least('probe.every', self.every, 0)
        at_least('probe.weight_decay', self.weight_decay, 0)


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
        checkpoint_steps: Optimizer steps from one checkpoint to the next, besides those after epochs; none where null.
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
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    tracker: str = 'none'
    project: str = 'slimclr'

    def __post_init__(self) -> None:
        if self.precision is not None:
            one_of('run.precision', self.precision, PRECISIONS)
        one_of('run.tracker', self.tracker, TRACKERS)
        for name in 'checkpoint_every', 'keep_checkpoints', 'log_every':
            at_least(f'run.{name}', getattr(self, name), 1)
        if self.checkpoint_steps is not None:
            at_least('run.checkpoint_steps', self.checkpoint_steps, 1)
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
        second_views: Those of the second view; the same where null.
        optim: Optimizer and learning rate.
        knn: k-NN accuracy while training.
        probe: Accuracy of a linear classifier while training.
        diagnostics: What is recorded of gradients and weights.
        run: Where and how to run.
        speed: Fast paths.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    second_views: ViewConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        batch, parts = self.data.batch_size, self.optim.accumulation_steps
        method = self.method
        assert method.weights is not None
        try:
            weights = loss_weights(method.weights, check_widths(self.model.widths))
        except InputError as error:
            raise InputError(f'method.weights {method.weights}: {error}') from error
        if min(weights) < 0:
            raise InputError(f'method.weights {list(weights)} holds one below 0; give 0 or more')
        if batch % parts:
            raise InputError(
                f'data.batch_size {batch} does not divide into optim.accumulation_steps {parts}; '
                f'give {nearest_multiple(batch, parts)}'
            )
        if method.queue_size and method.queue_size % batch:
            raise InputError(
                f'method.queue_size {method.queue_size} is not a multiple of data.batch_size {batch}; '
                f'give {nearest_multiple(method.queue_size, batch)}'
            )
        if method.bn_splits and batch % (parts * method.bn_splits):
            raise InputError(
                f'data.batch_size {batch} does not divide into method.bn_splits {method.bn_splits} in each of '
                f'optim.accumulation_steps {parts}; give {nearest_multiple(batch, parts * method.bn_splits)}'
            )
        if self.slow_start > self.optim.epochs:
            raise InputError(
                f'method.slow_start_epochs {self.slow_start:g} exceeds optim.epochs {self.optim.epochs}; '
                'sub-networks would never train. Lower it'
            )
        if self.diagnostics.on:
            self.diagnostics.smallest_of(self.model.widths, self.model.overlap)
        if self.second_views is not None and method.name == 'supervised':
            raise InputError('second_views is given, and method.name supervised has one view; set second_views to null')
        if self.second_views is not None and self.second_views.size not in (None, self.views.size):
            raise InputError(f'second_views.size {self.second_views.size} is not views.size {self.views.size}; drop it')

    @property
    def slow_start(self) -> float:
        """S, the epochs that train the full width alone (paper, section 3.2)."""
        if self.method.slow_start_epochs is None:
            return self.optim.epochs / 2
        return self.method.slow_start_epochs

    @property
    def view_count(self) -> int:
        """Views of each image that the method asks for."""
        return 1 if self.method.name == 'supervised' else 2

    def is_due(self, epoch: int, every: int) -> bool:
        """Whether what happens `every` so many epochs, and after the last, does so after `epoch`; never where 0."""
        return every > 0 and (epoch % every == 0 or epoch == self.optim.epochs)


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of `of` nearest to `value`, at least one."""
    return max(round(value / of), 1) * of
