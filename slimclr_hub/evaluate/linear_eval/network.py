"""The judged network with the probe as its head, as a folder that timm, the command line and transformers open."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slimclr_hub.data import DataConfig
from slimclr_hub.evaluate.result import EvalResult
from slimclr_hub.hub.card import card_table
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import width_facts

_WORDNET = re.compile(r'n\d{8}')
_CARD = """\
---
library_name: timm
tags:
- image-classification
- timm
- slimclr
---
# {name} with a linear probe

`{network}`, frozen, with a {head} linear classifier for the {classes} classes of `{data}`.

```python
import timm, slimclr_hub
model = timm.create_model('local-dir:{folder}', pretrained=True, width={smallest})
model.set_width({largest})
```

{table}

Parameters are those of the network at that width; multiply-adds are for one image of {size}x{size} pixels. Top-1 is the
accuracy (%) of the classifier on {images} images of the split `{split}`, by linear evaluation ({protocol}; learning
rate {lr:g}{choice}).

Method: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, https://arxiv.org/abs/2209.15525. The
weights of the network are those of whoever made it, and so is their licence.
"""


def save_with_head(
    backbone: SlimmableResNet,
    head: Mapping[str, torch.Tensor],
    folder: Path,
    result: EvalResult,
    data: DataConfig,
    names: Sequence[str] | None,
) -> None:
    """Write the network with the probe as its head, its result beside it, and leave it without one as it was.

    Args:
        backbone: The network.
        head: State dict of the linear layers, for features as the network gives them.
        folder: Where to write.
        result: What it has reached, and its settings.
        data: What it was judged on.
        names: Names of its classes, where they are known.
    """
    settings = result.settings
    backbone.reset_classifier(settings['classes'], head=settings['probe']['head'])
    backbone.fc.load_state_dict(head)
    facts = [replace(fact, top1=result.top1[fact.width]) for fact in width_facts(backbone, data.size)]
    card = _CARD.format(
        name=folder.name,
        network=result.network,
        head=settings['probe']['head'],
        classes=settings['classes'],
        data=data.name,
        folder=folder,
        smallest=backbone.widths[-1],
        largest=backbone.widths[0],
        table=card_table(facts),
        size=data.size,
        images=settings['validation_images'],
        split=data.val_split,
        protocol=result.protocol,
        lr=settings['chosen_lr'],
        choice=f', the {settings["chosen_by"]}' if len(settings['sweep']) > 1 else '',
    )
    if names is not None and (len(names) != settings['classes'] or all(map(_WORDNET.fullmatch, names))):
        names = None  # for ImageNet's own numbers there are better names, which timm knows
    save_folder(
        backbone,
        folder,
        size=data.size,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        card=card,
        label_names=names,
    )
    # Where an evaluation leaves it, so that comparisons find it.
    result.save(folder / 'linear_eval')
    backbone.reset_classifier(0)
