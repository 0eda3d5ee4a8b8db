"""Training step of SlimCLR at four widths over that of plain MoCo by the same code, and beside other code.

    python benchmarks/training_step.py --size 224 --batch 8
    python benchmarks/training_step.py --method mocov3 --size 64 --batch 16
    python benchmarks/training_step.py --size 224 --batch 8 --bf16

A step is what the training loop does with a batch that is there: forward, backward, norm of the gradients, means of the
log, optimizer. Beside it: forward and backward of timm's resnet50 on one view as the floor, and naive.py. All cases
share a process, so the memory which the trainer keeps (not with `--release-memory`) serves them all.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import timm
import torch
from measure import Report, autocast, interleave, make_parser, parse, positive, setting, timed
from naive import NaiveMoCoV2

from slimclr_hub.data import DataConfig
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.runs.meter import Meter
from slimclr_hub.train.config import MethodConfig, ModelConfig, OptimConfig, PretrainConfig, RunConfig
from slimclr_hub.train.setup import arrange, make_method, make_optimizer

FULL = (1.0,)
QUEUE = 65536
OPTIMIZERS = {
    'mocov2': OptimConfig(name='momentum', lr=0.01),
    'mocov3': OptimConfig(name='lars', lr=0.01, weight_decay=1e-6, filter_bias_and_bn=True),
}


class Trainer:
    """One kind of training step, on the same two views again and again."""

    def __init__(self, config: PretrainConfig, views: list[torch.Tensor], bf16: bool) -> None:
        self.method: Any = make_method(config)
        self.method.train().to(views[0].device)
        arrange(config, self.method)
        self.optimizer = make_optimizer(config.optim, self.method)
        self.trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.views = [view.contiguous(memory_format=layout) for view in views]
        self.meter = Meter()
        self.bf16 = bf16

    def step(self, widths: tuple[float, ...]) -> None:
        with autocast(self.views[0].device, self.bf16):
            output = self.method(self.views, widths, 0.999)
        output['loss'].backward()
        self.meter.add(output)
        self.meter.add({'grad_norm': self.norm()})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def parts(self) -> dict[str, Callable[[], object]]:
        """What a step does besides forward and backward, one by one."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        return {
            'momentum encoder': lambda: self.method.ema.update(0.999),
            'norm of the gradients': self.norm,
            'optimizer': self.optimizer.step,
        }


def naive(batch: int, views: list[torch.Tensor], precision: torch.dtype) -> Callable[[], None]:
    method = NaiveMoCoV2(DEFAULT_WIDTHS, QUEUE // batch * batch).train().to(views[0].device)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(views[0].device.type, enabled=precision == torch.float16)

    def step() -> None:
        lowered = precision != torch.float32
        with torch.autocast(views[0].device.type, precision if lowered else None, enabled=lowered):
            loss = method(views, 0.999)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def floor(view: torch.Tensor, bf16: bool) -> Callable[[], None]:
    model = timm.create_model('resnet50', num_classes=0).train().to(view.device)
    model.to(memory_format=torch.channels_last)
    view = view.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        with autocast(view.device, bf16):
            output = model(view)
        output.float().square().mean().backward()

    return step


def configure(args: Any, widths: tuple[float, ...], compile: bool = False) -> PretrainConfig:
    method = MethodConfig(name=args.method)
    if args.method == 'mocov2':
        method = method.replace(queue_size=QUEUE // args.batch * args.batch)
    data = DataConfig(
        size=args.size, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batch_size=args.batch, num_workers=0
    )
    return PretrainConfig(
        model=ModelConfig(name=args.model, widths=widths),
        method=method,
        data=data,
        optim=OPTIMIZERS[args.method],
        run=RunConfig(compile=compile),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--method', choices=OPTIMIZERS, default='mocov2')
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--size', type=positive, default=224, help='pixels of a side')
    parser.add_argument('--batch', type=positive, default=8)
    parser.add_argument('--compile', action='store_true', help='with run.compile')
    parser.add_argument('--release-memory', action='store_true', help='let freed memory go back to the system')
    args = parse(parser)
    kept = not args.release_memory and torch.device(args.device).type == 'cpu' and keep_freed_memory()

    views = [torch.randn(args.batch, 3, args.size, args.size, device=args.device) for _ in range(2)]
    plain = Trainer(configure(args, FULL, args.compile), views, args.bf16)
    slim = Trainer(configure(args, DEFAULT_WIDTHS, args.compile), views, args.bf16)
    cases: dict[str, Callable[[], object]] = {
        'resnet50 of timm, one view': floor(views[0], args.bf16),
        'plain, one width': lambda: plain.step(FULL),
        'slow start': lambda: slim.step(FULL),
        'four widths': lambda: slim.step(DEFAULT_WIDTHS),
    }
    if args.method == 'mocov2' and args.model == 'slimclr_resnet50':
        # The authors' own half precision is fp16, with a scaler, in which a CPU takes most of a minute for a step.
        lowered = torch.float16 if torch.device(args.device).type == 'cuda' else torch.bfloat16
        cases['naive, four widths'] = naive(args.batch, views, lowered if args.bf16 else torch.float32)

    report = Report(
        setting(
            args.device,
            'bf16' if args.bf16 else 'float32',
            f'{args.model}, {args.method}, batch {args.batch}, {args.size}x{args.size}',
            'freed memory kept' if kept else 'freed memory released',
        ),
        args.json,
    )
    seconds = interleave(cases, args.repeats, warmup=2, device=args.device)
    report.table(
        'training step; ratio to plain, one width',
        [
            {'step': name, **timed(values, seconds['plain, one width'], images=args.batch)}
            for name, values in seconds.items()
        ],
    )
    reference = seconds['four widths']
    others = {name: seconds[name] for name in seconds if name.startswith(('naive', 'resnet50'))}
    report.table(
        'over four widths',
        [{'step': name, **timed(values, reference)} for name, values in others.items()],
    )
    parts = interleave(slim.parts(), args.repeats, device=args.device)
    step = median(reference)
    report.table(
        'parts of the step at four widths',
        [
            {'part': name, **timed(values), 'share of the step (%)': 100 * median(values) / step}
            for name, values in parts.items()
        ],
    )


if __name__ == '__main__':
    main()
