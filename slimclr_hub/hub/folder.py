"""A network as a folder that timm opens: config.json, model.safetensors and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from slimclr_hub.files import written_whole
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.weights.tensor_file import save_tensors

# What a published network's configuration says of its origin, which no other network's may.
OF_A_TAG = ('tag', 'description', 'origin_url', 'notes', 'license')


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
    """Write `config.json`, `model.safetensors` and `README.md`, each whole or not at all.

    `timm.create_model('local-dir:FOLDER', pretrained=True, width=0.5)` opens the folder; without `width` it opens at
    the width that is active now.

    Args:
        model: A network from timm's factory.
        folder: Where to write; made if it is not there.
        size: Height and width of the images in pixels.
        mean: Mean of each channel that images are normalised by.
        std: Standard deviation of each channel that images are normalised by.
        crop_pct: Share of the image that evaluation crops.
        card: Text of the model card.
        label_names: Names of the classes in their order, where they are known.
    """
    if isinstance(model, LazySlimmableResNet):
        model.hold()
    model_args: dict[str, object] = {'widths': model.widths, 'head': model.head}
    if model.width != model.widths[0]:  # the default, which also suits whoever asks for other widths
        model_args['width'] = model.width
    if not model.overlap:
        model_args['overlap'] = False
    data_config = {'input_size': (model.in_chans, size, size), 'mean': mean, 'std': std, 'crop_pct': crop_pct}
    write_folder(
        model,
        model.state_dict(),
        folder,
        model_args=model_args,
        data_config=data_config,
        card=card,
        label_names=label_names,
    )


def write_folder(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    model_args: dict[str, object],
    data_config: dict[str, object],
    card: str,
    label_names: Sequence[str] | None = None,
    tagged: bool = False,
) -> None:
    """Write the three files of a network, each whole or not at all.

    Args:
        model: A network from timm's factory, which the configuration describes; its tensors are not looked at.
        tensors: Its state dict.
        folder: Where to write; made if it is not there.
        model_args: Arguments of the model that timm has not noted by itself.
        data_config: `input_size`, `mean`, `std` and `crop_pct`, as in timm.
        card: Text of the model card.
        label_names: Names of the classes in their order, where they are known.
        tagged: Whether these are the weights of the tag that the network was built with.
    """
    with written_whole(folder) as partial:
        save_config_for_hf(
            model,
            str(partial / 'config.json'),
            model_config={'label_names': list(label_names)} if label_names else None,
            model_args=model_args,
            data_config=data_config,
        )
        config = json.loads((partial / 'config.json').read_text())
        save_tensors(tensors, partial / 'model.safetensors')
        # It stands at the top of the file already; transformers passes both, and a repeated keyword is an error there.
        config['model_args'].pop('num_classes', None)
        for key in {'lazy', 'width', 'overlap'} - model_args.keys():
            config['model_args'].pop(key, None)  # how it was opened, or a default, not what it is
        if not tagged:
            for key in OF_A_TAG:
                config['pretrained_cfg'].pop(key, None)
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        (partial / 'README.md').write_text(card)
