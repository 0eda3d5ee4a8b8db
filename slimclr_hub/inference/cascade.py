"""Thresholds of a cascade, fitted on images without labels, and what it reaches beside fixed widths and chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from timm.layers import get_device_dtype

from slimclr_hub.errors import InputError
from slimclr_hub.inference.images import ImageList, Sources, list_images
from slimclr_hub.inference.runner import InferenceConfig, preprocessing, run_images
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cascade import Cascade, FittedCascades, last_widths, margins, mean_cost, route
from slimclr_hub.models.cost import cost
from slimclr_hub.models.labels import class_info
from slimclr_hub.models.mode import evaluating
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.turns import in_turns, seconds_of
from slimclr_hub.text import human
from slimclr_hub.weights.hashes import state_hash

if TYPE_CHECKING:
    from rich.table import Table

_QUANTILES = 49
_LEAST_IMAGES = 20
_TIMED = 64
_LONGEST = 4  # widths of a cascade, where there are more to choose from
_MOST_WIDTHS = 16  # of which there are 2,516 ways of at most four
_REPEATS = 3


@dataclass(frozen=True)
class Answers:
    """What a network says of images at each of its widths.

    Args:
        images: Those that could be read.
        probabilities: Width -> [N, classes], on the CPU.
        labels: Class of each image [N], or None where it is not known.
        multiply_adds: Width -> those of one image.
    """

    images: ImageList
    probabilities: dict[float, torch.Tensor]
    labels: torch.Tensor | None
    multiply_adds: dict[float, int]

    def part(self, indices: torch.Tensor) -> 'Answers':
        """The answers for some of the images."""
        chosen = set(indices.tolist())
        images = self.images.without(set(range(len(self.images))) - chosen)
        order = indices.sort().values
        labels = None if self.labels is None else self.labels[order]
        return Answers(images, {w: p[order] for w, p in self.probabilities.items()}, labels, self.multiply_adds)


@dataclass(frozen=True)
class Row:
    """A cascade, or a fixed width, on images that it was not fitted on.

    Args:
        cascade: The cascade; a fixed width is one of a single width.
        multiply_adds: Of an image in the mean.
        agreement: Share of images, in [0, 1], with the answer of the widest width.
        accuracy: Share of right answers, in [0, 1]; None without labels.
        by_chance: What `accuracy`, or else `agreement`, would be if as many images stopped at each width, by chance.
        mixed: The same, of a mix of two fixed widths with the same mean cost.
        milliseconds: Of an image in the mean, in batches; None if it was not measured.
    """

    cascade: Cascade
    multiply_adds: float
    agreement: float
    accuracy: float | None
    by_chance: float
    mixed: float
    milliseconds: float | None = None

    @property
    def reached(self) -> float:
        """What the other columns are compared with."""
        return self.agreement if self.accuracy is None else self.accuracy


def answer(model: SlimmableResNet, images: Sources, config: InferenceConfig) -> Answers:
    """Run every width of a network on images.

    The class of an image is that of the first folder of its name, where all are named as the network's classes are, or
    by their numbers.

    Raises:
        InputError: The network has no two widths or no two classes, or more than 16 widths, there are fewer than 20
            images, or as in `run_images`.
    """
    if len(model.widths) > _MOST_WIDTHS:
        raise InputError(f'{len(model.widths)} widths have too many cascades to try; give a network of {_MOST_WIDTHS}')
    if len(model.widths) < 2 or model.num_classes < 2:
        raise InputError(
            f'a cascade needs a network with a classifier and several widths, not {model.num_classes} classes at '
            f'widths {model.widths}; take one with a probe'
        )

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(model.forward_at(batch, width).float().softmax(1) for width in model.widths)

    listed = list_images(images)
    found = run_images(model, listed, forward, config, 'running all widths')
    if len(found.names) < _LEAST_IMAGES:
        raise InputError(f'{len(found.names)} images are too few to set thresholds; give {_LEAST_IMAGES} at least')
    read, size = set(found.names), model.pretrained_cfg['input_size'][-1]
    listed = listed.without(index for index, name in enumerate(listed.names) if name not in read)
    return Answers(
        listed,
        dict(zip(model.widths, (tensor.cpu() for tensor in found.tensors), strict=True)),
        labels_of(model, listed.names),
        {width: cost(model, width, size)[1] for width in model.widths},
    )


def labels_of(model: SlimmableResNet, names: Sequence[str]) -> torch.Tensor | None:
    """Class of each image [N], by the first folder of its name; None where one is no class of the network."""
    info = class_info(model)
    classes = [] if info is None else info.label_names()
    numbers = {str(number): number for number in range(model.num_classes)}
    numbers |= {name: number for number, name in enumerate(classes[: model.num_classes])}
    folders = [name.partition('/')[0] for name in names]
    if not all(folder in numbers and folder != name for folder, name in zip(folders, names, strict=True)):
        return None
    return torch.tensor([numbers[folder] for folder in folders])


def fit_cascades(answers: Answers) -> tuple[Cascade, ...]:
    """Choose cascades by their agreement with the widest width, which takes no labels.

    Of all ways through the widths, of four at most, and of 49 margins each, those remain that no mix of two others
    reaches: the upper hull of agreement over cost.
    """
    at = {width: margins(p) for width, p in answers.probabilities.items()}
    agrees = _agreement(answers)
    ascending = sorted(at)
    found = []
    for length in range(1, min(len(ascending), _LONGEST) + 1):
        for widths in combinations(ascending, length):
            share = torch.linspace(0, 1, _QUANTILES + 2)[1:-1]
            for margin in torch.quantile(at[widths[0]], share).unique().tolist() if length > 1 else (0.0,):
                ends = last_widths(at, widths, margin)
                spent = mean_cost(ends, widths, answers.multiply_adds)
                found.append(Cascade(widths, margin, spent, _share(agrees, ends)))
    return _upper_hull(found)


def fit(model: SlimmableResNet, answers: Answers) -> tuple[FittedCascades, Answers]:
    """Fit cascades on half of the images, chosen by a fixed seed; the other half is for `compare`."""
    order = torch.randperm(len(answers.images), generator=torch.Generator().manual_seed(0))
    half = len(order) // 2
    size = model.pretrained_cfg['input_size'][-1]
    cascades = fit_cascades(answers.part(order[:half]))
    return FittedCascades(state_hash(model), size, half, cascades), answers.part(order[half:])


def compare(answers: Answers, cascades: Sequence[Cascade]) -> list[Row]:
    """Evaluate each fixed width and each cascade on answers, in ascending order of cost."""
    at = {width: margins(p) for width, p in answers.probabilities.items()}
    agrees, right = _agreement(answers), _correctness(answers)
    judged = agrees if right is None else right
    fixed = [Cascade((width,), 0.0, answers.multiply_adds[width], 1.0) for width in sorted(at)]
    points = [(float(answers.multiply_adds[width]), judged[width].double().mean().item()) for width in sorted(at)]
    rows = []
    for cascade in (*fixed, *(each for each in cascades if len(each.widths) > 1)):
        ends = last_widths(at, cascade.widths, cascade.margin)
        spent = mean_cost(ends, cascade.widths, answers.multiply_adds)
        stops = {width: (ends == width).double().mean().item() for width in cascade.widths}
        by_chance = sum(share * judged[width].double().mean().item() for width, share in stops.items())
        accuracy = None if right is None else _share(right, ends)
        rows.append(Row(cascade, spent, _share(agrees, ends), accuracy, by_chance, _mixed(points, spent)))
    return sorted(rows, key=lambda row: row.multiply_adds)


def measure(
    model: SlimmableResNet, images: ImageList, cascades: Sequence[Cascade], batch_size: int, progress: bool = True
) -> list[float]:
    """Milliseconds that an image takes with each cascade, in the mean: the median of 3 passes, taken in turns.

    Forwards are really run, on up to 64 images in batches, and decoding is left out.
    """
    transform, mode = preprocessing(model)
    device, dtype = get_device_dtype(model).values()
    read = [transform(images.read(index, mode)) for index in range(min(_TIMED, len(images)))]
    batches = torch.stack(read).to(device, dtype).split(batch_size)
    with (
        evaluating(model),
        torch.inference_mode(),
        progress_bar((_REPEATS + 1) * len(cascades) * len(read), 'timing', progress) as bar,
    ):

        def run(cascade: Cascade) -> float:
            taken = seconds_of(lambda: [route(model.forward_at, batch, cascade).logits.cpu() for batch in batches])
            bar.update(len(read))
            return taken

        seconds = in_turns({i: partial(run, cascade) for i, cascade in enumerate(cascades)}, _REPEATS + 1)
    return [1000 * median(taken[1:]) / len(read) for taken in seconds.values()]  # the first is a warm-up


def cascades_table(rows: Sequence[Row], images: int) -> 'Table':
    """Return a table for rich with a row for each fixed width and each cascade."""
    from rich.table import Table

    labelled = rows[0].accuracy is not None
    widest = max(row.multiply_adds for row in rows if len(row.cascade.widths) == 1)
    judged = 'accuracy (%)' if labelled else 'agreement (%)'
    table = Table(title=f'On {images} images that the thresholds were not fitted on', title_justify='left')
    table.add_column('widths')
    for header in ('margin', 'multiply-adds', '% of widest', judged, 'by chance', 'fixed, mixed', 'ms an image'):
        table.add_column(header, justify='right')
    for row in rows:
        several = len(row.cascade.widths) > 1
        table.add_row(
            ', '.join(f'{width:g}' for width in row.cascade.widths),
            f'{row.cascade.margin:.3f}' if several else '',
            human(round(row.multiply_adds)),
            f'{100 * row.multiply_adds / widest:.1f}',
            f'{100 * row.reached:.1f}',
            *([f'{100 * row.by_chance:.1f}', f'{100 * row.mixed:.1f}'] if several else ['', '']),
            '' if row.milliseconds is None else f'{row.milliseconds:.2f}',
        )
    return table


def verdict(rows: Sequence[Row], images: int) -> str:
    """Say in a sentence or two how the cascades stand beside a mix of fixed widths at the same cost."""
    several = [row for row in rows if len(row.cascade.widths) > 1]
    if not several:
        return 'No cascade is better than a fixed width on the images of the fit: use a fixed width.'
    lost = [row for row in several if row.reached <= row.mixed]
    error = max((row.reached * (1 - row.reached) / images) ** 0.5 for row in several)
    about = f'Standard error of a share of {images} images: {100 * error:.1f} points at most.'
    if not lost:
        return f'Every cascade is above a mix of fixed widths at its cost. {about}'
    return f'{len(lost)} of {len(several)} cascades are not above a mix of fixed widths at their cost. {about}'


def draw_cascades(rows: Sequence[Row], path: Path) -> None:
    """Draw what fixed widths and cascades reach over multiply-adds, as `path`.png and `path`.pdf."""
    from slimclr_hub.runs.figures import line_style, new_figure, save_figure

    figure, (axis,) = new_figure()
    for number, (name, chosen) in enumerate(
        {
            'cascades': [row for row in rows if len(row.cascade.widths) > 1],
            'fixed widths': [row for row in rows if len(row.cascade.widths) == 1],
        }.items()
    ):
        costs, reached = [row.multiply_adds for row in chosen], [100 * row.reached for row in chosen]
        axis.plot(costs, reached, marker='o', label=name, **line_style(number))
    chance = [row for row in rows if len(row.cascade.widths) > 1]
    costs, reached = [row.multiply_adds for row in chance], [100 * row.by_chance for row in chance]
    axis.plot(costs, reached, marker='x', label='the same shares by chance', **line_style(2))
    axis.set_xlabel('multiply-adds of an image, mean')
    axis.set_ylabel('agreement with the widest (%)' if rows[0].accuracy is None else 'accuracy (%)')
    axis.legend()
    save_figure(figure, path)


def _agreement(answers: Answers) -> dict[float, torch.Tensor]:
    widest = answers.probabilities[max(answers.probabilities)].argmax(1)
    return {width: p.argmax(1) == widest for width, p in answers.probabilities.items()}


def _correctness(answers: Answers) -> dict[float, torch.Tensor] | None:
    if answers.labels is None:
        return None
    return {width: p.argmax(1) == answers.labels for width, p in answers.probabilities.items()}


def _share(good: dict[float, torch.Tensor], ends: torch.Tensor) -> float:
    """Share of images that are good at the width that is the last of each."""
    return sum((good[width] & (ends == width)).double().mean().item() for width in good)


def _upper_hull(cascades: Sequence[Cascade]) -> tuple[Cascade, ...]:
    hull: list[Cascade] = []
    for each in sorted(cascades, key=lambda c: (c.multiply_adds, -c.agreement)):
        if hull and each.agreement <= hull[-1].agreement:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], each):
            hull.pop()
        hull.append(each)
    return tuple(hull)


def _slope(first: Cascade, second: Cascade) -> float:
    return (second.agreement - first.agreement) / (second.multiply_adds - first.multiply_adds)


def _mixed(points: Sequence[tuple[float, float]], spent: float) -> float:
    """What a mix of two fixed widths reaches at most, at a mean cost that is at least that of the narrowest."""
    best = max(reached for cost_, reached in points if cost_ <= spent)
    for low, reached in points:
        for high, more in points:
            if low <= spent < high:
                best = max(best, reached + (more - reached) * (spent - low) / (high - low))
    return best
