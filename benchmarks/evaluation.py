"""Time of evaluation: features at every width, k-NN search and linear probe, and of their alternatives.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --model slimclr_resnet50 --images 20000 --classes 1000 --bank 18000 --threads 2

Features are of the embedded images, or, with `--images`, random around one centre per class, as many as the network has
at each width. Alternatives are, for features, the dense network of each width in a pass of its own; for search and
probe, scikit-learn on the CPU with the same features of width 1. Search and probe run as `while training`, and as in
the recipes, which do more: `knn_eval` counts top-1 and top-5 for four k and two temperatures, `linear_eval` trains five
learning rates of all widths at once. images/s count validation images searched, and training images learned from once.
"""

import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from measure import Report, Row, interleave, make_parser, parse, positive, setting, timed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from slimclr_hub.data import DataConfig
from slimclr_hub.data.config import LabelledDataConfig
from slimclr_hub.data.loaders import EvalLoader, eval_loader
from slimclr_hub.evaluate.features import SplitFeatures, extract_features
from slimclr_hub.evaluate.knn import knn_predict, vote
from slimclr_hub.evaluate.knn_eval import KNNEvalConfig, neighbours_in_all, rank_of
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig, SweepConfig
from slimclr_hub.evaluate.linear_eval.probe import make_head, standardisation
from slimclr_hub.evaluate.linear_eval.training import CachedBatches, ProbeTraining
from slimclr_hub.evaluate.logistic import linear_predict
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.train.config import KNNConfig, ModelConfig, ProbeConfig
from slimclr_hub.train.setup import make_backbone

Predict = Callable[[], torch.Tensor | np.ndarray]
K, TEMPERATURE = 200, KNNConfig().temperature
WEIGHT_DECAY = ProbeConfig().weight_decay


def features_rows(
    accelerator: Accelerator, backbone: SlimmableResNet, loaders: list[EvalLoader], repeats: int
) -> list[Row]:
    """Time all widths in one pass, and a pass for each."""
    dense = [backbone.extract(width) for width in backbone.widths]
    images = sum(loader.total for loader in loaders)

    @torch.inference_mode()
    def one_by_one() -> None:
        for network in dense:
            for loader in loaders:
                for batch, _ in loader:
                    with accelerator.autocast():
                        network(batch)

    def together() -> None:
        for loader in loaders:
            extract_features(accelerator, backbone, loader, backbone.widths)

    names = {f'{len(dense)} dense networks, a pass each': one_by_one, 'all widths in one pass': together}
    seconds = interleave(names, repeats, device=accelerator.device)
    reference = next(iter(seconds.values()))
    return [{'features': name, **timed(values, reference, images)} for name, values in seconds.items()]


def random_split(
    count: int, classes: int, features: dict[float, int], device: torch.device, seed: int
) -> SplitFeatures:
    """Draw features around centres that all splits share; a narrower width has the first features."""
    widest = max(features.values())
    centres = torch.randn(classes, widest, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    x = (centres[labels] + 4 * torch.randn(count, widest, generator=generator)).relu().to(device)
    return SplitFeatures({width: x[:, :size].contiguous() for width, size in features.items()}, labels.to(device))


def searches(train: SplitFeatures, validation: SplitFeatures, accelerator: Accelerator) -> dict[str, Predict]:
    """k-NN searches at width 1; each returns the predicted classes of the validation images."""
    bank, queries = train.by_width[1.0], validation.by_width[1.0]
    classes = int(train.labels.max()) + 1
    k = min(K, len(bank))
    recipe = KNNEvalConfig(network='', k=(10, 20, 100, 200))
    ks = sorted({min(each, len(bank)) for each in recipe.k or ()})

    def sklearn() -> np.ndarray:
        weigh = lambda distance: np.exp((1 - distance) / TEMPERATURE)  # noqa: E731
        search = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=weigh)
        return search.fit(bank.cpu().numpy(), train.labels.cpu().numpy()).predict(queries.cpu().numpy())

    def knn_eval() -> torch.Tensor:
        # As `knn_eval`, between features and accuracies.
        unit_bank, unit_queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
        predictions: list[torch.Tensor] = []
        done = 0
        for found in neighbours_in_all(accelerator, unit_queries, unit_bank, train.labels, ks[-1], recipe.chunk):
            truth = validation.labels[done : done + len(found.labels)]
            done += len(truth)
            for temperature in recipe.temperature:
                for _, votes in vote(found, ks, temperature, classes):
                    rank_of(votes, truth)
            predictions.append(votes.argmax(1))
        return torch.cat(predictions)

    return {
        'scikit-learn, brute force': sklearn,
        'while training': lambda: knn_predict(queries, bank, train.labels, k, TEMPERATURE),
        f'knn_eval, {len(ks)} k and {len(recipe.temperature)} tau': knn_eval,
    }


def probes(
    train: SplitFeatures,
    validation: SplitFeatures,
    accelerator: Accelerator,
    backbone: SlimmableResNet,
    epochs: int,
) -> dict[str, Predict]:
    """Linear classifiers; each returns the predicted classes of the validation images at width 1."""
    bank, queries = train.by_width[1.0], validation.by_width[1.0]
    classes = int(train.labels.max()) + 1

    def sklearn() -> np.ndarray:
        scaler = StandardScaler()
        features = scaler.fit_transform(bank.cpu().numpy())
        # C weighs the summed loss, weight_decay half the squared norm against the mean loss.
        regression = LogisticRegression(C=1 / (WEIGHT_DECAY * len(bank)))
        with warnings.catch_warnings():
            # Both stop after at most 100 iterations.
            warnings.simplefilter('ignore', ConvergenceWarning)
            regression.fit(features, train.labels.cpu().numpy())
        return regression.predict(scaler.transform(queries.cpu().numpy()))

    def linear_eval() -> torch.Tensor:
        batch = LabelledDataConfig(batch_size=min(LinearEvalConfig(' ').data.batch_size, len(train.labels)))
        config = LinearEvalConfig(' ', data=batch, optim=SweepConfig(epochs=epochs))
        head = make_head(backbone, config.probe.head, classes, config.run.seed).to(accelerator.device)
        scaling = standardisation(head, train.by_width)
        scaled = {width: (x - scaling[width][0]) * scaling[width][1] for width, x in train.by_width.items()}
        batches = CachedBatches(SplitFeatures(scaled, train.labels), batch.batch_size, config.run.seed)
        with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
            place = Path(folder)
            training = ProbeTraining(config, accelerator, head, batches, validation, scaling, place, signals)
            with redirect_stderr(io.StringIO()):  # the progress bar
                tops = training.run()[-1]['top1']
        best = max(range(len(tops)), key=lambda number: sum(tops[number].values()))
        with torch.no_grad():
            return training.head(best)(queries, 1.0).argmax(1)

    rates = len(SweepConfig().rates)
    return {
        'scikit-learn, L-BFGS, width 1': sklearn,
        'while training, width 1': lambda: linear_predict(queries, bank, train.labels, WEIGHT_DECAY),
        f'linear_eval, {len(train.by_width)} widths, {rates} rates, {epochs} epochs': linear_eval,
    }


def compared(
    cases: dict[str, Predict], images: int, truth: torch.Tensor, column: str, repeats: int, device: torch.device
) -> list[Row]:
    """Time cases, of which the first is the reference; rows with the accuracy of each."""
    predicted: dict[str, torch.Tensor | np.ndarray] = {}

    def keep(name: str, predict: Predict) -> None:
        predicted[name] = predict()

    seconds = interleave({name: partial(keep, name, case) for name, case in cases.items()}, repeats, device=device)
    reference = next(iter(seconds.values()))
    rows: list[Row] = []
    for name, classes in predicted.items():
        right = torch.as_tensor(classes).cpu() == truth.cpu()
        accuracy: Row = {'accuracy (%)': 100 * right.float().mean().item()}
        rows.append({column: name, **timed(seconds[name], reference, images), **accuracy})
    return rows


def main() -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument('--model', default='slimclr_resnet20')
    parser.add_argument('--images', type=positive, help='use random features of so many images, not the network')
    parser.add_argument('--classes', type=positive, default=10, help='of random features')
    parser.add_argument('--bank', type=positive, help='training images at most; with --images, nine of ten by default')
    parser.add_argument('--epochs', type=positive, default=SweepConfig().epochs, help='of linear_eval')
    parser.add_argument('--only', choices=('features', 'search', 'probe'), nargs='+')
    args = parse(parser)
    only = args.only or ['features', 'search', 'probe']
    if args.images is not None and args.images < 2 * args.classes:
        parser.error(f'argument --images: {args.images} are too few for {args.classes} classes')
    if args.images is not None and args.bank is not None and args.bank >= args.images:
        parser.error(f'argument --bank: {args.bank} leaves no image of {args.images} to classify')

    accelerator = Accelerator(mixed_precision='bf16' if args.bf16 else 'no', cpu=args.device == 'cpu')
    device = accelerator.device
    config = DataConfig(num_workers=0)
    backbone = make_backbone(ModelConfig(args.model), config.channels if args.images is None else 3).eval()
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = 'bf16 network, float32 features' if args.bf16 else 'float32'
    report = Report(setting(device, precision, args.model, f'{len(backbone.widths)} widths'), args.json)
    if args.images is None:
        loaders = [
            eval_loader(config, split, at_most, 0).prepared(accelerator)
            for split, at_most in ((config.train_split, args.bank), (str(config.val_split), None))
        ]
        if 'features' in only:
            title = f'features of the embedded images, batches of {loaders[0].batch_size}, loading included'
            report.table(title, features_rows(accelerator, backbone, loaders, args.repeats))
        train, validation = (
            SplitFeatures(*extract_features(accelerator, backbone, loader, backbone.widths)) for loader in loaders
        )
    else:
        bank = args.bank or args.images * 9 // 10
        sizes = {width: features_at(backbone, width) for width in backbone.widths}
        train, validation = (
            random_split(count, args.classes, sizes, device, seed)
            for seed, count in ((1, bank), (2, args.images - bank))
        )
    what = f'{len(train.labels)} training images, {train.by_width[1.0].shape[1]} features'
    if 'search' in only:
        cases = searches(train, validation, accelerator)
        rows = compared(cases, len(validation.labels), validation.labels, 'search', args.repeats, device)
        report.table(f'k-NN, {what}, {len(validation.labels)} images to classify', rows)
    if 'probe' in only:
        cases = probes(train, validation, accelerator, backbone, args.epochs)
        rows = compared(cases, len(train.labels), validation.labels, 'probe', args.repeats, device)
        report.table(f'linear classifier, {what}', rows)


def features_at(backbone: SlimmableResNet, width: float) -> int:
    with backbone.set_width(width):
        return backbone.num_features


if __name__ == '__main__':
    run_script(main)
