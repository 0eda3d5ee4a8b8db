"""A network as a folder that timm opens: configuration, weights and card; conversion of others' checkpoints to one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import atomic_files, encoded
from slimclr_hub.hub.card import converted_card, published_card
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.convert import convert
from slimclr_hub.models.cost import width_facts
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import Layout, layout_of
from slimclr_hub.weights.published import PUBLISHED
from slimclr_hub.weights.slices import with_batch_counts
from slimclr_hub.weights.tensor_file import save_tensors

OF_A_TAG = ('tag', 'description', 'origin_url', 'notes', 'license')
"""Entries of a published network's configuration that no other network's may have."""

WIDTH = 'slimclr_width'
"""Entry of config.json: the width that a folder of timm's own ResNet was extracted at."""

_FILES = ('config.json', 'model.safetensors', 'README.md')
_SUFFIXES = ('.pth', '.pt', '.tar', '.bin', '.ckpt', '.npz', '.safetensors')


def check_overlap(overlap: bool, name: object) -> None:
    """Raise InputError for a network built with `overlap=False`; it trains, and its run's folder can be evaluated."""
    if not overlap:
        raise InputError(
            f'{name}: the widths of this network do not overlap (overlap=False), which is an ablation: it is trained '
            'and evaluated in its folder, but not converted, extracted, exported or published'
        )


def save_folder(
    model: SlimmableResNet,
    folder: Path,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float,
    card: str,
    label_names: Sequence[str] | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and `README.md`, each atomically.

    `timm.create_model('local-dir:FOLDER', pretrained=True, width=0.5)` opens the folder; without `width` it opens at
    the width that is active now.

    Args:
        model: A network from timm's factory.
        folder: Where to write; made if it does not exist.
        size: Height and width of the images in pixels.
        mean: Mean of each channel for normalising images.
        std: Standard deviation likewise.
        crop_pct: Fraction of the image that evaluation crops.
        card: Text of the model card.
        label_names: Names of the classes in their order, if known.
    """
    if isinstance(model, LazySlimmableResNet):
        model.hold()
    model_args: dict[str, object] = {'widths': model.widths, 'head': model.head}
    if model.width != model.widths[0]:  # the default, which also suits whoever asks for other widths
        model_args['width'] = model.width
    if not model.overlap:
        model_args['overlap'] = False
    data_config = {'input_size': (model.in_chans, size, size), 'mean': mean, 'std': std, 'crop_pct': crop_pct}
    tensors = with_batch_counts(model.state_dict())
    write_folder(model, tensors, folder, card, model_args=model_args, data_config=data_config, label_names=label_names)


def write_folder(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    card: str,
    *,
    model_args: Mapping[str, object] | None = None,
    data_config: Mapping[str, object] | None = None,
    label_names: Sequence[str] | None = None,
    tagged: bool = False,
    width: float | None = None,
) -> None:
    """Write the three files of a network, each atomically; other arguments are those of `save_folder`.

    Args:
        model: The network that the configuration describes; its tensors are not used.
        tensors: Its state dict.
        model_args: Arguments of the model that timm has not recorded itself.
        data_config: `input_size`, `mean`, `std` and `crop_pct`, as in timm; timm's own unless given.
        tagged: True if these are the weights of the tag that the network was built with.
        width: The width that a network of timm's own was extracted at.
    """
    with atomic_files(folder) as partial:
        save_config_for_hf(
            model,
            str(partial / 'config.json'),
            model_config={'label_names': list(label_names)} if label_names else None,
            model_args={**(model_args or {})},
            data_config={**(data_config or {})},
        )
        config = json.loads((partial / 'config.json').read_text(encoding='utf-8'))
        save_tensors(tensors, partial / 'model.safetensors')
        # It is at the top level already; transformers passes both, and a repeated keyword is an error there.
        config['model_args'].pop('num_classes', None)
        for key in {'lazy', 'width', 'overlap'} - (model_args or {}).keys():
            config['model_args'].pop(key, None)  # arguments of how it was opened, or defaults
        if not tagged:
            for key in OF_A_TAG:
                config['pretrained_cfg'].pop(key, None)
        if width is not None:
            config[WIDTH] = width
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        (partial / 'README.md').write_bytes(encoded(card))


# Conversion


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: a folder or file, and the network in it.

    `calibrated` is true if the normalisation of every width has seen images, and false for a plain network, as a
    starting point for slimmable training. `tag` is that of the published network, if the source has the name of the
    authors' file.
    """

    path: Path
    layout: Layout
    calibrated: bool
    tag: str | None


def convert_file(
    source: Path,
    target: Path,
    *,
    encoder: str = 'online',
    widths: Sequence[float] = DEFAULT_WIDTHS,
    overwrite: bool = False,
) -> Converted:
    """Convert a checkpoint into a folder that timm opens, or into a safetensors file.

    Args:
        source: A checkpoint of a kind that `models.convert.convert` takes.
        target: A name in `.safetensors`, or else a folder.
        encoder: `online` or `momentum`, of a pre-training checkpoint.
        widths: Widths to give to a plain network.
        overwrite: True to replace existing files.

    Raises:
        InputError: The source cannot be read, is of no known kind or has widths that do not overlap, or the target
            exists already.
    """
    to_file = target.suffix == '.safetensors'
    (check_file if to_file else check_folder)(target, overwrite)
    try:
        tensors = convert(read_checkpoint(source), encoder, widths)
    except InputError as error:
        raise InputError(f'{source}: {error}' if str(source) not in str(error) else str(error)) from error
    layout = layout_of({name: tensor.shape for name, tensor in tensors.items()})
    assert layout.architecture is not None  # or converting had failed
    check_overlap(layout.overlap, source)
    calibrated = all(int(tensor) > 0 for name, tensor in tensors.items() if name.endswith('num_batches_tracked'))
    published = next((p for p in PUBLISHED.values() if p.file == source.name and encoder == 'online'), None)
    converted = Converted(target, layout, calibrated, published.tag if published else None)
    if to_file:
        save_tensors(tensors, target)
        return converted
    model = timm.create_model(
        published.name if published else layout.architecture,
        widths=layout.widths,
        num_classes=layout.num_classes,
        in_chans=layout.in_chans,
        device='meta',
    )
    assert isinstance(model, SlimmableResNet)
    if published:
        card = published_card(published)
    else:
        size = model.pretrained_cfg['input_size'][-1]
        facts = width_facts(model, size)
        card = converted_card(facts, layout.architecture, source.name, str(target), size, calibrated)
    model_args = {'widths': layout.widths, 'head': layout.head if layout.num_classes else 'switchable'}
    write_folder(model, tensors, target, card, model_args=model_args, tagged=published is not None)
    return converted


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError, before any work, if the file must not be overwritten or is a folder."""
    if path.is_dir():
        raise InputError(f'{path} is a folder; give the name of a file')
    if path.exists() and not overwrite:
        raise InputError(f'{path} is there already; choose another name or add --overwrite')


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise InputError, before any work, if it is a file, or a network or card in it must not be overwritten."""
    if folder.is_file() or folder.suffix in _SUFFIXES:
        raise InputError(f'{folder} is the name of a file; give a folder')
    for name in _FILES:
        check_file(folder / name, overwrite)
