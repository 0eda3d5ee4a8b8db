"""A network as a folder that timm opens: config.json, model.safetensors and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import atomic_files
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.weights.tensor_file import save_tensors

OF_A_TAG = ('tag', 'description', 'origin_url', 'notes', 'license')
"""Entries of a published network's configuration that no other network's may have."""

WIDTH = 'slimclr_width'
"""Entry of config.json: the width that a folder of timm's own ResNet was extracted at."""


def check_overlap(overlap: bool, name: object) -> None:
    """Refuse a network that was built with `overlap=False`; it trains, and its run's folder can be evaluated.

    Raises:
        InputError: `overlap` is false.
    """
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
    tensors = model.state_dict()
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
    """Write the three files of a network, each atomically; see `save_folder`.

    Args:
        model: The network that the configuration describes; its tensors are not used.
        tensors: Its state dict.
        folder: Where to write.
        model_args: Arguments of the model that timm has not recorded itself.
        data_config: `input_size`, `mean`, `std` and `crop_pct`, as in timm; timm's own unless given.
        card: Text of the model card.
        label_names: Names of the classes.
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
        config = json.loads((partial / 'config.json').read_text())
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
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        (partial / 'README.md').write_text(card)
