"""Inference of a slimmable network at each width, beside the dense network of that width that it replaces.

    python benchmarks/inference.py --batch 1 8 32
    python benchmarks/inference.py --batch 1 8 32 256 --bf16

`dense` is `model.extract(width)`, and `timm` is timm's own network, as wide as width 1. A ratio is the time over that
of `dense` at the same width. On the CPU freed memory is kept (`slimclr_hub.runs.memory`), since the allocator would
cause larger differences than those measured.
"""

import argparse
from collections.abc import Callable

import timm
import torch
from measure import Report, Row, autocast, interleave, keeps_memory, make_parser, parse, positive, setting, timed
from torch import nn

from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone

REFERENCE = 'dense'


def networks(args: argparse.Namespace) -> dict[tuple[float, str], nn.Module]:
    """Make the networks by width and name; the slimmable one is the same at all widths."""
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


def call(network: nn.Module, width: float, images: torch.Tensor, bf16: bool) -> Callable[[], object]:
    """A forward, at a width if the network has several."""

    def forward() -> object:
        with torch.inference_mode(), autocast(images.device, bf16):
            return network.forward_at(images, width) if isinstance(network, SlimmableResNet) else network(images)

    return forward


def measure(made: dict[tuple[float, str], nn.Module], batch: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one batch size."""
    memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
    images = torch.randn(batch, 3, args.size, args.size, device=args.device).contiguous(memory_format=memory_format)
    cases = {f'{width} {name}': call(network, width, images, args.bf16) for (width, name), network in made.items()}
    seconds = interleave(cases, args.repeats, device=args.device)
    rows = []
    for width, name in sorted(made, key=lambda case: -case[0]):
        labelled: Row = {'batch': batch, 'width': f'{width:g}', 'network': name}
        rows.append({**labelled, **timed(seconds[f'{width} {name}'], seconds[f'{width} {REFERENCE}'], batch)})
    return rows


def by_width(rows: list[Row]) -> list[Row]:
    """Ratios of the slimmable network: one row per width, one column per batch size."""
    found: dict[str, Row] = {}
    for row in rows:
        if row['network'] == 'slimmable':
            width = str(row['width'])
            found.setdefault(width, {'width': width})[f'batch {row["batch"]}'] = row['ratio']
    return list(found.values())


def main() -> None:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--batch', type=positive, nargs='+', default=[1, 8, 32])
    parser.add_argument('--width', type=float, nargs='+', help='only these; all by default')
    parser.add_argument('--size', type=positive, default=224, help='height and width of the images in pixels')
    parser.add_argument('--contiguous', action='store_true', help='channels first instead of channels last')
    args = parse(parser)
    made = networks(args)
    facts = ['channels first' if args.contiguous else 'channels last', f'{args.size}x{args.size}']
    if keeps_memory(args) and keep_freed_memory():
        facts.append('freed memory kept')
    report = Report(setting(args.device, 'bf16' if args.bf16 else 'float32', *facts), args.json)
    rows: list[Row] = []
    for batch in args.batch:
        measured = measure(made, batch, args)
        report.table(f'{args.model}, inference of a batch of {batch}; ratio of times to {REFERENCE}', measured)
        rows += measured
    report.table('time of the slimmable network over the dense one', by_width(rows))


if __name__ == '__main__':
    run_script(main)
