"""Time to load a slimmable ResNet-50, beside what one would run instead, and memory to load one width of it.

    python benchmarks/loading.py

Times are medians of alternating runs in one process, memory is the peak of a fresh process above what it held before.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from slimclr_hub.models import SlimmableResNet

NAME = 'slimclr_resnet50'
RUNS = 15

MEMORY = """
import json, sys
import timm, slimclr_hub

name, path, kwargs = sys.argv[1:]

def status(field):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

def make():
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': path}, **json.loads(kwargs))

kept = make()  # imports and the allocator are no part of the answer
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')
before = status('VmRSS')
model = make()
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print((status('VmHWM') - before) / 2**20, size / 2**20)
"""


def medians(*calls: Callable[[], object]) -> list[float]:
    """Seconds that each call takes, turn by turn so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(RUNS):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def table(title: str, headers: list[str], rows: list[list[str]]) -> None:
    made = Table(title=title)
    for i, header in enumerate(headers):
        made.add_column(header, justify='right' if i else 'left')
    for row in rows:
        made.add_row(*row)
    Console().print(made)


def main() -> None:
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        model = timm.create_model(NAME)
        assert isinstance(model, SlimmableResNet)
        save_file(model.state_dict(), path)
        overlay = {'file': str(path)}
        names = [
            'safetensors load_file',
            'load_file and load_state_dict',
            'load_pretrained',
            'create_model, pretrained',
            'create_model, random weights',
        ]
        seconds = medians(
            lambda: load_file(path),
            lambda: model.load_state_dict(load_file(path)),
            lambda: model.load_pretrained(path),
            lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay),
            lambda: timm.create_model(NAME),
        )
        rows = [
            [name, f'{1000 * taken:.0f}', f'{taken / seconds[0]:.2f}']
            for name, taken in zip(names, seconds, strict=True)
        ]
        table(f'{NAME}, {path.stat().st_size / 1e6:.0f} MB', ['', 'ms', 'of load_file'], rows)

        if not Path('/proc/self/clear_refs').exists():
            return
        rows = []
        for name, kwargs in (
            (f'{NAME}_025', {}),
            (NAME, {'widths': (0.25,)}),
            (NAME, {'width': 0.25, 'lazy': True}),
            (NAME, {'width': 0.25}),
        ):
            command = [sys.executable, '-c', MEMORY, name, str(path), json.dumps(kwargs)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, size = map(float, printed.split())
            call = ', '.join([name, *(f'{key}={value}' for key, value in kwargs.items())])
            rows.append([call, f'{size:.1f}', f'{peak:.1f}', f'{peak / size:.2f}'])
        table('memory', ['', 'network (MiB)', 'peak (MiB)', 'ratio'], rows)


if __name__ == '__main__':
    main()
