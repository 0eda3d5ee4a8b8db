"""The configuration of a fine-tuning: frozen dataclasses that check their values."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimclr_hub.data.augment import AugmentConfig
from slimclr_hub.data.config import LabelledDataConfig
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.network import data_defaults
from slimclr_hub.methods.losses import DISTILLATIONS
from slimclr_hub.models.widths import check_widths
from slimclr_hub.runs.command_line import config_of, early, make_parser, parse
from slimclr_hub.runs.result import Protocol, data_name
from slimclr_hub.settings import Incidental, above, at_least, at_most, check_all, check_fraction, one_of, problem
from slimclr_hub.train.config import NumericsConfig, OptimizerConfig, TrackerConfig

BATCH_SIZE = 64
_MOST_FROZEN = 5  # the stem and four stages


@dataclass(frozen=True)
class StartConfig:
    """How the network starts, and what of it trains.

    Args:
        widths: Widths to train, all at once; those of the network where null. One of them alone is that dense network.
        num_classes: Number of classes; that of the data set where null.
        fit_head: Begin with a classifier that is fitted to features of training images, by logistic regression at each
            width (Kumar et al. 2022); else with a random one, as where a width has no statistics of normalisation.
        distillation: How narrower widths learn from the full one's outputs besides the labels, half each: kd, mse, dkd,
            atkd; none for the labels alone.
        frozen: Leading parts that stay as they are: 1 for the stem, 2 for the first stage, too, and so on.
        frozen_norm: Normalise by the running statistics of pre-training, which stay as they are.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0 at the first.
    """

    widths: tuple[float, ...] | None = None
    num_classes: int | None = None
    fit_head: bool = True
    distillation: str = 'none'
    frozen: int = 0
    frozen_norm: bool = False
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.widths is not None:
            check_widths(self.widths)
        if self.num_classes is not None:
            at_least('model.num_classes', self.num_classes, 2)
        one_of('model.distillation', self.distillation, DISTILLATIONS)
        at_least('model.frozen', self.frozen, 0)
        at_most('model.frozen', self.frozen, _MOST_FROZEN)
        check_fraction('model.drop_path_rate', self.drop_path_rate)


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimizerConfig):
    """Optimizer and learning rate; other arguments are `OptimizerConfig`'s.

    Args:
        layer_decay: Learning rates fall by this factor from each layer to the one before it, by timm's groups; the same
            for all where null.
        clip_grad: Largest norm of all gradients together; none where null.
        ema: Decay of a moving average of the weights (timm's ModelEmaV3), which is then what is evaluated and saved;
            none where null.
    """

    name: str = 'adamw'
    lr: float = 2e-3
    weight_decay: float = 0.05
    filter_bias_and_bn: bool = True
    epochs: int = 30
    warmup_epochs: float = 1.0
    layer_decay: float | None = None
    clip_grad: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise InputError(f'optim.layer_decay is {self.layer_decay}; give a factor in (0, 1]')
        if self.clip_grad is not None:
            above('optim.clip_grad', self.clip_grad, 0)
        if self.ema is not None:
            check_fraction('optim.ema', self.ema)
        if self.warmup_epochs > self.epochs:
            raise InputError(f'optim.warmup_epochs {self.warmup_epochs:g} exceeds optim.epochs {self.epochs}; lower it')


@dataclass(frozen=True)
class FinetuneFilesConfig(Incidental):
    """Files and log.

    Args:
        output: Folder of the result; `finetune` in the folder of the network where null, or `finetune-2` and so on
            where that has the results of other settings.
        checkpoint_steps: Optimizer steps from one checkpoint to the next, besides those after epochs, at most one a
            minute; none where null.
        log_every: Steps from one line of the log to the next.
    """

    output: str | None = None
    checkpoint_steps: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        at_least('run.log_every', self.log_every, 1)
        if self.checkpoint_steps is not None:
            at_least('run.checkpoint_steps', self.checkpoint_steps, 1)


@dataclass(frozen=True)
class FinetuneRunConfig(NumericsConfig, FinetuneFilesConfig, TrackerConfig):
    """Numerics, files and tracker; the arguments are those of its bases."""

    def __post_init__(self) -> None:
        NumericsConfig.__post_init__(self)
        FinetuneFilesConfig.__post_init__(self)
        TrackerConfig.__post_init__(self)


@dataclass(frozen=True)
class FinetuneNetworkConfig(Incidental):
    """The network to start from, of which a hash of the weights says whether it is the same one, and repetitions.

    Args:
        network: Folder of a run or a network, a tag such as slimclr_resnet50.mocov2_200e_in1k, hf-hub:USER/NAME, a
            file, or a plain ResNet by its name in timm; `random weights of NETWORK` for a start without pre-training.
        seeds: Repetitions, with seeds from run.seed on; their mean and spread are told at the end.
    """

    network: str = ''
    seeds: int = 1


@dataclass(frozen=True)
class FinetuneConfig(FinetuneNetworkConfig):
    """A fine-tuning.

    Args:
        data: The images; a folder where only data.root is given.
        augment: Augmentation.
        model: How the network starts, and what of it trains.
        optim: Optimizer and learning rate.
        run: Numerics, files and tracker.
    """

    data: LabelledDataConfig = field(default_factory=lambda: LabelledDataConfig(batch_size=BATCH_SIZE))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: StartConfig = field(default_factory=StartConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)

    def __post_init__(self) -> None:
        check_all(self._problems())

    def _problems(self) -> Iterator[str]:
        if not self.network:
            yield 'no network to start from; give --network with a folder, or a tag'
        yield from problem(at_least, 'seeds', self.seeds, 1)
        if self.data.batch_size % self.optim.accumulation_steps:
            yield (
                f'data.batch_size {self.data.batch_size} does not divide into optim.accumulation_steps '
                f'{self.optim.accumulation_steps}; lower one'
            )
        if self.data.val_split is None:
            yield 'data.val_split is null, and the fine-tuned network is to be evaluated; give a split'

    @property
    def protocol(self) -> Protocol:
        """The protocol of its accuracies."""
        return Protocol('classifier', data_name(asdict(self.data)), epochs=self.optim.epochs, choice=self.data.choice)


def parse_finetune(argv: Sequence[str] | None = None) -> FinetuneConfig:
    """Read the command line; raises an InputError if a key or value is wrong, or a file is not there."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(
        FinetuneConfig,
        'finetune.py',
        '--network NETWORK [--config FILE]',
        'Fine-tune a network on images with classes, at all of its widths at once.',
    )
    defaults: dict[str, Any] = {**data_defaults(argv), 'data.batch_size': BATCH_SIZE}
    if early(argv, '--data.root') is not None and early(argv, '--data.name') is None:
        defaults['data.name'] = 'folder'  # photos of one's own, whatever the network was trained on
    parser.set_defaults(defaults)
    return config_of(FinetuneConfig, parse(parser, argv))
