"""The configuration of a linear evaluation: frozen dataclasses that check their values."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from slimclr_hub.data import ViewConfig
from slimclr_hub.data.config import LabelledDataConfig
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.baselines import is_small
from slimclr_hub.evaluate.network import data_defaults, drawn_anew
from slimclr_hub.runs.command_line import config_of, make_parser, parse
from slimclr_hub.runs.result import RAW_PIXELS, Protocol, data_name
from slimclr_hub.settings import Incidental, above, at_least, check_fraction, check_precision, check_seed, one_of

BATCH_SIZE = 256
HEADS = ('switchable', 'slimmable')
SCHEDULES = ('cosine', 'step')


@dataclass(frozen=True)
class LinearProbeConfig:
    """The linear probe.

    Args:
        head: `switchable`, a linear layer for each width (the paper's), or `slimmable`, one layer that all widths share
            (the ablation of its Table 3a).
        distillation: Train narrower widths on the labels and the outputs of the full width, half each, as in the paper;
            on the labels alone without.
        num_classes: Number of classes; that of the data set where null.
    """

    head: str = 'switchable'
    distillation: bool = True
    num_classes: int | None = None

    def __post_init__(self) -> None:
        one_of('probe.head', self.head, HEADS)
        if self.num_classes is not None:
            at_least('probe.num_classes', self.num_classes, 2)


@dataclass(frozen=True)
class SweepConfig:
    """Stochastic gradient descent with momentum, at one learning rate or at several side by side.

    Args:
        lr: Learning rate, or several. Each has a probe of its own, and all are trained in one pass over the images; the
            one with the highest mean top-1 accuracy over the widths on the validation split is kept.
        schedule: `cosine`, to zero, or `step`, to a tenth at each milestone.
        milestones: Epochs after which `step` divides the learning rate by ten; 60 % and 80 % of all where null.
        momentum: Momentum.
        weight_decay: Weight decay.
        epochs: Number of epochs.
    """

    lr: float | tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    schedule: str = 'cosine'
    milestones: tuple[float, ...] | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 50

    def __post_init__(self) -> None:
        if not self.rates:
            raise InputError('optim.lr is empty; give one learning rate or several, such as [0.1, 1.0]')
        for rate in self.rates:
            above('optim.lr', rate, 0)
        if len(set(self.rates)) < len(self.rates):
            raise InputError(f'optim.lr {list(self.rates)} names a learning rate twice; give each once')
        one_of('optim.schedule', self.schedule, SCHEDULES)
        check_fraction('optim.momentum', self.momentum)
        at_least('optim.weight_decay', self.weight_decay, 0)
        at_least('optim.epochs', self.epochs, 1)
        if self.milestones is not None and self.schedule != 'step':
            raise InputError(f'optim.milestones are for optim.schedule step, and it is {self.schedule}; drop them')
        for milestone in self.milestones or ():
            if not 0 < milestone < self.epochs:
                raise InputError(f'optim.milestones: {milestone:g} is not between 0 and optim.epochs {self.epochs}')

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    @property
    def milestone_epochs(self) -> tuple[float, ...]:
        """The milestones, with their default."""
        return (0.6 * self.epochs, 0.8 * self.epochs) if self.milestones is None else self.milestones


@dataclass(frozen=True)
class CacheConfig(Incidental):
    """Features on disk.

    Args:
        cache: Folder of cached features; beside the results where null.
    """

    cache: str | None = None


@dataclass(frozen=True)
class FeaturesConfig(CacheConfig):
    """Inputs of the probe.

    Args:
        mode: `augmented`, features of new random crops in each epoch (the paper's), or `cached`, features of centre
            crops that are computed once, at all widths, and kept on disk. These are two protocols, whose accuracies
            differ.
        standardise: Divide features by their standard deviation over the training images, and with the switchable head
            subtract their mean, so that learning rates mean the same for all networks. The saved layers include it and
            take features as the network gives them. Needs `cached`, for which it is the default.
        train_images: Number of training images that `cached` uses, a fixed random choice, where there are more; all
            where null.
    """

    mode: str = 'cached'
    standardise: bool | None = None
    train_images: int | None = None

    def __post_init__(self) -> None:
        one_of('features.mode', self.mode, ('cached', 'augmented'))
        if self.train_images is not None:
            at_least('features.train_images', self.train_images, 2)
            if self.mode != 'cached':
                raise InputError(
                    f'features.train_images is for features.mode cached, and it is {self.mode}; set it to null'
                )
        if self.standardise and self.mode != 'cached':
            raise InputError(f'features.standardise needs features.mode cached, and it is {self.mode}; set it to null')

    @property
    def standardised(self) -> bool:
        """True if features are standardised."""
        return self.mode == 'cached' if self.standardise is None else self.standardise


@dataclass(frozen=True)
class LinearOutputConfig(Incidental):
    """Folder of the results.

    Args:
        output: Folder of the results; `linear_eval` in the folder of the network where null, or `linear_eval-2` and so
            on where that has the results of other settings.
    """

    output: str | None = None


@dataclass(frozen=True)
class LinearRunConfig(LinearOutputConfig):
    """Seed, precision and output.

    Args:
        seed: Seed of initialisation, order and views.
        precision: Of the frozen network: no for float32, bf16 or fp16; what accelerate was told where null. The probe
            is always in float32.
        channels_last: Memory layout of convolutions in which the channels of a pixel lie together.
    """

    seed: int = 0
    precision: str | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_precision('run.precision', self.precision)
        check_seed('run.seed', self.seed)


@dataclass(frozen=True)
class LinearNetworkConfig(Incidental):
    """The network; a hash of its weights says whether it is the same one.

    Args:
        network: The network under test: the folder of a run, a tag such as slimclr_resnet50.mocov2_200e_in1k,
            hf-hub:USER/NAME, or a file; `raw pixels` for what the images themselves reach, and `random weights of
            NETWORK` for what a network does before training.
        save_to: Folder to write the network to with the probe as its head, for `slimclr-hub predict` and timm.
        baselines: Evaluate the network's random weights and raw pixels in the same way, too, of images of at most 64
            pixels a side; `compare` shows them.
        seeds: Repetitions, with seeds from run.seed on; their mean and spread are told at the end.
    """

    network: str = ''
    save_to: str | None = None
    baselines: bool = False
    seeds: int = 1


@dataclass(frozen=True)
class LinearEvalConfig(LinearNetworkConfig):
    """A linear evaluation.

    Args:
        data: The images; those that a run was trained on, and ImageNet for other networks, unless given. A batch of 256
            becomes one of all training images where there are fewer.
        views: Augmentation for features.mode augmented; random crops and flips unless given.
        probe: The linear probe.
        optim: Optimizer and learning rates.
        features: Inputs of the probe.
        run: Seed, precision and output.
    """

    data: LabelledDataConfig = field(default_factory=lambda: LabelledDataConfig(batch_size=BATCH_SIZE))
    views: ViewConfig = field(
        default_factory=lambda: ViewConfig(crop_min=0.08, jitter_prob=0, gray_prob=0, blur_prob=0)
    )
    probe: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    optim: SweepConfig = field(default_factory=SweepConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    run: LinearRunConfig = field(default_factory=LinearRunConfig)

    def __post_init__(self) -> None:
        if not self.network:
            raise InputError('no network to test; give --network with the folder of a run, or a tag')
        at_least('seeds', self.seeds, 1)
        if self.baselines and (self.network == RAW_PIXELS or drawn_anew(self.network)):
            raise InputError(f'baselines of {self.network}, which are one; leave it out')
        if self.baselines and not is_small(self.data):
            raise InputError(f'baselines of images of {self.data.size} pixels say little and cost much; leave it out')
        if self.seeds > 1 and self.save_to is not None:
            raise InputError(f'save_to {self.save_to} is for one network, and seeds is {self.seeds}; leave one out')

    @property
    def protocol(self) -> Protocol:
        """The protocol of its accuracies."""
        return Protocol(
            'linear',
            data_name(asdict(self.data)),
            self.features.train_images,
            head=self.probe.head,
            features=self.features.mode,  # type: ignore[arg-type]
            distillation=self.probe.distillation,
            standardised=self.features.standardised,
            epochs=self.optim.epochs,
            choice=self.data.choice,
        )


def parse_linear_eval(argv: Sequence[str] | None = None) -> LinearEvalConfig:
    """Read the command line; raises an InputError if a key or value is wrong, or a file is not there."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(
        LinearEvalConfig,
        'linear_eval.py',
        '--network NETWORK [--config FILE] [--save_to FOLDER]',
        'Train linear classifiers on a frozen network, at all of its widths.',
    )
    parser.set_defaults({**data_defaults(argv), 'data.batch_size': BATCH_SIZE})
    return config_of(LinearEvalConfig, parse(parser, argv))
