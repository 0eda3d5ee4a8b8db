"""Time to load a slimmable ResNet-50 and its alternatives, and memory to load one width of it.

    python benchmarks/loading.py

Times are of interleaved calls in one process, with the file in the page cache; memory is the peak of a fresh process
above what it held before.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from measure import (
    Report,
    Row,
    can_measure_memory,
    in_fresh_process,
    in_turns,
    interleave,
    make_parser,
    measured,
    parse,
    peak_memory,
    positive,
    setting,
    timed,
)
from safetensors.torch import load_file, save_file
from torch import nn

from slimclr_hub.models import SlimmableResNet

NAME = 'slimclr_resnet50'
REFERENCE = 'safetensors load_file'


def create(name: str, path: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': path}, **kwargs)


def alone(name: str, path: str, kwargs: dict[str, Any]) -> tuple[float, float]:
    """Measure the network and the peak in this process, in MiB."""
    kept = create(name, path, **kwargs)  # leaves out imports and the allocator
    with peak_memory() as peak:
        model = create(name, path, **kwargs)
        del kept  # not before, since the second network would take its memory
        return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20, peak()


def time_loading(report: Report, path: Path, repeats: int) -> None:
    model = timm.create_model(NAME)
    assert isinstance(model, SlimmableResNet)
    save_file(model.state_dict(), path)
    cases: dict[str, Callable[[], object]] = {
        REFERENCE: lambda: load_file(path),
        'load_file and load_state_dict': lambda: model.load_state_dict(load_file(path)),
        'load_pretrained': lambda: model.load_pretrained(path),
        'create_model, pretrained': lambda: create(NAME, str(path)),
        'create_model, random weights': lambda: timm.create_model(NAME),
    }
    seconds = interleave(cases, repeats)
    rows: list[Row] = [{'call': name, **timed(seconds[name], seconds[REFERENCE])} for name in cases]
    report.table(f'{NAME}, {path.stat().st_size / 1e6:.0f} MB; ratio to load_file', rows)


def measure_memory(report: Report, path: Path, repeats: int) -> None:
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    choices: tuple[tuple[str, dict[str, Any]], ...] = (
        (f'{NAME}_025', {}),
        (NAME, {'widths': (0.25,)}),
        (NAME, {'width': 0.25, 'lazy': True}),
        (NAME, {'width': 0.25}),
    )
    for name, kwargs in choices:
        cases[', '.join([name, *(f'{key}={value}' for key, value in kwargs.items())])] = (name, kwargs)

    found = in_turns(
        {
            call: partial(in_fresh_process, __file__, name=name, path=str(path), kwargs=kwargs)
            for call, (name, kwargs) in cases.items()
        },
        repeats,
    )
    rows: list[Row] = []
    for call, values in found.items():
        sizes, peaks = zip(*values, strict=True)
        rows.append({'call': call, 'network (MiB)': sizes[0], **measured(peaks, 'peak (MiB)', sizes)})
    report.table('memory; ratio of the peak to the network', rows)


def main() -> None:
    parser = make_parser(__doc__, repeats=15, precision=False, device=False)
    parser.add_argument('--memory-repeats', type=positive, default=3, help='fresh processes of each case')
    parser.add_argument('--alone', type=json.loads, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.alone is not None:
        print(json.dumps(alone(**args.alone)))
        return
    report = Report(setting('cpu'), args.json)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        time_loading(report, path, args.repeats)
        if can_measure_memory():
            measure_memory(report, path, args.memory_repeats)


if __name__ == '__main__':
    main()
