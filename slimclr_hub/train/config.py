"""The configuration of a pre-training run: frozen dataclasses that check themselves on construction."""

from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import torch

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import default_k
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.losses import check_loss_weights
from slimclr_hub.methods.registry import Setting, constructor_settings, settings_of, training_of
from slimclr_hub.models.widths import DEFAULT_WIDTHS, check_widths, disjoint_widths
from slimclr_hub.settings import (
    Incidental,
    above,
    at_least,
    check_all,
    check_fraction,
    check_precision,
    check_seed,
    one_of,
    problem,
)
from slimclr_hub.train.diagnostics import DiagnosticsConfig

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
class OptimizerConfig:
    """Optimizer and learning rate, which rises linearly in the warm-up and falls to zero by a cosine.

    Args:
        name: An optimizer of timm's; momentum is plain SGD with momentum (timm's sgd is Nesterov's).
        lr: Highest learning rate.
        weight_decay: Weight decay, on every parameter.
        filter_bias_and_bn: Leave parameters of one dimension out of weight decay, and with lars out of its adaptation.
        momentum: Momentum of the optimizer.
        args: Further arguments of the optimizer, such as trust_coeff of lars.
        epochs: Epochs to train.
        warmup_epochs: Epochs of warm-up.
        accumulation_steps: Microbatches that data.batch_size is divided into, processed one after the other before each
            step. The queue of a method makes up for it; mocov3 and simclr then take their negatives from a microbatch.
    """

    name: str = 'momentum'
    lr: float = 0.06
    weight_decay: float = 1e-4
    filter_bias_and_bn: bool = False
    momentum: float = 0.9
    args: dict[str, Any] = field(default_factory=dict)
    epochs: int = 8
    warmup_epochs: float = 0.0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        above('optim.lr', self.lr, 0)
        at_least('optim.weight_decay', self.weight_decay, 0)
        check_fraction('optim.momentum', self.momentum)
        at_least('optim.epochs', self.epochs, 1)
        at_least('optim.warmup_epochs', self.warmup_epochs, 0)
        at_least('optim.accumulation_steps', self.accumulation_steps, 1)


@dataclass(frozen=True)
class OptimConfig(OptimizerConfig):
    """Those of pre-training; other arguments are `OptimizerConfig`'s.

    Args:
        lr_after_slow_start: What replaces the learning rate from epoch S on, on the same curve; the same where null.
    """

    lr_after_slow_start: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_after_slow_start is not None:
            above('optim.lr_after_slow_start', self.lr_after_slow_start, 0)


class MethodConfig:
    """The method of a run, by default MoCo v2 with everything of SlimCLR.

    A setting that is not given, or null, has the method's own default, which stands in the signature of its
    constructor; `slimclr_hub.methods.registry` lists them. Settings are attributes; those that only other methods have
    are None.

    Args:
        name: Name of a registered method.
        settings: Its settings.

    Raises:
        InputError: There is no such method, a setting belongs to others, or a value is out of range.
    """

    name: str

    def __init__(self, name: str = 'mocov2', **settings: Any) -> None:
        known = settings_of(name)
        given = {key: value for key, value in settings.items() if value is not None}
        check_all(_problems_of_method(name, known, given))
        values = {key: given.get(key, setting.default) for key, setting in known.items()}
        for key, value in values.items():
            if isinstance(value, int) and known[key].type is float and not isinstance(value, bool):
                values[key] = float(value)
        vars(self).update(name=name, **values)

    def __getattr__(self, key: str) -> Any:
        if any(key in settings_of(method) for method in METHODS):
            return None
        raise AttributeError(f'no method has the setting {key!r}')

    def __setattr__(self, key: str, value: Any) -> None:
        raise FrozenInstanceError(f'cannot assign to {key!r}')

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MethodConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f'MethodConfig({", ".join(f"{key}={value!r}" for key, value in vars(self).items())})'

    def replace(self, **settings: Any) -> 'MethodConfig':
        """The same method with other values of some settings."""
        return MethodConfig(**{**vars(self), **settings})

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the method's constructor."""
        return {key: getattr(self, key) for key in constructor_settings(METHODS[self.name])}


def _problems_of_method(name: str, known: Mapping[str, Setting], given: Mapping[str, Any]) -> Iterator[str]:
    foreign = [key for key in given if key not in known]
    owners = {key: [method for method in METHODS if key in settings_of(method)] for key in foreign}
    yield from (f'method.{key} is not known' for key in foreign if not owners[key])
    if others := [f'method.{key} {given[key]} (of {", ".join(owners[key])})' for key in foreign if owners[key]]:
        unset = ' '.join(f'--method.{key} null' for key in foreign if owners[key])
        yield f'not for method.name {name}: {", ".join(others)}; add {unset}'
    for key, setting in known.items():
        if key in given:
            yield from problem(setting.check, f'method.{key}', given[key])
        elif setting.required:
            yield f'method.{key} is null, and {name} needs it; give --method.{key}'
    if given.get('sync_bn') and given.get('bn_splits', 1) > 1:
        yield (
            f'method.bn_splits {given["bn_splits"]} normalises splits of the batch, method.sync_bn true all of it; '
            'drop one'
        )


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen network that a method with a teacher learns from.

    Args:
        network: A name of timm's such as resnet50.a1_in1k, hf-hub:USER/NAME, a folder that timm opens, such as that of
            a run, a checkpoint's file, or a tag of this package's such as slimclr_resnet20.mocov3_fashionmnist.
        width: Width of a slimmable one; its widest where null.
        head: Embed by its projection head, as the papers do, rather than by features: the head in a checkpoint's file,
            or in the newest checkpoint of a run.
        cached: Let it look once at the centre crop of each training image rather than at each view in each epoch. What
            it sees is kept in the folder `teacher_features` of run.output, where other runs find it.
    """

    network: str | None = None
    width: float | None = None
    head: bool = False
    cached: bool = False

    def __post_init__(self) -> None:
        if self.width is not None and self.network is None:
            raise InputError(f'teacher.width {self.width} is that of no teacher; give --teacher.network')
        for name in 'head', 'cached':
            if getattr(self, name) and self.network is None:
                raise InputError(f'teacher.{name} is true, and there is no teacher; give --teacher.network')


@dataclass(frozen=True)
class KNNConfig(Incidental):
    """Evaluation at every width while training, before the first epoch and after the last.

    Weighted k-NN accuracy (Wu et al. 2018), and the effective rank of features, which needs no labels.

    Args:
        every: Epochs from one evaluation to the next; 0 for none.
        k: Neighbours; a tenth of the images of a class, 5 to 200, where null.
        temperature: tau in the weight exp(similarity / tau) of a neighbour's vote.
        bank: Training images to search, to take the rank from, and to fit the linear probe to, at most; all where null.
        raw_pixels: State once what the pixels of the images reach, too; never for images of more than 64 pixels a side.
    """

    every: int = 1
    k: int | None = None
    temperature: float = 0.1
    bank: int | None = None
    raw_pixels: bool = True

    def __post_init__(self) -> None:
        at_least('knn.every', self.every, 0)
        if self.k is not None:
            at_least('knn.k', self.k, 1)
        above('knn.temperature', self.temperature, 0)
        if self.bank is not None:
            at_least('knn.bank', self.bank, 1)

    def neighbours(self, labels: torch.Tensor) -> int:
        """k for a search among images with these labels."""
        return self.k or default_k(len(labels), len(labels.unique()))


@dataclass(frozen=True)
class ProbeConfig(Incidental):
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
class NumericsConfig:
    """How numbers are computed.

    Args:
        seed: Seed of initialisation, order and views.
        precision: no for float32, bf16 or fp16; that of accelerate where null. A run records the one it trains in.
        channels_last: Memory layout of convolutions in which the channels of a pixel lie together.
        compile: Compile each width, and the momentum encoder, by torch.compile: minutes at the start, for GPUs.
    """

    seed: int = 0
    precision: str | None = None
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        check_precision('run.precision', self.precision)
        check_seed('run.seed', self.seed)


@dataclass(frozen=True)
class TrackerConfig(Incidental):
    """The tracker.

    Args:
        tracker: none, or a tracker of accelerate's: tensorboard, wandb, trackio, ...
        project: Name of the project at the tracker.
    """

    tracker: str = 'none'
    project: str = 'slimclr'

    def __post_init__(self) -> None:
        one_of('run.tracker', self.tracker, TRACKERS)


@dataclass(frozen=True)
class FilesConfig(Incidental):
    """Files and log of a run.

    Args:
        output: Folder of the runs.
        name: Folder of this run within it; one that is free is chosen where null.
        checkpoint_every: Epochs from one checkpoint to the next.
        checkpoint_steps: Optimizer steps from one checkpoint to the next, besides those after epochs; none where null.
        keep_checkpoints: Checkpoints kept; older ones are removed after a newer one is complete.
        log_every: Steps from one line of the log to the next.
    """

    output: str = 'runs'
    name: str | None = None
    checkpoint_every: int = 1
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in 'checkpoint_every', 'keep_checkpoints', 'log_every':
            at_least(f'run.{name}', getattr(self, name), 1)
        if self.checkpoint_steps is not None:
            at_least('run.checkpoint_steps', self.checkpoint_steps, 1)
        if self.name is not None and (self.name in ('', '.', '..') or '/' in self.name):
            raise InputError(f'run.name {self.name!r} is not the name of a folder; run.output says where it lies')


@dataclass(frozen=True)
class RunConfig(NumericsConfig, FilesConfig, TrackerConfig):
    """Numerics, files and tracker of a run; the arguments are those of its bases."""

    def __post_init__(self) -> None:
        NumericsConfig.__post_init__(self)
        FilesConfig.__post_init__(self)
        TrackerConfig.__post_init__(self)


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run.

    Args:
        model: The network.
        method: The method.
        teacher: The teacher of the method, if it has one.
        data: The images.
        views: The augmentations.
        second_views: Those of the second view; the same where null.
        optim: Optimizer and learning rate.
        knn: k-NN accuracy while training.
        probe: Accuracy of a linear classifier while training.
        diagnostics: What is recorded of gradients and weights.
        run: Numerics, files and logs.
        imports: Python files that register a method, a distillation or a network -> sha256; --import FILE adds one.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    second_views: ViewConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    run: RunConfig = field(default_factory=RunConfig)
    imports: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_all(self._problems())

    def _problems(self) -> Iterator[str]:
        batch, microbatches, method = self.data.batch_size, self.optim.accumulation_steps, self.method
        yield from problem(check_loss_weights, 'method.loss_weights', method.loss_weights, self.model.widths)
        teacher = self.teacher.network
        if training_of(method.name).teacher and teacher is None:
            yield f'method.name {method.name} learns from a teacher; give --teacher.network'
        elif teacher is not None and not training_of(method.name).teacher:
            taught = ', '.join(name for name in METHODS if training_of(name).teacher)
            yield (
                f'teacher.network {teacher} is for method.name {taught}, and it is {method.name}; add '
                '--teacher.network null'
            )
        what = 'teacher.cached true' if self.teacher.cached else f'method.name {method.name}'
        if self.data.streams and (self.teacher.cached or method.neighbours):
            yield f'{what} needs images by number, and data.name {self.data.name} is a stream; take a folder or hfds/'
        if method.cross_after is not None and method.cross_after >= self.optim.epochs:
            yield (
                f'method.cross_after {method.cross_after} leaves no epoch of optim.epochs {self.optim.epochs} in which '
                'neighbours are brought together; lower it'
            )
        if batch % microbatches:
            yield (
                f'data.batch_size {batch} does not divide into optim.accumulation_steps {microbatches}; '
                f'give {nearest_multiple(batch, microbatches)}'
            )
        if method.queue_size and method.queue_size % batch:
            yield (
                f'method.queue_size {method.queue_size} is not a multiple of data.batch_size {batch}; '
                f'give {nearest_multiple(method.queue_size, batch)}'
            )
        if method.bn_splits and batch % (microbatches * method.bn_splits):
            yield (
                f'data.batch_size {batch} does not divide into method.bn_splits {method.bn_splits} in each of '
                f'optim.accumulation_steps {microbatches}; '
                f'give {nearest_multiple(batch, microbatches * method.bn_splits)}'
            )
        if self.slow_start > self.optim.epochs:
            yield (
                f'method.slow_start_epochs {self.slow_start:g} exceeds optim.epochs {self.optim.epochs}; '
                'sub-networks would never train. Lower it, or give null for half of the epochs'
            )
        if self.optim.warmup_epochs > self.optim.epochs:
            yield f'optim.warmup_epochs {self.optim.warmup_epochs:g} exceeds optim.epochs {self.optim.epochs}; lower it'
        if self.diagnostics.on:
            yield from problem(self.diagnostics.smallest_of, self.model.widths, self.model.overlap)
        if self.second_views is not None and self.view_count == 1:
            yield f'second_views is given, and method.name {method.name} has one view; set second_views to null'
        elif self.second_views is not None and self.second_views.size not in (None, self.views.size):
            yield f'second_views.size {self.second_views.size} is not views.size {self.views.size}; drop it'

    @property
    def slow_start(self) -> float:
        """S, the epochs that train the full width alone (paper, section 3.2)."""
        if self.method.slow_start_epochs is None:
            return self.optim.epochs / 2
        return self.method.slow_start_epochs

    @property
    def view_count(self) -> int:
        """Views of each image that the method asks for."""
        training = training_of(self.method.name)
        if self.teacher.cached and training.views_cached is not None:
            return training.views_cached
        return training.views

    def is_due(self, epoch: int, every: int) -> bool:
        """True every `every` epochs and after the last; `every=0` disables it."""
        return every > 0 and (epoch % every == 0 or epoch == self.optim.epochs)


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of `of` nearest to `value`, at least one."""
    return max(round(value / of), 1) * of
