"""Images per second that data loading delivers to training, by number of workers and by view backend.

    python benchmarks/data_pipeline.py --workers 0 1 2
    python benchmarks/data_pipeline.py --source photos --images 2048 --batch 256 --workers 4 8 16 --device cuda

Two views of every image are put on the device: of the embedded images by MoCo v2's recipe for them, and of synthetic
JPEG photos of 500x375 at ImageNet's 224 by that for ImageNet. `cpu` views are computed by the workers, `kornia` views
by the device. Backends are interleaved, and a ratio is the time over that of cpu. Nothing is trained meanwhile, which
on a CPU would take the workers' cores.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from measure import Report, Row, interleave, make_parser, parse, positive, setting, timed
from photos import HEIGHT, WIDTH, make_photos

from slimclr_hub.data.indexed import IndexedFeed
from slimclr_hub.data.training import TrainData
from slimclr_hub.data.views import BACKENDS
from slimclr_hub.errors import InputError
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.train.command import load_recipe
from slimclr_hub.train.config import PretrainConfig

RECIPES = Path(__file__).parents[1] / 'recipes' / 'configs'
EMBEDDED = RECIPES / 'mocov2_resnet20_fashionmnist6k.yaml'
PHOTOS = RECIPES / 'mocov2_resnet50_imagenet_200e.yaml'
REFERENCE = 'cpu'


def reader(config: PretrainConfig, steps: int, device: str) -> Callable[[], None]:
    """Make a call that reads the last `steps` batches of an epoch, of another epoch each time."""
    data = TrainData(config.data, config.views, config.second_views, seed=0, device=device)
    if data.steps_per_epoch < steps:
        raise InputError(f'--images: there are no more than {data.steps_per_epoch * config.data.batch_size}')
    # Reading ahead would load batches of one case in the time of another.
    assert isinstance(data.feed, IndexedFeed)
    data.feed.batches.ahead = False
    epochs = count()

    def read() -> None:
        for _ in data.epoch(next(epochs), data.steps_per_epoch - steps):
            pass

    return read


def measure(config: PretrainConfig, workers: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one source and number of workers."""
    steps = max(args.images // args.batch, 1)
    cases: dict[str, Callable[[], None]] = {}
    for backend in args.backend:
        data = replace(config.data, batch_size=args.batch, num_workers=workers)
        changed = replace(config, data=data, views=replace(config.views, backend=backend))
        cases[backend] = reader(changed, steps, args.device)
    # The first call starts the workers, which stay.
    seconds = interleave(cases, args.repeats, device=args.device)
    images = steps * args.batch
    rows: list[Row] = []
    for backend in cases:
        row: Row = {'workers': workers, 'views': backend, **timed(seconds[backend], seconds.get(REFERENCE), images)}
        speed = row['images/s']
        assert isinstance(speed, float)
        rows.append({**row, 'images/s per worker': speed / workers if workers else None})
    return rows


def measure_all(report: Report, title: str, config: PretrainConfig, args: argparse.Namespace) -> None:
    # One by one, so that the workers of one case have ended before the next case.
    rows = [row for workers in args.workers for row in measure(config, workers, args)]
    report.table(f'{title}; a call reads {max(args.images // args.batch, 1) * args.batch} images', rows)


def whole_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{value} is not 0 or more')
    return value


def main() -> None:
    parser = make_parser(__doc__, repeats=5, precision=False)
    parser.add_argument('--source', choices=('embedded', 'photos'), nargs='+', default=['embedded', 'photos'])
    parser.add_argument('--workers', type=whole_number, nargs='+', default=[0, 1, 2])
    parser.add_argument('--backend', choices=BACKENDS, nargs='+', default=list(BACKENDS))
    parser.add_argument('--images', type=positive, default=256, help='images that a call reads, in whole batches')
    parser.add_argument('--batch', type=positive, default=64)
    args = parse(parser)

    report = Report(setting(args.device, '2 views an image', f'batch {args.batch}'), args.json)
    measures = {'embedded': partial(embedded, report, args), 'photos': partial(photos, report, args)}
    for source in args.source:
        measures[source]()


def embedded(report: Report, args: argparse.Namespace) -> None:
    config = load_recipe(EMBEDDED)
    measure_all(report, f'embedded Fashion-MNIST, views of {config.views.size}x{config.views.size}', config, args)


def photos(report: Report, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = make_photos(Path(folder), max(args.images // args.batch, 1) * args.batch)
        config = load_recipe(PHOTOS)
        config = replace(
            config,
            data=replace(config.data, root=folder, batch_size=args.batch),
            # A queue has to be a multiple of the batch; there is none here.
            method=config.method.replace(queue_size=0),
        )
        title = f'JPEG photos of {WIDTH}x{HEIGHT}, {size:.0f} kB, views of {config.data.size}x{config.data.size}'
        measure_all(report, title, config, args)


if __name__ == '__main__':
    run_script(main)
