"""Training steps with a frozen teacher, for one width and for four, over one of plain MoCo v2 at one width.

    python benchmarks/teacher.py --student slimclr_resnet18 --teacher slimclr_resnet50 --size 64 --batch 16 --queue 4096

A step is that of training_step.py. The teacher has random weights and looks once at a view, whatever the number of
widths, or with teacher.cached not at all. Its projection head, which the papers keep, has the 128 dimensions of plain
MoCo v2's; with `--pooled` its features are learned, and those of a ResNet-50 make queues of 2048.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from measure import Report, interleave, keeps_memory, make_parser, parse, positive, setting, timed
from training_step import FULL, QUEUE, TrainingStep, configure

from slimclr_hub.methods import METHODS, Teacher
from slimclr_hub.methods.heads import SlimmableMLP
from slimclr_hub.methods.registry import training_of
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.runs.memory import keep_freed_memory
from slimclr_hub.train.config import MethodConfig, TeacherConfig

TAUGHT = [name for name in METHODS if training_of(name).teacher]


def make_teacher(name: str, pooled: bool) -> Teacher:
    network = timm.create_model(name, num_classes=0, widths=FULL)
    assert isinstance(network, SlimmableResNet)
    features = network.num_features
    head = None if pooled else SlimmableMLP(features, features, 128).extract(1.0)
    return Teacher(network.extract(1.0), features if pooled else 128, head=head)


def main() -> None:
    parser = make_parser(__doc__, memory=True)
    parser.add_argument('--student', default='slimclr_resnet18')
    parser.add_argument('--teacher', default='slimclr_resnet50')
    parser.add_argument('--size', type=positive, default=224, help='height and width of the images in pixels')
    parser.add_argument('--batch', type=positive, default=8)
    parser.add_argument('--queue', type=positive, default=QUEUE)
    parser.add_argument('--pooled', action='store_true', help="the teacher's pooled features, without its head")
    args = parse(parser)
    kept = keeps_memory(args) and keep_freed_memory()

    views = [torch.randn(args.batch, 3, args.size, args.size, device=args.device) for _ in range(4)]
    teacher: Any = make_teacher(args.teacher, args.pooled)
    teacher.to(device=args.device, memory_format=torch.channels_last)
    queue = args.queue // args.batch * args.batch
    plain = configure('mocov2', args.student, args.batch, args.size, FULL)
    plain = replace(plain, method=plain.method.replace(queue_size=queue))
    slimclr = replace(plain, model=replace(plain.model, widths=DEFAULT_WIDTHS))
    without = TrainingStep(plain, views[:2], args.bf16)
    keys = torch.nn.functional.normalize(torch.randn(args.batch, 128, device=args.device), dim=1)
    without.method.encode_keys = lambda view: keys
    cases: dict[str, Callable[[], object]] = {
        'plain MoCo v2, one width': partial(TrainingStep(plain, views[:2], args.bf16), FULL),
        'plain MoCo v2 without the forward of its keys': partial(without, FULL),
        'SlimCLR on MoCo v2, four widths': partial(TrainingStep(slimclr, views[:2], args.bf16), DEFAULT_WIDTHS),
        'forward of the teacher': partial(teacher, views[0].contiguous(memory_format=torch.channels_last)),
    }
    for name in TAUGHT:
        # Each with the queue of plain MoCo v2, so that what differs is the method.
        neighbours = training_of(name).neighbours is not None
        method = MethodConfig(name, queue_size=queue, cross_after=0 if neighbours else None)
        shown = views if neighbours else views[: training_of(name).views]
        for widths, words in (FULL, 'one width'), (DEFAULT_WIDTHS, 'four widths'):
            config = replace(
                plain,
                model=replace(plain.model, widths=widths),
                method=method,
                teacher=TeacherConfig(args.teacher),
            )
            cases[f'{name}, {words}'] = partial(TrainingStep(config, shown, args.bf16, teacher), widths)
            if widths == FULL:
                known = [teacher.features(view) for view in views[: 1 + neighbours]]
                config = replace(config, teacher=TeacherConfig(args.teacher, cached=True))
                step = TrainingStep(config, views[: config.view_count * len(known)], args.bf16, teacher, known)
                cases[f'{name}, {words}, cached'] = partial(step, widths)

    report = Report(
        setting(
            args.device,
            'bf16' if args.bf16 else 'float32',
            f'{args.student} of {args.teacher}, {teacher.dim} dimensions, batch {args.batch}, {args.size}x{args.size}',
            f'queue {queue}',
            'freed memory kept' if kept else 'freed memory released',
        ),
        args.json,
    )
    seconds = interleave(cases, args.repeats, warmup=2, device=args.device)
    base = seconds['plain MoCo v2, one width']
    rows = [{'step': name, **timed(values, base, args.batch)} for name, values in seconds.items()]
    report.table('training step with a teacher; ratio to plain MoCo v2, one width', rows)
    rows = [
        {'method': name, **timed(seconds[f'{name}, four widths'], seconds[f'{name}, one width'])} for name in TAUGHT
    ]
    report.table('four widths at once; ratio to one', rows)
    base = seconds['plain MoCo v2 without the forward of its keys']
    rows = [{'method': name, **timed(seconds[f'{name}, one width, cached'], base)} for name in TAUGHT]
    report.table('teacher.cached, one width; ratio to plain MoCo v2 without the forward of its keys', rows)


if __name__ == '__main__':
    main()
