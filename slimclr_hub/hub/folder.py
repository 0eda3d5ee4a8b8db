"""A network as a folder that timm opens: config.json, model.safetensors and a model card."""

import json
import os
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from slimclr_hub.models import SlimmableResNet


def save_folder(
    model: SlimmableResNet,
    folder: Path,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float,
    card: str,
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
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.partial-') as name:
        partial = Path(name)
        model_args: dict[str, object] = {'widths': model.widths, 'head': model.head}
        if model.width != model.widths[0]:  # the default, which also suits whoever asks for other widths
            model_args['width'] = model.width
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
        save_config_for_hf(
            model,
            str(partial / 'config.json'),
            model_args=model_args,
            data_config={'input_size': (model.in_chans, size, size), 'mean': mean, 'std': std, 'crop_pct': crop_pct},
        )
        config = json.loads((partial / 'config.json').read_text())
        # It stands at the top of the file already; transformers passes both, and a repeated keyword is an error there.
        config['model_args'].pop('num_classes', None)
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        (partial / 'README.md').write_text(card)
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
