"""The network under test, and the images to test it on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import timm

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.baselines import Encoder, RawPixels, random_weights
from slimclr_hub.hub.open import open_network, read_config
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import early
from slimclr_hub.runs.result import RANDOM_WEIGHTS, RAW_PIXELS
from slimclr_hub.settings import RECIPE, read_yaml, relevant
from slimclr_hub.weights.published import PUBLISHED, SHIPPED, Published, Shipped

_Known = TypeVar('_Known', Published, Shipped)

_TRAINING_ALONE = ('batch_size', 'num_samples', 'max_corrupt', 'shuffle_buffer')
_IMAGENET = DataConfig(
    name='folder',
    root='data/imagenet',
    size=224,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
)


def open_for_test(network: str) -> SlimmableResNet:
    """Open a run or what `open_network` takes in eval mode, with the head that it has.

    Raises:
        InputError: There is no such network, or a run has no result yet.
    """
    check_network(network)
    return open_network(network).eval()


def open_encoder(network: str, data: DataConfig, seed: int) -> Encoder:
    """Open what classifiers are trained on: a network in eval mode, `raw pixels`, or `random weights of NETWORK`.

    Weights are drawn by the seed, and normalise by training images.

    Raises:
        InputError: There is no such network, or it takes images of another number of channels.
    """
    if network == RAW_PIXELS:
        return RawPixels(data.channels * data.size**2)
    like = drawn_anew(network)
    model = open_for_test(like or network)
    check_channels(network, model, data)
    if like is None:
        return model
    images = (batch for batch, _ in eval_loader(data, data.train_split, None, seed).readable())
    return random_weights(model, images, seed)


def check_network(network: str) -> None:
    """Raise an InputError if a name cannot be that of a network, or is a run without a result; fetch nothing."""
    folder = folder_of(network)
    if (folder / RECIPE).is_file() and not (folder / 'config.json').is_file():
        raise InputError(f'{network} is a run without a result yet; finish it: --resume {network}')
    source, _, name = network.rpartition(':')
    tag = not source and name.startswith('slimclr_') and timm.is_model(name.partition('.')[0])
    if not (folder.exists() or tag or source == 'hf-hub'):
        raise InputError(
            f'there is no network {network!r}; give a folder, a .safetensors file, hf-hub:USER/NAME, or a tag such as '
            'slimclr_resnet50.mocov2_200e_in1k'
        )


def drawn_anew(network: str) -> str | None:
    """The NETWORK of `random weights of NETWORK`, None of other names."""
    prefix = f'{RANDOM_WEIGHTS} of '
    return network.removeprefix(prefix) if network.startswith(prefix) else None


def published_network(network: str) -> Published | None:
    """Facts of a published network that is asked for by its name, else None."""
    return _named(network, PUBLISHED)


def shipped_network(network: str | None) -> Shipped | None:
    """Facts of a network of the package that is asked for by its name, else None."""
    return None if network is None else _named(network, SHIPPED)


def _named(network: str, known: Mapping[str, _Known]) -> _Known | None:
    if Path(network).exists():
        return None
    return next((each for each in known.values() if each.name == network), None)


def check_images(data: DataConfig) -> None:
    """Raise an InputError if there is no folder of images, or none of them are apart from the training images."""
    if data.name == 'folder' and data.root is not None and not Path(data.root).exists():
        raise InputError(
            f'data.root {data.root} does not exist; give the folder of the images by --data.root, or other images by '
            '--data.name'
        )
    if not has_validation(data):
        raise InputError(f'data.val_split {data.val_split} is not apart from the training images; give another')


def check_channels(network: str, model: SlimmableResNet, data: DataConfig) -> None:
    """Raise an InputError if a network takes images of another number of channels."""
    if model.in_chans != data.channels:
        raise InputError(
            f'{network} takes images of {model.in_chans} channels, and data.channels is {data.channels}; give '
            f'--data.channels {model.in_chans}, with data.mean and data.std to fit'
        )


def folder_of(network: str) -> Path:
    """Path of a network, be there a folder or not."""
    return Path(network.removeprefix('local-dir:'))


def default_output(network: str, kind: str) -> Path:
    """Folder for the results of an evaluation: in the network's own folder if it has one, else among the runs."""
    folder = folder_of(network)
    if folder.is_dir():
        return folder / kind
    return Path('runs') / network.removeprefix('hf-hub:').replace('/', '--') / kind


def data_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Default images for the network that a command line names, as `data.key` -> value.

    They are those that a run was trained on, for a network of the package those that the package has, and ImageNet for
    others, in the look that the folder of a network tells. `--network`, or `network` in the recipe of `--config`, names
    the network.

    Raises:
        InputError: The network is a run whose recipe cannot be read.
    """
    network = early(argv, '--network') or _network_in_recipe(early(argv, '--config'))
    network = network and (drawn_anew(network) or network)
    recipe = folder_of(network) / RECIPE if network else None
    shipped = shipped_network(network)
    if recipe is not None and recipe.is_file():
        data = _recorded_data(recipe)
    elif shipped is not None:
        data = _images_of(shipped)
    elif network == RAW_PIXELS:
        data = DataConfig()
    else:
        data = _IMAGENET if network is None else _in_look(_IMAGENET, folder_of(network) / 'config.json')
    return {f'data.{key}': value for key, value in asdict(data).items() if key not in _TRAINING_ALONE}


def changes(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """List settings that differ from recorded ones, as `key old, not new`; those that were not recorded do not.

    Where the hash of the weights is recorded it decides, whatever the network is called by now.
    """
    if recorded.get('weights', settings['weights']) != settings['weights']:
        return ['other weights']
    ignored = {'network'} if 'weights' in recorded else set()
    return [
        f'{key} {recorded[key]}, not {value}'
        for key, value in settings.items()
        if key in recorded and key not in ignored and recorded[key] != value
    ]


def check_same(file: Path, recorded: Mapping[str, Any], config: Any, weights: str) -> None:
    """Check that a result that is there already may be replaced by one of `config`, whose images are its `data`.

    Args:
        file: The result.
        recorded: Its settings.
        config: The evaluation that would write it.
        weights: Hash of the network's weights.

    Raises:
        InputError: It is by other settings, and would be lost.
    """
    settings = {key: value for key, value in relevant(config).items() if not key.startswith(('data.', 'output'))}
    settings |= {**relevant({'data': config.data.fingerprint()}), 'weights': weights}
    if changed := changes(relevant(recorded), settings):
        raise InputError(
            f'{file} is there already, by other settings ({"; ".join(changed)}); give another folder, such as '
            f'--output {file.parent}-2, or remove it'
        )


def _images_of(shipped: Shipped) -> DataConfig:
    # Those of the package, as it shall work without any other file.
    return DataConfig(size=shipped.size, channels=3, mean=(shipped.mean,) * 3, std=(shipped.std,) * 3)


def _in_look(data: DataConfig, config: Path) -> DataConfig:
    """The images in the size and normalisation that a network's `config.json` names, where there is one."""
    if not config.is_file():
        return data
    content = read_config(config, config.parent)
    cfg = content.get('pretrained_cfg', content)
    known: dict[str, Any] = {key: tuple(cfg[key]) for key in ('mean', 'std') if cfg.get(key)}
    if size := cfg.get('input_size'):
        known |= {'channels': size[0], 'size': size[1]}
    if cfg.get('crop_pct'):
        known['crop_pct'] = cfg['crop_pct']
    try:
        return replace(data, **known)
    except InputError as error:
        raise InputError(f'{config}: {error}') from error


def _recorded_data(recipe: Path) -> DataConfig:
    try:
        section = read_yaml(recipe)['data']
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in section.items()
            if key in DataConfig.__dataclass_fields__
        }
        return DataConfig(**known)
    except (AttributeError, LookupError, TypeError, OverflowError) as error:
        raise InputError(f'{recipe} does not say which images the run was trained on ({error!r})') from error


def _network_in_recipe(config: str | None) -> str | None:
    try:
        content = read_yaml(Path(config)) if config else None
    except InputError:
        return None  # the parser reports it
    return content.get('network') if isinstance(content, dict) else None
