"""Training step of SlimCLR-MoCo v2 at several widths over that of plain MoCo v2, by the same code.

    python benchmarks/training_step.py --model slimclr_resnet50 --size 64 --batch 16

Repetitions of the two alternate, so that a change of the machine's pace meets both; the table gives medians.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from rich.console import Console
from rich.table import Table

import slimclr_hub  # noqa: F401
from slimclr_hub.methods import MoCoV2
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet


def make_step(args: argparse.Namespace, widths: tuple[float, ...], trained: tuple[float, ...]) -> Callable[[], None]:
    backbone = timm.create_model(args.model, num_classes=0, widths=widths)
    assert isinstance(backbone, SlimmableResNet)
    method = MoCoV2(backbone, queue_size=args.batch * 16)
    method.to(memory_format=torch.channels_last).to(args.device).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    views = [
        torch.randn(args.batch, 3, args.size, args.size, device=args.device).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    ]

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = method(views, trained, momentum=0.999)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == 'cuda':
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--bf16', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    steps = {
        'plain MoCo v2, one width': make_step(args, (1.0,), (1.0,)),
        'SlimCLR, slow start': make_step(args, DEFAULT_WIDTHS, (1.0,)),
        'SlimCLR, four widths': make_step(args, DEFAULT_WIDTHS, DEFAULT_WIDTHS),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)

    hardware = torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    table = Table(
        title=f'{args.model}, batch {args.batch}, {args.size}x{args.size}, {"bf16" if args.bf16 else "float32"}, '
        f'{hardware}, torch {torch.__version__}, Python {platform.python_version()}'
    )
    for column in 'training step', 'median (ms)', 'min (ms)', 'max (ms)', 'ratio':
        table.add_column(column, justify='left' if column == 'training step' else 'right')
    base = statistics.median(times['plain MoCo v2, one width'])
    for name, values in times.items():
        median = statistics.median(values)
        cells = [f'{1000 * value:.0f}' for value in (median, min(values), max(values))]
        table.add_row(name, *cells, f'{median / base:.2f}')
    Console(width=100).print(table)


if __name__ == '__main__':
    main()
