"""Conversion of a checkpoint of another kind into a folder or file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm

from slimclr_hub.errors import InputError
from slimclr_hub.hub.card import converted_card, published_card
from slimclr_hub.hub.folder import check_overlap, write_folder
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.convert import convert
from slimclr_hub.models.cost import width_facts
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.layouts import Layout, layout_of
from slimclr_hub.weights.published import PUBLISHED
from slimclr_hub.weights.tensor_file import save_tensors

_FILES = ('config.json', 'model.safetensors', 'README.md')
_SUFFIXES = ('.pth', '.pt', '.tar', '.bin', '.ckpt', '.npz', '.safetensors')


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Args:
        path: The folder or file.
        layout: The network in it.
        calibrated: True if the normalisation of every width has seen images; false for a plain network, as a starting
            point for slimmable training.
        tag: Tag of the published network, if the source has the name of the authors' file.
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
    """Check before any work that a file may be written.

    Raises:
        InputError: It exists already, or is a folder.
    """
    if path.is_dir():
        raise InputError(f'{path} is a folder; give the name of a file')
    if path.exists() and not overwrite:
        raise InputError(f'{path} is there already; choose another name or add --overwrite')


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check before any work that a network may be written to a folder, which may hold other files.

    Raises:
        InputError: A network or a card exists already, or the name is that of a file.
    """
    if folder.is_file() or folder.suffix in _SUFFIXES:
        raise InputError(f'{folder} is the name of a file; give a folder')
    for name in _FILES:
        check_file(folder / name, overwrite)
