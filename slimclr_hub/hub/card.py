"""Model cards: of networks that were trained or converted here, and of the published ones."""

from collections.abc import Mapping, Sequence

from slimclr_hub.runs.result import RAW_PIXELS, Result, load
from slimclr_hub.runs.tables import markdown
from slimclr_hub.weights.published import (
    ARCHITECTURE,
    AUTHORS_REPOSITORY,
    PUBLISHED,
    SHIPPED,
    Published,
    Shipped,
    WidthFacts,
    published_facts,
)

_METHOD = (
    'Method: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, '
    'https://arxiv.org/abs/2209.15525.'
)

_OWN = """\
---
library_name: timm
{license}tags:
- {task}
- timm
- slimclr
{tags}---
# {title}

{intro}

```python
import timm, slimclr_hub
model = timm.create_model('local-dir:{folder}', pretrained=True, width={smallest})
model.set_width({largest})
```

{usage}{table}

Parameters are those of the network at that width; multiply-adds are for one image of {size}x{size} pixels.{explained}

{ending}
"""

_HUB = """\
From the Hugging Face Hub it is `hf-hub:USER/NAME` instead of `local-dir:`. `model.extract({smallest})` gives an
ordinary dense network of that width.

"""

_TRAINING = f"""\
## Training

{{epochs}} epochs on `{{data}}`; every value is in `recipe.yaml` beside this file.

{_METHOD}"""

_FINETUNING = """\
All widths learned at once, from labels (Yu et al., Slimmable Neural Networks, https://arxiv.org/abs/1812.08928). The
licence of the network that this began with holds for it, too."""

_PROBE = f"""\
{_METHOD} The
weights of the network are those of whoever made it, and so is their licence."""

_UNCALIBRATED = """\
Only width 1 is trained. The others have the leading channels of its weights: this is a start for slimmable training
(`accelerate launch recipes/pretrain.py --model.name {architecture} --model.weights FOLDER`, with the folder that this
file is in), and of no use as it is.

"""


def _own_card(
    facts: Sequence[WidthFacts],
    results: Sequence[Result] = (),
    *,
    license: str = '',
    tags: str = '',
    usage: str = '',
    explained: str = '',
    **text: str,
) -> str:
    """Write the card of a network in a folder, whose license and tags are lines of the front matter.

    `text` gives `title`, `task`, `intro`, `folder`, `size` and `ending`; what else it has is not used.
    """
    return _OWN.format(
        license=license,
        tags=tags,
        usage=usage,
        explained=explained,
        smallest=facts[-1].width,
        largest=facts[0].width,
        table=card_table(facts, results),
        **text,
    )


def training_card(facts: Sequence[WidthFacts], about: Mapping[str, str], results: Sequence[Result] = ()) -> str:
    """Write the card of a network that was pre-trained here, with the cost of each width in descending order.

    `about` gives `name`, `folder`, `architecture`, `method`, `data`, `epochs` and `size`.
    """
    how = 'with labels' if about['method'] == 'supervised' else f'without labels by SlimCLR on {about["method"]}'
    return _own_card(
        facts,
        results,
        title=about['name'],
        intro=f'A slimmable {about["architecture"]}, trained {how}: {_one_file(facts)}.',
        task='image-feature-extraction',
        license='license: apache-2.0\n',
        tags='- self-supervised-learning\n',
        usage=_HUB.format(smallest=facts[-1].width),
        explained=''.join(f' `{label}` is {_what(result)}.' for label, result in _by_label(results).items()),
        ending=_TRAINING.format(epochs=about['epochs'], data=about['data']),
        **about,
    )


def _what(result: Result) -> str:
    if result.protocol.kind == 'rank':
        return f'the {result.protocol}, of features of {result.images} training images'
    return f'the top-1 accuracy (%) on held-out images by {result.protocol}'


def finetuned_card(facts: Sequence[WidthFacts], about: Mapping[str, str], result: Result) -> str:
    """Write the card of a network that was fine-tuned here.

    `about` gives `name`, `folder`, `network`, `data`, `split`, `epochs` and `size`.
    """
    return _own_card(
        facts,
        [result],
        title=about['name'],
        intro=f'`{about["network"]}`, fine-tuned on `{about["data"]}`: {_one_file(facts)}.',
        task='image-classification',
        explained=f' The last column is the top-1 accuracy (%) on the {result.images} images of the split '
        f'`{about["split"]}`, after {about["epochs"]} epochs.',
        ending=_FINETUNING,
        **about,
    )


def probe_card(facts: Sequence[WidthFacts], about: Mapping[str, str], result: Result) -> str:
    """Write the card of a network with a linear probe, whose result has its settings.

    `about` gives `name`, `folder`, `data`, `split` and `size`.
    """
    settings, protocol = result.settings, result.protocol
    choice = f', the {settings["chosen_by"]}' if len(settings['sweep']) > 1 else ''
    return _own_card(
        facts,
        [result],
        title=f'{about["name"]} with a linear probe',
        intro=f'`{result.network}`, frozen, with a {protocol.head} linear classifier for the {settings["classes"]} '
        f'classes of `{about["data"]}`.',
        task='image-classification',
        explained=f' The last column is the top-1 accuracy (%) of the classifier on {result.images} images of the '
        f'split `{about["split"]}`, by {protocol} (learning rate {settings["chosen_lr"]:g}{choice}).',
        ending=_PROBE,
        **about,
    )


def converted_card(
    facts: Sequence[WidthFacts], architecture: str, source: str, folder: str, size: int, calibrated: bool
) -> str:
    """Write the card of a network that was converted from the file `source`, for images of `size` pixels.

    `calibrated` is true if the normalisation of every width has seen images.
    """
    return _own_card(
        facts,
        title=f'{architecture} from {source}',
        intro=f'A slimmable network, converted from `{source}`: {_one_file(facts)}.',
        folder=folder,
        size=str(size),
        task='image-feature-extraction',
        ending=('' if calibrated else _UNCALIBRATED.format(architecture=architecture))
        + f'The weights are those of whoever made `{source}`, and so is their licence.',
    )


def _one_file(facts: Sequence[WidthFacts]) -> str:
    return f'one file, {len(facts)} width{"" if len(facts) == 1 else "s"}'


def card_table(facts: Sequence[WidthFacts], results: Sequence[Result] = ()) -> str:
    """Format cost and quality of each width as a table in Markdown, a column for each kind of accuracy and the rank."""
    rows = [list(facts[0].cells), *(list(fact.cells.values()) for fact in facts)]
    for label, result in _by_label(results).items():
        for title, accuracies in (f'{label} at start', result.start), (label, result.values):
            if accuracies:
                rows[0].append(title)
                for row, fact in zip(rows[1:], facts, strict=True):
                    row.append(f'{accuracies[fact.width]:.1f}' if fact.width in accuracies else '')
    return markdown(rows[0], rows[1:], names=0)


def _by_label(results: Sequence[Result]) -> dict[str, Result]:
    """The first, which is the best, of the results that would have the same column head."""
    return {result.protocol.label: result for result in reversed(results)}


# Published networks

_PUBLISHED = """\
---
library_name: timm
pipeline_tag: {pipeline}
license: other
license_name: not-stated
license_link: {repository}
datasets:
- imagenet-1k
tags:
- {pipeline}
- timm
- slimclr
- self-supervised-learning
---
# {name}

A slimmable ResNet-50: one file of weights, four networks, at 100, 75, 50 and 25 % of the channels. SlimCLR on {method}
pre-trained it for {epochs} epochs on ImageNet-1k without labels{probe}.

{table}

Parameters are those of the network in this file at that width; multiply-adds are for one image of 224x224 pixels.
Accuracies are **reported by the paper**, not measured here: a linear probe on ImageNet (table 1){detection_note}.

## Usage

Install slimclr_hub (`pip install .` in its repository), and import it so that timm knows the architecture.

{usage}

### Less memory

With `lazy=True` only the active width is in memory; others are read from the file when they are switched to.

```python
model = timm.create_model('{name}', pretrained=True, width=0.25, lazy=True)
model.set_width(1.0)
```

### One width as an ordinary network

```python
dense = timm.create_model('{dense}', pretrained=True).eval()  # also _075 and _025
```

### Detection and other dense tasks

```python
backbone = timm.create_model('{name}', pretrained=True, features_only=True).eval()
backbone.set_width(0.5)
with torch.inference_mode():
    maps = backbone(images)  # five maps, of strides 2 to 32
```

## Training

The recipe with the values of the paper is `{recipe}`; the weights here are the authors' own, made by their code.

```
accelerate launch recipes/pretrain.py --config {recipe} --data.root /data/imagenet
```

## Limits

- Trained on ImageNet-1k, photographs of single objects for the most part: expect less on other kinds of image, and the
  biases of that set.
- The widths are those four. `slimclr_hub.models.calibrate_width` adds one between them from a few thousand images, at a
  price in accuracy.
- {limits}

## Licence

The authors publish these weights without naming a licence; ask them before you use the weights in a product. They are
at [{short_repository}]({repository}), file `{file}`.

## Citation

```bibtex
@article{{zhao2024slimclr,
  title   = {{Slimmable Networks for Contrastive Self-supervised Learning}},
  author  = {{Zhao, Shuai and Zhu, Linchao and Wang, Xiaohan and Yang, Yi}},
  journal = {{International Journal of Computer Vision}},
  year    = {{2024}}
}}
```
"""

_USAGE = """\
```python
import timm, torch, slimclr_hub
from PIL import Image

model = timm.create_model('{name}', pretrained=True, width=0.5).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
images = transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)
with torch.inference_mode():
    {at_050}
    model.set_width(0.25)
    {at_025}
```"""

_FEATURES = {'at_050': 'features = model(images)  # [1, 1024]', 'at_025': 'features = model(images)  # [1, 512]'}
_CLASSES = dict.fromkeys(('at_050', 'at_025'), 'probabilities, classes = model(images).softmax(-1).topk(5)')
_LIMIT_OF_CLASSES = 'The classes are those of ImageNet-1k; the probe is linear, a fine-tuned network is better.'
_LIMIT_OF_SHIPPED_CLASSES = "The classes are Fashion-MNIST's ten; the probe is linear."
_LIMIT_OF_FEATURES = 'It gives features; for classes train a head, or take the tag with `lincls` in its name.'
_ABOUT_PROBE = '\n\nEach width has a linear layer of its own; `num_classes=0` gives the features that it sees.'


def published_card(published: Published) -> str:
    """Write the card of a published network."""
    detected = any(reported.box_ap is not None for reported in published.reported.values())
    with_probe = published.num_classes > 0
    usage = _USAGE.format(name=published.name, **(_CLASSES if with_probe else _FEATURES))
    return _PUBLISHED.format(
        name=published.name,
        dense=f'{ARCHITECTURE}_050.{published.tag}',
        file=published.file,
        method=published.method,
        epochs=published.epochs,
        pipeline='image-classification' if with_probe else 'image-feature-extraction',
        probe='; a linear probe of each width, trained afterwards, is with it' if with_probe else '',
        repository=AUTHORS_REPOSITORY,
        short_repository=AUTHORS_REPOSITORY.removeprefix('https://github.com/'),
        detection_note=',\nand AP on COCO val2017 of a Mask R-CNN fine-tuned from it (table 2)' if detected else '',
        table=_reported_table(published),
        usage=usage + _ABOUT_PROBE if with_probe else usage,
        recipe=f'recipes/configs/{published.recipe}.yaml',
        limits=_LIMIT_OF_CLASSES if with_probe else _LIMIT_OF_FEATURES,
    )


def _reported_table(published: Published) -> str:
    titles = {'top1': 'linear top-1 (%)', 'top5': 'linear top-5 (%)', 'box_ap': 'box AP', 'mask_ap': 'mask AP'}
    rows = [
        {**fact.cells, **{titles[key]: str(value) for key, value in vars(reported).items() if value is not None}}
        for fact in published_facts(published.num_classes)
        for reported in [published.reported[fact.width]]
    ]
    return markdown([*rows[0]], [[*row.values()] for row in rows], names=0)


# Networks in the package

_SHIPPED = """\
---
library_name: timm
pipeline_tag: {pipeline}
license: apache-2.0
datasets:
- zalando-datasets/fashion_mnist
tags:
- {pipeline}
- timm
- slimclr
- self-supervised-learning
---
# {name}

A slimmable ResNet-20 in one file of a megabyte, which comes with the package: four networks, at 100, 75, 50 and 25 %
of the channels. SlimCLR on {method} pre-trained it for {epochs} epochs on the 60,000 training images of {data} without
labels{probe}.

{table}

Parameters are those of the network in this file at that width; multiply-adds are for one image of {size}x{size} pixels.
There is one run of it, and the test images are 10,000, for a standard error of about 0.4 points; it has not seen them.
Each linear classifier, that of raw pixels too, has the best of five learning rates on them.
{explained}

Raw pixels of the same images reach {pixels}; `at start` is what random weights do.

## Usage

{usage}

The images are grey: three equal channels are what the first convolution is made for, and `in_chans=1` takes one.
A dense network of one width reads its slices of the same file:

```python
dense = timm.create_model('slimclr_resnet20_050.{tag}', pretrained=True).eval()  # or _075, _025
```

## Training

{made}

![Loss and accuracy while training](slimclr_resnet20.{run}.png)

```
accelerate launch recipes/pretrain.py --config recipes/configs/{recipe}.yaml
```

trains it again, and these give the accuracies above:

```
{evaluations}
```

The folder is Debian's (`apt-get install dataset-fashion-mnist`); torchvision's root of the same files serves as well.

## Limits

{below}- Small grey pictures of single garments on black: expect little of it on anything else.
- {limits}
- It is here to try the package with, and to test it. Networks for photographs are the authors', on ImageNet.

Method: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, https://arxiv.org/abs/2209.15525.
"""

_SHIPPED_FEATURES = {'at_050': 'features = model(images)  # [1, 32]', 'at_025': 'features = model(images)  # [1, 16]'}
_SHIPPED_CLASSES = dict.fromkeys(('at_050', 'at_025'), 'probabilities, classes = model(images).softmax(-1).topk(3)')


def shipped_card(shipped: Shipped) -> str:
    """Write the card of a network of the package, with the accuracies that its evaluations wrote."""
    everything = load(shipped.results)
    results = [result for result in everything if result.network != RAW_PIXELS]
    pixels = {result.protocol.label: result.top1[1.0] for result in everything if result.network == RAW_PIXELS}
    with_probe = shipped.num_classes > 0
    return _SHIPPED.format(
        **vars(shipped),
        name=shipped.name,
        pipeline='image-classification' if with_probe else 'image-feature-extraction',
        probe='; a linear probe of each width, trained on their labels afterwards, is with it' if with_probe else '',
        table=card_table(published_facts(shipped.num_classes, shipped.architecture), results),
        explained='\n'.join(f'`{label}` is {_what(result)}.' for label, result in _by_label(results).items()),
        pixels=' and '.join(f'{top1:.1f} by `{label}`' for label, top1 in pixels.items()),
        below=''.join(_below_pixels(result, pixels) for result in results),
        evaluations='\n'.join(
            dict.fromkeys(f'accelerate launch recipes/{result.environment["command"]}' for result in everything)
        ),
        limits=_LIMIT_OF_SHIPPED_CLASSES if with_probe else _LIMIT_OF_FEATURES,
        usage=_USAGE.format(name=shipped.name, **(_SHIPPED_CLASSES if with_probe else _SHIPPED_FEATURES)),
    )


def _below_pixels(result: Result, pixels: Mapping[str, float]) -> str:
    label = result.protocol.label
    widths = [f'{width:g}' for width, top1 in result.top1.items() if label in pixels and top1 <= pixels[label]]
    return f'- By `{label}` it is not above raw pixels at width {", ".join(widths)}.\n' if widths else ''


def all_cards() -> dict[str, str]:
    """Write the cards of all published networks: file name -> text."""
    return {
        **{f'{published.name}.md': published_card(published) for published in PUBLISHED.values()},
        **{f'{shipped.name}.md': shipped_card(shipped) for shipped in SHIPPED.values()},
    }
