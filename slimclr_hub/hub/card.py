"""Model cards of networks that were trained or converted here."""

from collections.abc import Mapping, Sequence

from slimclr_hub.models.cost import WidthFacts

_TEMPLATE = """\
---
library_name: timm
license: apache-2.0
tags:
- image-feature-extraction
- timm
- slimclr
- self-supervised-learning
---
# {name}

A slimmable {architecture}, trained {how}: one file, {count} width{plural}.

```python
import timm, slimclr_hub
model = timm.create_model('local-dir:{folder}', pretrained=True, width={smallest})
model.set_width({largest})
```

From the Hugging Face Hub it is `hf-hub:USER/NAME` instead of `local-dir:`. `model.extract({smallest})` gives an
ordinary dense network of that width.

{table}

Parameters are those of the network at that width; multiply-adds are for one image of {size}x{size} pixels.{explained}

## Training

{epochs} epochs on `{data}`; every value is in `recipe.yaml` beside this file.

Method: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, https://arxiv.org/abs/2209.15525.
"""


_CONVERTED = """\
---
library_name: timm
tags:
- {pipeline}
- timm
- slimclr
---
# {architecture} from {source}

A slimmable network, converted from `{source}`: one file, {count} width{plural}.

```python
import timm, slimclr_hub
model = timm.create_model('local-dir:{folder}', pretrained=True, width={smallest})
model.set_width({largest})
```

{table}

Parameters are those of the network at that width; multiply-adds are for one image of {size}x{size} pixels.
{uncalibrated}
The weights are those of whoever made `{source}`, and so is their licence.
"""

_UNCALIBRATED = """
Only width 1 is trained. The others have the leading channels of its weights: this is a start for slimmable training
(`accelerate launch recipes/pretrain.py --model.name {architecture} --model.weights FOLDER`, with the folder that this
file is in), and of no use as it is.
"""


_EXPLAINED = {
    'k-NN': 'k-NN is weighted k-nearest-neighbour accuracy (%) on held-out images.',
    'linear': 'Linear is the accuracy (%) of a logistic regression on frozen features.',
    'top-1': 'Top-1 is the accuracy (%) of its own classifier.',
}


def training_card(facts: Sequence[WidthFacts], about: Mapping[str, str]) -> str:
    """Card of a run's result.

    Args:
        facts: The widths, in descending order.
        about: `name`, `folder`, `architecture`, `method`, `data`, `epochs` and `size`.
    """
    explained = [text for title, text in _EXPLAINED.items() if title in facts[0].cells]
    return _TEMPLATE.format(
        count=len(facts),
        plural='' if len(facts) == 1 else 's',
        smallest=facts[-1].width,
        largest=facts[0].width,
        table=card_table(facts),
        how='with labels' if about['method'] == 'supervised' else f'without labels by SlimCLR on {about["method"]}',
        explained=''.join(f' {text}' for text in explained),
        **about,
    )


def card_table(facts: Sequence[WidthFacts]) -> str:
    """The widths as a table in Markdown."""
    titles = list(facts[0].cells)
    rows = [titles, ['---:'] * len(titles), *([fact.cells[title] for title in titles] for fact in facts)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def converted_card(
    facts: Sequence[WidthFacts], architecture: str, source: str, folder: str, size: int, calibrated: bool
) -> str:
    """Card of a network that was converted from a file of another kind.

    Args:
        facts: The widths, in descending order.
        architecture: Its name in timm's registry.
        source: Name of the file.
        folder: Where the network is.
        size: Height and width of the images in pixels.
        calibrated: Whether the normalisation of every width has seen images.
    """
    return _CONVERTED.format(
        pipeline='image-feature-extraction',
        architecture=architecture,
        source=source,
        folder=folder,
        count=len(facts),
        plural='' if len(facts) == 1 else 's',
        smallest=facts[-1].width,
        largest=facts[0].width,
        table=card_table(facts),
        size=size,
        uncalibrated='' if calibrated else _UNCALIBRATED.format(architecture=architecture),
    )
