"""Class probabilities of images, by a network with a head at its active width."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.inference.images import Sources
from slimclr_hub.inference.runner import InferenceConfig, run_images
from slimclr_hub.models.labels import class_labels
from slimclr_hub.settings import at_least
from slimclr_hub.text import printable

if TYPE_CHECKING:
    from rich.table import Table

_WITH_HEAD = 'slimclr_resnet50.mocov3_300e_lincls_in1k'


@dataclass(frozen=True)
class ClassProbability:
    """One class, with its index in the head's output, its name, and its softmax over all classes, in [0, 1]."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """Name of an image, from `list_images`, and its most probable classes in descending order."""

    name: str
    classes: tuple[ClassProbability, ...]


def predict(
    model: nn.Module,
    images: Sources,
    *,
    top: int = 5,
    budget: float | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    precision: str = 'no',
    skip_unreadable: bool = False,
    progress: bool = True,
) -> list[Prediction]:
    """Predict the most probable classes of images by a network at its active width, on its device and in its dtype.

    Images are listed, checked and preprocessed as by `embed`. Classes are named by the network's configuration
    (`label_names`, with `label_descriptions`), else by ImageNet if their number fits, else by index.

    Args:
        model: A network from timm's factory with a head, slimmable or not.
        images: The path of a file or folder, a PIL image, or several of these, such as `dataset['image']`; see
            `list_images`.
        top: Classes for each image, at most.
        budget: Multiply-adds that an image may cost in the mean, for `model.cascade`, of which thresholds have been
            loaded; unless given, the active width runs.
        batch_size, workers, precision, skip_unreadable, progress: As for `embed`.

    Raises:
        InputError: The network has no head, an argument does not fit, or an image is not there or cannot be read.
    """
    config = InferenceConfig(batch_size, workers, precision, skip_unreadable, progress)
    at_least('--top', top, 1)
    classes = getattr(model, 'num_classes', 0)
    if classes < 1:
        raise InputError(
            f'the network has no head and so no classes; take one with a probe, such as {_WITH_HEAD}, or embed the '
            'images instead'
        )
    label = class_labels(model) or str

    run = model if budget is None else lambda batch: model.cascade(batch, budget).logits  # type: ignore[operator]

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probability, index = run(batch).float().softmax(1).topk(min(top, classes), dim=1)
        return probability, index

    outputs = run_images(model, images, forward, config, 'predicting')
    predictions = []
    for name, *row in zip(outputs.names, *(tensor.tolist() for tensor in outputs.tensors), strict=True):
        pairs = zip(*row, strict=True)
        classes = tuple(ClassProbability(index, label(index), probability) for probability, index in pairs)
        predictions.append(Prediction(name, classes))
    return predictions


def predictions_table(predictions: Sequence[Prediction]) -> 'Table':
    """Return a table for rich with a row for each class of each image, the image named at its first row."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column('image', overflow='fold')
    table.add_column('class', overflow='fold')
    table.add_column('probability (%)', justify='right', no_wrap=True)
    for prediction in predictions:
        table.add_section()
        for rank, guess in enumerate(prediction.classes):
            # As text, for square brackets in a name would be read as markup.
            name = Text(printable(prediction.name) if rank == 0 else '')
            table.add_row(name, Text(printable(guess.label)), f'{100 * guess.probability:.1f}')
    return table
