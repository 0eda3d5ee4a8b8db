"""Fine-tuning beside timm's own training script: accuracy, and the time of the whole command.

    python benchmarks/finetuning.py train.py FOLDER          # train.py of huggingface/pytorch-image-models

Both train the same dense network of width 0.5 from the same weights, on the images that the package ships, written to
FOLDER as files: timm's script as `slimclr_resnet20_050`, ours with that one width. Ours at width 1.0 alone and at four
widths say what the other widths cost. Augmentation, optimizer, schedule and batch are the same; seeds draw other
classifiers, orders and crops in each. Times hold the start of Python and a test after each epoch.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean, stdev

from measure import Report, Row, in_turns, make_parser, measured, parse, positive, setting
from PIL import Image

from slimclr_hub.data.sources import GARMENTS, read_embedded
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.runs.result import load

RECIPE = Path(__file__).parents[1] / 'recipes' / 'finetune.py'
NETWORK = 'slimclr_resnet20.mocov3_fashionmnist'
LR, DECAY, BATCH = '0.002', '0.05', '64'
# timm's script knows the models of a package only where that is imported.
RUN_TIMM = 'import runpy, sys, slimclr_hub; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'


@dataclass(frozen=True)
class Trained:
    """Seconds of a command, and the top-1 accuracy of one width at its end (%)."""

    seconds: float
    top1: float


def write_images(folder: Path) -> None:
    """Write the images of the package as PNG files, `SPLIT/CLASS/NUMBER.png`."""
    for split, named in (('train', 'train'), ('val', 'test')):
        for number, (pixels, label) in enumerate(zip(*read_embedded(named), strict=True)):
            path = folder / split / GARMENTS[label].replace('/', '-') / f'{number:05}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def run(command: Sequence[str]) -> float:
    """Run a command that must succeed, and return its seconds."""
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}')
    return time.perf_counter() - begun


def by_timm(script: Path, images: Path, output: Path, epochs: int, seeds: Iterator[int]) -> Trained:
    """Train the dense network of width 0.5 by timm's script."""
    seed = next(seeds)
    model = ['--model', 'slimclr_resnet20_050.mocov3_fashionmnist', '--pretrained', '--num-classes', '10']
    pixels = ['--img-size', '28', '--mean', *['0.286'] * 3, '--std', *['0.353'] * 3, '--crop-pct', '1']
    crops = ['--interpolation', 'bilinear', '--train-interpolation', 'bilinear', '--scale', '0.35', '1']
    labels = ['--color-jitter', '0.3', '--smoothing', '0.1']
    optimizer = ['--opt', 'adamw', '--lr', LR, '--weight-decay', DECAY, '--batch-size', BATCH]
    # With this prefix, which has the cosine begin after the warm-up, that comes on top of the epochs.
    schedule = ['--epochs', str(epochs - 1), '--warmup-epochs', '1', '--warmup-lr', '1e-8', '--warmup-prefix']
    schedule += ['--sched-on-updates', '--min-lr', '0']
    rest = ['--device', 'cpu', '--workers', '1', '--seed', str(seed), '--output', str(output)]
    name = f'timm-{seed}'
    command = [sys.executable, '-c', RUN_TIMM, str(script), '--data-dir', str(images), '--experiment', name]
    seconds = run([*command, *model, *pixels, *crops, *labels, *optimizer, *schedule, *rest])
    with (output / name / 'summary.csv').open(encoding='utf-8', newline='') as file:
        *_, last = csv.DictReader(file)
    return Trained(seconds, float(last['eval_top1']))


def by_us(widths: tuple[float, ...], images: Path, output: Path, epochs: int, seeds: Iterator[int]) -> Trained:
    """Train widths by recipes/finetune.py; the accuracy is that of the last of them."""
    seed = next(seeds)
    folder = output / f'{"-".join(map(str, widths))}-{seed}'
    start = ['--network', NETWORK, '--data.root', str(images), '--model.widths', str(list(widths))]
    optimizer = ['--optim.lr', LR, '--optim.weight_decay', DECAY, '--data.batch_size', BATCH]
    rest = ['--model.fit_head', 'false', '--data.num_workers', '1', '--run.precision', 'no', '--run.seed', str(seed)]
    epoch = ['--optim.epochs', str(epochs), '--run.output', str(folder)]
    seconds = run([sys.executable, str(RECIPE), *start, *optimizer, *rest, *epoch])
    (result,) = load(folder / 'result.json')
    return Trained(seconds, result.top1[widths[-1]])


def row(name: str, found: Sequence[Trained], reference: Sequence[Trained] | None) -> Row:
    top1 = [each.top1 for each in found]
    base = None if reference is None else [each.seconds for each in reference]
    accuracy: Row = {'top-1 (%)': mean(top1), 'sd': stdev(top1) if len(top1) > 1 else None}
    return {'training': name, **accuracy, **measured([each.seconds for each in found], 's', base)}


def main() -> None:
    parser = make_parser(__doc__, repeats=3, precision=False, device=False)
    parser.add_argument('script', type=Path, help="timm's train.py")
    parser.add_argument('folder', type=Path, help='folder for images and results, which is not there yet')
    parser.add_argument('--epochs', type=positive, default=5)
    args: argparse.Namespace = parse(parser)
    if args.epochs < 2:
        parser.error('argument --epochs: one is for the warm-up; give 2 or more')
    if not args.script.is_file():
        parser.error(f'there is no file {args.script}')
    args.folder.mkdir(parents=True)
    images = args.folder / 'images'
    write_images(images)
    ours = {
        'ours, width 0.5': (0.5,),
        'ours, width 1.0': (1.0,),
        'ours, four widths': DEFAULT_WIDTHS,
    }
    shared = (images, args.folder, args.epochs)
    cases: dict[str, Callable[[], Trained]] = {
        "timm's script, width 0.5": partial(by_timm, args.script, *shared, count()),
        **{name: partial(by_us, widths, *shared, count()) for name, widths in ours.items()},
    }
    found = in_turns(cases, args.repeats)
    timm, one = found["timm's script, width 0.5"], found['ours, width 1.0']
    report = Report(setting('cpu', 'float32', f'{args.epochs} epochs of 6,000 images, n = {args.repeats}'), args.json)
    rows = [row(name, trained, timm) for name, trained in list(found.items())[:2]]
    report.table('one width of 0.5; ratio: to the first row', rows)
    rows = [row(name, trained, one) for name, trained in list(found.items())[2:]]
    report.table('accuracy of the narrowest width; ratio: to the first row', rows)


if __name__ == '__main__':
    main()
