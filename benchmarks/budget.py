"""How often a network that was chosen by `max_ms` keeps within it, in a fresh process.

    python benchmarks/budget.py
    python benchmarks/budget.py --model slimclr_resnet50 --size 224

The times of all widths are measured first, as `slimclr-hub latency` does. For a budget of each width's slowest repeat,
a fresh process then opens the network with `max_ms`, and times batches of one image.
"""

import json
import time

import timm
import torch
from measure import Report, Row, in_fresh_process, make_parser, parse, positive, setting

from slimclr_hub.inference.latency import measure
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.budget import Setting, table_path
from slimclr_hub.runs.command_line import run_script


def kept(name: str, max_ms: float, size: int, threads: int, batches: int) -> tuple[float, int]:
    """The width chosen, and the number of batches of one image that took at most `max_ms`."""
    torch.set_num_threads(threads)
    overlay = {'input_size': (3, size, size)}
    model = timm.create_model(name, max_ms=max_ms, pretrained_cfg_overlay=overlay).eval()
    assert isinstance(model, SlimmableResNet)
    images = torch.randn(1, 3, size, size)
    within = 0
    with torch.inference_mode():
        for batch in range(batches + 3):  # the first are slower, as where the table was measured
            start = time.perf_counter()
            model(images)
            within += batch >= 3 and 1000 * (time.perf_counter() - start) <= max_ms
    return model.width, within


def main() -> None:
    parser = make_parser(__doc__, repeats=50, precision=False, device=False)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--size', type=positive, default=224)
    parser.add_argument('--batches', type=positive, default=40, help='timed in each fresh process')
    parser.add_argument('--alone', help='a budget to be measured in this process')
    args = parse(parser)
    threads = torch.get_num_threads()
    if args.alone:
        print(json.dumps(kept(args.model, json.loads(args.alone)['max_ms'], args.size, threads, args.batches)))
        return
    model = timm.create_model(args.model).eval()
    assert isinstance(model, SlimmableResNet)
    table = measure(model, [Setting(args.size, threads=threads)], args.repeats)
    table.save(table_path(model))
    report = Report(
        setting('cpu', 'float32', args.model, f'{args.size}x{args.size}', f'{args.repeats} repeats'), args.json
    )
    rows: list[Row] = []
    for timing in sorted(table.timings, key=lambda timing: timing.slowest):
        numbers = {'--size': args.size, '--threads': threads, '--batches': args.batches}
        arguments = [word for pair in numbers.items() for word in map(str, pair)]
        width, within = in_fresh_process(__file__, '--model', args.model, *arguments, max_ms=timing.slowest)
        shares = {'width': f'{width:g}', 'within (%)': 100 * within / args.batches}
        rows.append({'max_ms': timing.slowest, 'median (ms)': timing.median, **shares})
    report.table(f'Batches of one image within the budget, of {args.batches}', rows)


if __name__ == '__main__':
    run_script(main)
