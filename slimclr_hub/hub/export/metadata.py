"""What travels with an exported network: preprocessing of images and names of classes, as one JSON text."""

import json
from typing import Any

from timm.data import resolve_input_data_config

from slimclr_hub.hub.export.checks import Reference
from slimclr_hub.models.labels import class_labels

KEY = 'slimclr_hub'
"""Name of the text in every format."""

_PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def describe(*references: Reference, **more: int) -> str:
    """Return a JSON object that says how images are made and what outputs mean.

    It has `input_size` (channels, height and width) and, as far as the network knows them, `architecture`, `widths`,
    timm's `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`, and `label_names`; then what `more` gives.
    """
    network: Any = references[0].network
    about: dict[str, Any] = {'input_size': list(references[0].example.shape[1:])}
    if architecture := references[0].architecture:
        about['architecture'] = architecture
    if widths := [reference.width for reference in references if reference.width is not None]:
        about['widths'] = widths
    if getattr(network, 'pretrained_cfg', None):
        data = resolve_input_data_config(network)
        about |= {key: data[key] for key in _PREPROCESSING}
        if label := class_labels(network):
            about['label_names'] = [label(index) for index in range(network.num_classes)]
    return json.dumps({**about, **more})
