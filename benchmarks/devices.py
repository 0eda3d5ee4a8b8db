"""Exported networks in their runtimes, beside PyTorch in eager mode, one image at a time on the CPU.

    python benchmarks/devices.py --width 1 0.25
    python benchmarks/devices.py --width 1 0.25 --int8

All cases are interleaved, on the same threads. A ratio is the time over that of `torch`, which is the slimmable network
at the same width. Files are written first, which takes minutes; weights are random, and so are the images that int8 is
calibrated with, as neither changes the time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from measure import Report, Row, interleave, make_parser, parse, positive, setting, timed

from slimclr_hub.hub.export import FORMATS, Calibration, Exported, export_network
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import width_key
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone

REFERENCE = 'torch'
Call = Callable[[], object]


def open_onnx(file: Exported, images: torch.Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.path, options, providers=['CPUExecutionProvider'])
    inputs = {'pixel_values': images.numpy()}
    return lambda: session.run(None, inputs)


def open_openvino(file: Exported, images: torch.Tensor) -> Call:
    import openvino

    options = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}
    network = openvino.Core().compile_model(file.path, 'CPU', options)
    inputs: numpy.ndarray = images.numpy()
    return lambda: network(inputs)


def open_executorch(file: Exported, images: torch.Tensor) -> Call:
    from executorch.runtime import Runtime

    assert file.width is not None
    method = Runtime.get().load_program(file.path).load_method(width_key(file.width))
    return lambda: method.execute([images])


OPENERS: dict[str, Callable[[Exported, torch.Tensor], Call]] = {
    'onnx': open_onnx,
    'openvino': open_openvino,
    'executorch': open_executorch,
}


def call(model: SlimmableResNet, width: float, images: torch.Tensor) -> Call:
    """A forward of PyTorch."""

    def forward() -> object:
        with torch.inference_mode():
            return model.forward_at(images, width)

    return forward


def main() -> None:
    parser = make_parser(__doc__, precision=False, device=False)
    parser.add_argument('--model', default='slimclr_resnet50')
    parser.add_argument('--width', type=float, nargs='+', help='only these; all by default')
    parser.add_argument('--size', type=positive, default=224, help='height and width of the images in pixels')
    parser.add_argument('--format', nargs='+', choices=[*OPENERS], default=[*OPENERS])
    parser.add_argument('--int8', action='store_true')
    args = parse(parser)
    kind = 'int8' if args.int8 else 'float32'
    report = Report(setting('cpu', kind, f'{args.size}x{args.size}', 'batch 1'), args.json)
    model = make_backbone(ModelConfig(args.model), in_chans=3, num_classes=1000).eval()
    with tempfile.TemporaryDirectory() as folder:
        cases, openings = opened(model, Path(folder), args)
        seconds = interleave({f'{width} {name}': run for (width, name), run in cases.items()}, args.repeats)
    rows = []
    for width, name in cases:
        labelled: Row = {'width': f'{width:g}', 'runtime': name, 'to open (ms)': openings.get((width, name))}
        rows.append({**labelled, **timed(seconds[f'{width} {name}'], seconds[f'{width} {REFERENCE}'])})
    report.table(f'{args.model}, {kind}; ratio of times to {REFERENCE}, which is float32', rows)


def opened(
    model: SlimmableResNet, folder: Path, args: argparse.Namespace
) -> tuple[dict[tuple[float, str], Call], dict[tuple[float, str], float]]:
    """Export and open: cases by width and runtime, and the milliseconds that opening took."""
    images = torch.randn(1, model.in_chans, args.size, args.size)
    others = torch.randn(32, model.in_chans, args.size, args.size)
    calibration = Calibration(others[:16], others[16:], least=-1) if args.int8 else None
    widths = args.width or model.widths
    cases: dict[tuple[float, str], Call] = {(width, REFERENCE): call(model, width, images) for width in widths}
    openings = {}
    for format in args.format:
        assert format in FORMATS
        for file in export_network(model, folder, format, size=args.size, widths=widths, calibration=calibration):
            assert file.width is not None
            begun = time.perf_counter()
            cases[file.width, format] = OPENERS[format](file, images)
            openings[file.width, format] = 1000 * (time.perf_counter() - begun)
    return dict(sorted(cases.items(), key=lambda case: -case[0][0])), openings


if __name__ == '__main__':
    run_script(main)
