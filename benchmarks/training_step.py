"""Training step of SlimCLR at four widths over that of plain MoCo by the same code, and beside other code.

    python benchmarks/training_step.py --size 224 --batch 8
    python benchmarks/training_step.py --method mocov3 --size 64 --batch 16
    python benchmarks/training_step.py --size 224 --batch 8 --bf16

A step is what training does with a batch that is on the device: forward, backward, norm of the gradients, means of the
log, optimizer. Beside it: forward and backward of timm's resnet50 on one view as the floor, and naive.py. All cases
share a process, so the freed memory that training keeps (not with `--release-memory`) serves them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from measure import Report, autocast, interleave, keeps_memory, make_parser, parse, positive, setting, timed
from naive import NaiveMoCoV2

from slimclr_hub.data import DataConfig
from slimclr_hub.data.batches import Batch
from slimclr_hub.methods import Teacher
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.runs.meter import Meter
from slimclr_hub.train.config import MethodConfig, ModelConfig, OptimConfig, PretrainConfig
from slimclr_hub.train.setup import arrange, make_method, make_optimizer
from slimclr_hub.train.step import forward_backward

FULL = (1.0,)
QUEUE = 65536
OPTIMIZERS = {
    'mocov2': OptimConfig(name='momentum', lr=0.01),
    'mocov3': OptimConfig(name='lars', lr=0.01, weight_decay=1e-6, filter_bias_and_bn=True),
}


class TrainingStep:
    """Training steps of one configuration, always on the same views, and `features` where the teacher looks once."""

    def __init__(
        self,
        config: PretrainConfig,
        views: Sequence[torch.Tensor],
        bf16: bool,
        teacher: Teacher | None = None,
        features: Sequence[torch.Tensor] = (),
    ) -> None:
        device = views[0].device
        self.method: Any = make_method(config, teacher)
        self.method.train().to(device)
        arrange(config, self.method)
        self.optimizer = make_optimizer(config.optim, self.method)
        self.trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
        labels = torch.full([len(views[0])], -1, device=device)
        placed = tuple(view.contiguous(memory_format=layout) for view in views)
        self.batch = Batch(placed, labels, features=tuple(features))
        self.meter = Meter()
        self.autocast = partial(autocast, device, bf16)

    def __call__(self, widths: tuple[float, ...] = DEFAULT_WIDTHS) -> None:
        (output,) = forward_backward(self.method, [self.batch], widths, 0.999, autocast=self.autocast)
        self.meter.add(output)
        self.meter.add({'grad_norm': self.norm()})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step besides forward and backward."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        return {
            'momentum encoder': partial(self.method.update_key_encoder, 0.999),
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


def configure(
    method: str, model: str, batch: int, size: int, widths: tuple[float, ...], compiled: bool = False
) -> PretrainConfig:
    queue: dict[str, Any] = {'queue_size': QUEUE // batch * batch} if method == 'mocov2' else {}
    config = PretrainConfig(
        model=ModelConfig(name=model, widths=widths),
        method=MethodConfig(name=method, **queue),
        data=DataConfig(
            size=size, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batch_size=batch, num_workers=0
        ),
        optim=OPTIMIZERS[method],
    )
    return replace(config, run=replace(config.run, compile=compiled))


def main() -> None:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument('--method', choices=OPTIMIZERS, default='mocov2')
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--size', type=positive, default=224, help='height and width of the images in pixels')
    parser.add_argument('--batch', type=positive, default=8)
    parser.add_argument('--compile', action='store_true', help='with run.compile')
    args = parse(parser)
    kept = keeps_memory(args) and keep_freed_memory()

    views = [torch.randn(args.batch, 3, args.size, args.size, device=args.device) for _ in range(2)]
    configured = partial(configure, args.method, args.model, args.batch, args.size, compiled=args.compile)
    plain = TrainingStep(configured(FULL), views, args.bf16)
    slim = TrainingStep(configured(DEFAULT_WIDTHS), views, args.bf16)
    cases: dict[str, Callable[[], object]] = {
        'resnet50 of timm, one view': floor(views[0], args.bf16),
        'plain, one width': partial(plain, FULL),
        'slow start': partial(slim, FULL),
        'four widths': slim,
    }
    if args.method == 'mocov2' and args.model == 'slimclr_resnet50':
        # The authors' half precision is fp16 with a scaler; on a CPU such a step takes most of a minute.
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
    plain_seconds, slim_seconds = seconds['plain, one width'], seconds['four widths']
    rows = [{'step': name, **timed(values, plain_seconds, args.batch)} for name, values in seconds.items()]
    report.table('training step; ratio to plain, one width', rows)
    others = {name: values for name, values in seconds.items() if name.startswith(('naive', 'resnet50'))}
    report.table('over four widths', [{'step': name, **timed(each, slim_seconds)} for name, each in others.items()])
    parts = interleave(slim.parts(), args.repeats, device=args.device)
    step = median(slim_seconds)
    rows = [
        {'part': name, **timed(values), 'share of the step (%)': 100 * median(values) / step}
        for name, values in parts.items()
    ]
    report.table('parts of the step at four widths', rows)


if __name__ == '__main__':
    main()
