"""Accuracy of each pair of width and size of images, with three kinds of statistics of batch normalisation.

    python benchmarks/resolutions.py /usr/share/datasets/fashion-mnist

`own` are those that the network has; `recalibrated` ones are of plain training images at each size; and `moved` are the
own ones, moved by the difference of these, as `slimclr-hub resolutions` does. Accuracies are those of the network's
head on all test images.
"""

import argparse
import copy
from pathlib import Path

import timm
from measure import Report, Row, positive, setting
from PIL import Image

from slimclr_hub.data.sources import read_split
from slimclr_hub.inference.images import ImageList
from slimclr_hub.inference.resolutions import accuracies, best_pairs, costs_of, estimate, recalibrate, set_size
from slimclr_hub.inference.runner import InferenceConfig
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.resolutions import Pair, Statistics, copy_statistics, statistics_of
from slimclr_hub.runs.command_line import run_script


def images_of(folder: Path, split: str, every: int = 1) -> ImageList:
    """Images of Fashion-MNIST, named as in folders of classes."""
    images, labels = (array[::every] for array in read_split(folder, split))
    names = [f'{label}/{index}' for index, label in enumerate(labels)]
    return ImageList(names, [Image.fromarray(image) for image in images])


def shares(model: SlimmableResNet, size: int, statistics: Statistics, images: ImageList) -> dict[float, float]:
    """Width -> share of right answers with these statistics."""
    network = copy.deepcopy(model)
    set_size(network, size)
    copy_statistics(statistics, network)
    return accuracies(network, images, CONFIG)[1]


CONFIG = InferenceConfig(batch_size=128, workers=0, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='IDX files of Fashion-MNIST')
    parser.add_argument('--model', default='slimclr_resnet20')
    parser.add_argument('--size', type=positive, nargs='+', default=[16, 20, 24, 28])
    parser.add_argument('--every', type=positive, default=59, help='of the training images, one of so many')
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True).eval()
    assert isinstance(model, SlimmableResNet)
    train, test = images_of(args.folder, 'train', args.every), images_of(args.folder, 'test')
    moved = estimate(model, train, args.size, CONFIG)
    rows: dict[tuple[float, int], Row] = {}
    pairs = []
    for size in args.size:
        kinds = {
            'own': statistics_of(model),
            'recalibrated': recalibrate(model, train, size, CONFIG),
            'moved': moved[size],
        }
        found = {kind: shares(model, size, statistics, test) for kind, statistics in kinds.items()}
        for width in model.widths:
            pairs.append(Pair(width, size, found['moved'][width]))
            cells = {f'{kind} (%)': f'{100 * by_width[width]:.1f}' for kind, by_width in found.items()}
            rows[width, size] = {'width': f'{width:g}', 'size': str(size), **cells}
    costs = costs_of(model, pairs)
    best = best_pairs(costs)
    report = Report(
        setting('cpu', 'float32', args.model, f'{len(train)} images for statistics, {len(test)} for accuracy')
    )
    report.table(
        'Accuracy by pair, and whether no pair of at most its cost reaches it with moved statistics',
        [
            {
                **rows[pair.width, pair.size],
                'multiply-adds (M)': costs[pair] / 1e6,
                'best': 'yes' if pair in best else '',
            }
            for pair in sorted(pairs, key=costs.__getitem__)
        ],
    )


if __name__ == '__main__':
    run_script(main)
