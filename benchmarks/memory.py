"""Peak memory of training steps and of inference, by the batch and the size of the images.

    python benchmarks/memory.py --batch 4 8 --size 32 64
    python benchmarks/memory.py --model slimclr_resnet50 --batch 64 128 256 --size 224 --device cuda --bf16

Each figure is of a fresh process, above what it held after the imports: on CUDA of tensors, on the CPU of the whole
process, from /proc, where training keeps freed memory. `network` is what is held between steps: weights, key encoder,
queue, and the optimizer's momentum. Batches are measured at the first size, sizes at the first batch. A ratio is to the
first row of the same batch and size.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import (
    Report,
    Row,
    autocast,
    can_measure_memory,
    in_fresh_process,
    in_turns,
    keeps_memory,
    make_parser,
    measured,
    parse,
    peak_memory,
    positive,
    setting,
    synchronize,
)
from torch import nn
from training_step import TrainingStep, configure

from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone

TRAINING: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    'plain MoCo v2': ('mocov2', (1.0,), (1.0,)),
    'SlimCLR-MoCo v2, slow start': ('mocov2', DEFAULT_WIDTHS, (1.0,)),
    'SlimCLR-MoCo v2, four widths': ('mocov2', DEFAULT_WIDTHS, DEFAULT_WIDTHS),
    'SlimCLR-MoCo v3, four widths': ('mocov3', DEFAULT_WIDTHS, DEFAULT_WIDTHS),
}
"""Name -> method, widths of the network, widths that train in the step."""

STEPS = 2  # the first step allocates the momentum of the optimizer


def training(
    name: str, checkpointing: bool, model: str, batch: int, size: int, device: str, bf16: bool
) -> tuple[Callable[[], object], Callable[[], float]]:
    """Return a training step, and a function that returns MiB held between steps."""
    method, widths, trained = TRAINING[name]
    views = [torch.randn(batch, 3, size, size, device=device) for _ in range(2)]
    step = TrainingStep(configure(method, model, batch, size, widths), views, bf16)
    if checkpointing:
        step.method.backbone.set_grad_checkpointing()

    def held() -> float:
        states = (value for state in step.optimizer.state.values() for value in state.values())
        return tensors_of(step.method) + mebibytes(value for value in states if isinstance(value, torch.Tensor))

    return partial(step, trained), held


def inference(
    width: float, model: str, batch: int, size: int, device: str, bf16: bool
) -> tuple[Callable[[], object], Callable[[], float]]:
    """Return a forward at a width, and a function that returns MiB of the whole network."""
    network = make_backbone(ModelConfig(model), in_chans=3, num_classes=1000)
    network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def forward() -> object:
        with torch.inference_mode(), autocast(device, bf16):
            return network.forward_at(images, width)

    return forward, partial(tensors_of, network)


def tensors_of(module: nn.Module) -> float:
    return mebibytes(module.state_dict().values())


def mebibytes(tensors: Any) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def alone(asked: dict[str, Any]) -> dict[str, float] | None:
    """Measure peak and network in this process, in MiB; None if the device runs out of memory."""
    device = asked['device']
    torch.set_num_threads(asked.pop('threads'))
    if asked.pop('keep') and 'name' in asked:
        keep_freed_memory()
    # What libraries allocate at their first call is left out.
    nn.Conv2d(3, 8, 3, device=device)(torch.randn(1, 3, 8, 8, device=device)).sum().backward()
    make = training if 'name' in asked else inference
    try:
        with peak_memory(device) as peak:
            call, held = make(**asked)
            for _ in range(STEPS):
                call()
            synchronize(device)
            return {'peak': peak(), 'network': held()}
    except torch.OutOfMemoryError:
        return None


def rows_of(cases: dict[str, dict[str, Any]], labels: dict[str, Row], repeats: int) -> list[Row]:
    """Measure interleaved cases, each in fresh processes; the first is the reference."""
    found = in_turns({name: partial(in_fresh_process, __file__, **asked) for name, asked in cases.items()}, repeats)
    rows: list[Row] = []
    reference: list[float] | None = None
    for name, values in found.items():
        if any(value is None for value in values):
            rows.append({**labels[name], 'network (MiB)': None, 'peak (MiB)': 'out of memory'})
            continue
        peaks = [value['peak'] for value in values]
        reference = reference or peaks
        network: Row = {'network (MiB)': values[0]['network']}
        rows.append({**labels[name], **network, **measured(peaks, 'peak (MiB)', reference)})
    return rows


def main() -> None:
    parser = make_parser(__doc__, repeats=3, memory=True)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--batch', type=positive, nargs='+', default=[8, 16])
    parser.add_argument('--size', type=positive, nargs='+', default=[64, 96], help='of the images, in pixels')
    parser.add_argument('--only', choices=('training', 'inference'))
    parser.add_argument('--alone', type=json.loads, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.alone is not None:
        print(json.dumps(alone(args.alone)))
        return
    if not can_measure_memory(args.device):
        sys.exit('error: the memory of a process is measured from /proc/self/clear_refs, which is not here')
    make_backbone(ModelConfig(args.model, args={'device': 'meta'}), in_chans=3)  # checks the name

    report = Report(setting(args.device, 'bf16' if args.bf16 else 'float32', 'channels last', args.model), args.json)
    shared = {
        'model': args.model,
        'device': args.device,
        'bf16': args.bf16,
        'threads': torch.get_num_threads(),
        'keep': keeps_memory(args),
    }
    # Batches at the first size, sizes at the first batch.
    shapes = dict.fromkeys([(batch, args.size[0]) for batch in args.batch] + [(args.batch[0], s) for s in args.size])
    cases: dict[str, dict[str, Any]]
    labels: dict[str, Row]
    if args.only != 'inference':
        rows: list[Row] = []
        for batch, size in shapes:
            cases, labels = {}, {}
            for checkpointing in False, True:
                for name in TRAINING:
                    shape: dict[str, Any] = {'batch': batch, 'size': size}
                    case = f'{name} {checkpointing}'
                    labels[case] = {**shape, 'step': name, 'checkpointing': 'yes' if checkpointing else 'no'}
                    cases[case] = {'name': name, 'checkpointing': checkpointing, **shape, **shared}
            rows += rows_of(cases, labels, args.repeats)
        kept = 'kept' if shared['keep'] else 'released'
        report.table(f'peak memory of a training step, freed memory {kept}', rows)
    if args.only != 'training':
        rows = []
        for batch, size in shapes:
            cases = {f'{w:g}': {'width': w, 'batch': batch, 'size': size, **shared} for w in DEFAULT_WIDTHS}
            labels = {width: {'batch': batch, 'size': size, 'width': width} for width in cases}
            rows += rows_of(cases, labels, args.repeats)
        report.table('peak memory of inference, with all widths loaded', rows)


if __name__ == '__main__':
    run_script(main)
