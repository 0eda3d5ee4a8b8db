"""The network that an evaluation judges: the result of a run, a published one, or any that `open_network` opens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from timm.models import parse_model_name

from slimclr_hub.data import DataConfig
from slimclr_hub.data.sources import has_validation
from slimclr_hub.errors import InputError
from slimclr_hub.hub.opening import open_network
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import early
from slimclr_hub.settings import RECIPE
from slimclr_hub.weights.published import PUBLISHED, Published

_OF_TRAINING = ('batch_size', 'num_samples', 'max_corrupt', 'shuffle_buffer')  # nothing to evaluation
_IMAGENET = DataConfig(
    name='folder',
    root='data/imagenet',
    size=224,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
)


@dataclass(frozen=True)
class Subject:
    """A network to be judged.

    Args:
        name: As it was asked for.
        model: The network with the weights and the head that it has, in eval mode.
        published: The facts of it, where it is one of the published.
    """

    name: str
    model: SlimmableResNet
    published: Published | None


def open_subject(network: str) -> Subject:
    """Open a network to be judged.

    Args:
        network: The folder of a run, or what `open_network` takes.

    Raises:
        InputError: There is no such network, or a run has no result yet.
    """
    folder = Path(network)
    if (folder / RECIPE).is_file() and not (folder / 'config.json').is_file():
        raise InputError(f'{network} is a run without a result yet; finish it: --resume {network}')
    model = open_network(network).eval()
    _, name = parse_model_name(network) if not folder.exists() else ('', '')
    published = PUBLISHED.get(name.partition('.')[2]) if '/' not in name else None
    return Subject(network, model, published)


def check_images(data: DataConfig) -> None:
    """Find out, before a network is fetched for it, whether there are images to judge one on.

    Raises:
        InputError: Their folder is not there, or none of them are apart from those to learn from.
    """
    if data.name == 'folder' and data.root is not None and not Path(data.root).exists():
        raise InputError(
            f'data.root {data.root} does not exist; give the folder of the images by --data.root, or other images by '
            '--data.name'
        )
    if not has_validation(data):
        raise InputError(f'data.val_split {data.val_split} is not apart from the training images; give another')


def check_channels(subject: Subject, data: DataConfig) -> None:
    """Find out whether a network takes such images.

    Raises:
        InputError: It takes images of another number of channels.
    """
    if (channels := subject.model.in_chans) != data.channels:
        raise InputError(
            f'{subject.name} takes images of {channels} channels, and data.channels is {data.channels}; give '
            f'--data.channels {channels}, with data.mean and data.std to fit'
        )


def default_output(network: str, kind: str) -> Path:
    """Where the results of an evaluation of `network` lie: in its own folder if it has one, else beside the runs."""
    folder = Path(network.removeprefix('local-dir:'))
    if folder.is_dir():
        return folder / kind
    return Path('runs') / network.removeprefix('hf-hub:').replace('/', '--') / kind


def data_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """`data.key` -> value for the network that a command line names: its run's own images, else ImageNet.

    Args:
        argv: Arguments, of which `--network`, or `network` in the recipe of `--config`, says which it is.

    Raises:
        InputError: The network is a run whose recipe cannot be read.
    """
    network = early(argv, '--network') or _in_recipe(early(argv, '--config'))
    recipe = Path(network.removeprefix('local-dir:')) / RECIPE if network else None
    data = _recorded_data(recipe) if recipe is not None and recipe.is_file() else _IMAGENET
    return {f'data.{key}': value for key, value in asdict(data).items() if key not in _OF_TRAINING}


def _recorded_data(recipe: Path) -> DataConfig:
    try:
        section = yaml.safe_load(recipe.read_text())['data']
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in section.items()
            if key in DataConfig.__dataclass_fields__
        }
        return DataConfig(**known)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f'{recipe} does not say which images the run was trained on ({error!r})') from error


def _in_recipe(config: str | None) -> str | None:
    try:
        content = yaml.safe_load(Path(config).read_text()) if config else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the parser says it better
    return content.get('network') if isinstance(content, dict) else None
