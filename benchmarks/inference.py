"""Inference of a slimmable network at each width, beside the dense network of that width that it replaces.

    python benchmarks/inference.py --batch 1 8 32
    python benchmarks/inference.py --batch 1 8 32 256 --compile --bf16

`dense` is `model.extract(width)`, and `timm` is timm's own network, which is as wide as width 1. All of a batch take
turns. A ratio is the time over that of `dense` at the same width, eager or compiled as it is itself. On the CPU freed
memory is kept (`slimclr_hub.runs.memory`), or the allocator's whims are larger than what is looked for.
"""

import argparse
from collections.abc import Callable

import timm
import torch
from measure import Report, Row, autocast, interleave, make_parser, parse, positive, setting, timed
from torch import nn

from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone

Case = tuple[float, str, str]
"""Width, network, and eager or compile."""

REFERENCE = 'dense'
KEPT = {True: ('freed memory kept',), False: ()}


def networks(args: argparse.Namespace) -> dict[tuple[float, str], nn.Module]:
    """Width and name -> network; the slimmable one is the same at all widths."""
    model = make_backbone(ModelConfig(args.model), in_chans=3, num_classes=1000)
    made: dict[tuple[float, str], nn.Module] = {}
    for width in args.width or model.widths:
        made[width, 'slimmable'] = model
        made[width, REFERENCE] = model.extract(width)
    if (1.0, REFERENCE) in made and timm.is_model(name := args.model.removeprefix('slimclr_')):
        made[1.0, 'timm'] = timm.create_model(name)
    memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
    for network in made.values():
        network.eval().to(args.device, memory_format=memory_format)  # type: ignore[call-overload]
    return made


def call(network: nn.Module, width: float, mode: str, images: torch.Tensor, bf16: bool) -> Callable[[], object]:
    """What is timed: a forward, at a width if the network has several."""
    forward: Callable[[torch.Tensor], object] = network
    if isinstance(network, SlimmableResNet):
        forward = lambda images: network.forward_at(images, width)  # noqa: E731
    if mode == 'compile':
        # One shape for each, as a service would have it; a second batch size would make the graph's shapes dynamic.
        forward = torch.compile(forward, dynamic=False)

    def run() -> object:
        with torch.inference_mode(), autocast(images.device, bf16):
            return forward(images)

    return run


def measure(made: dict[tuple[float, str], nn.Module], batch: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one batch size."""
    torch.compiler.reset()  # each case of an earlier batch would count towards the limit of recompilations
    memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
    images = torch.randn(batch, 3, args.size, args.size, device=args.device).contiguous(memory_format=memory_format)
    modes = ['eager', 'compile'] if args.compile else ['eager']
    cases: dict[Case, Callable[[], object]] = {
        (width, name, mode): call(network, width, mode, images, args.bf16)
        for (width, name), network in made.items()
        for mode in modes
    }
    labels = {' '.join(map(str, case)): case for case in cases}
    seconds = interleave({label: cases[case] for label, case in labels.items()}, args.repeats, device=args.device)
    rows = []
    for label, (width, name, mode) in sorted(labels.items(), key=lambda item: (-item[1][0], item[1][2] != 'eager')):
        reference = seconds[f'{width} {REFERENCE} {mode}']
        labelled: Row = {'batch': batch, 'width': f'{width:g}', 'network': name, 'mode': mode}
        rows.append({**labelled, **timed(seconds[label], reference, batch)})
    return rows


def by_width(rows: list[Row], mode: str) -> list[Row]:
    """The ratios of the slimmable network alone: a row for each width, a column for each batch size."""
    found: dict[str, Row] = {}
    for row in rows:
        if row['network'] == 'slimmable' and row['mode'] == mode:
            width = str(row['width'])
            found.setdefault(width, {'width': width})[f'batch {row["batch"]}'] = row['ratio']
    return list(found.values())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--batch', type=positive, nargs='+', default=[1, 8, 32])
    parser.add_argument('--width', type=float, nargs='+', help='only these; all unless given')
    parser.add_argument('--size', type=positive, default=224, help='height and width of the images in pixels')
    parser.add_argument('--compile', action='store_true', help='under torch.compile, too')
    parser.add_argument('--contiguous', action='store_true', help='channels first instead of channels last')
    parser.add_argument('--release-memory', action='store_true', help='do not keep freed memory')
    args = parse(parser)
    made = networks(args)
    kept = not args.release_memory and torch.device(args.device).type == 'cpu' and keep_freed_memory()

    layout = 'channels first' if args.contiguous else 'channels last'
    about = setting(args.device, 'bf16' if args.bf16 else 'float32', layout, f'{args.size}x{args.size}', *KEPT[kept])
    report = Report(about, args.json)
    rows: list[Row] = []
    for batch in args.batch:
        measured = measure(made, batch, args)
        report.table(
            f'{args.model}, inference of a batch of {batch}; ratio of the time to that of {REFERENCE}', measured
        )
        rows += measured
    for mode in ('eager', 'compile') if args.compile else ('eager',):
        report.table(f'time of the slimmable network over the dense one, {mode}', by_width(rows, mode))


if __name__ == '__main__':
    run_script(main)
