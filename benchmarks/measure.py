"""Shared parts of the benchmarks: interleaved timing, ratios, memory of a fresh process, tables and their JSON.

The speed of a machine varies, above all of a shared one. So all cases are interleaved in each repetition, and a ratio
is the median of the ratios within repetitions, in which the speed of the moment cancels.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slimclr_hub.machine import processor
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.turns import in_turns as in_turns
from slimclr_hub.runs.turns import seconds_of
from slimclr_hub.runs.turns import synchronize as synchronize

Row = dict[str, str | float | None]
"""A row of a table: column -> text, number, or None."""

_MOMENT = 0.01  # seconds; of shorter calls several are timed at once
_LONG = 1.0  # seconds; a longer call is not timed again to learn its length
_PROC = Path('/proc/self')


# Timing


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = 'cpu',
) -> dict[str, list[float]]:
    """Time each case once in each of `repeats` repetitions; seconds of a call.

    Args:
        cases: Calls by name.
        repeats: Repetitions.
        warmup: Calls of each case before, which do not count. With 0, for long calls, short ones are not detected.
        device: Device to synchronise before and after each measurement.
    """
    counts = {name: _count(call, warmup, device) for name, call in cases.items()}
    return in_turns({name: partial(seconds_of, call, counts[name], device) for name, call in cases.items()}, repeats)


def _count(call: Callable[[], object], warmup: int, device: torch.device | str) -> int:
    """Warm up, and return how many calls take a moment, at least 1."""
    seconds = [seconds_of(call, device=device) for _ in range(warmup)]
    if seconds and seconds[-1] < _LONG:
        # The first call is slower.
        seconds.append(seconds_of(call, device=device))
    return int(_MOMENT / seconds[-1]) + 1 if seconds else 1


def spread(values: Sequence[float]) -> float | None:
    """Interquartile range in percent of the median; None for a single value."""
    if len(values) < 2:
        return None
    first, middle, third = quantiles(values, n=4, method='inclusive')
    return 100 * (third - first) / middle


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratio within each repetition."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def measured(values: Sequence[float], column: str, reference: Sequence[float] | None = None) -> Row:
    """Columns with median and spread of values, and of their ratios to a reference."""
    return {column: median(values), 'IQR (%)': spread(values), **_compared(values, reference)}


def timed(seconds: Sequence[float], reference: Sequence[float] | None = None, images: float | None = None) -> Row:
    """Columns of a time, with images per second if a call handles `images`."""
    row = measured([1000 * second for second in seconds], 'median (ms)')
    speed = {} if images is None else {'images/s': images / median(seconds)}
    return {**row, **speed, **_compared(seconds, reference)}


def _compared(values: Sequence[float], reference: Sequence[float] | None) -> Row:
    if reference is None:
        return {}
    compared = ratios(values, reference)
    return {'ratio': median(compared), 'ratio IQR (%)': spread(compared)}


# Memory


@contextmanager
def peak_memory(device: torch.device | str = 'cpu') -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak in MiB since entering, above what was held on entering.

    On the CPU it is the whole process's, from Linux; on CUDA that of tensors. A process can be measured once, since
    what its allocator keeps is missing in a second measurement.
    """
    gc.collect()
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    (_PROC / 'clear_refs').write_text('5')  # resets the peak
    before = _status('VmRSS')
    yield lambda: (_status('VmHWM') - before) / 2**20


def can_measure_memory(device: torch.device | str = 'cpu') -> bool:
    """True if `peak_memory` works here."""
    return torch.device(device).type == 'cuda' or (_PROC / 'clear_refs').exists()


def _status(field: str) -> int:
    lines = (_PROC / 'status').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def in_fresh_process(file: str, *arguments: str, **keywords: Any) -> Any:
    """Run a benchmark by itself with `--alone` and these keywords as JSON, and return the JSON it prints last.

    Returns:
        None if it was killed, as a process is that runs out of memory.
    """
    command = [sys.executable, file, *arguments, '--alone', json.dumps(keywords)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -9:
        return None
    if done.returncode:
        sys.exit(f'{" ".join(command)} ended with {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


# Arguments


def make_parser(
    doc: str | None, repeats: int = 7, precision: bool = True, device: bool = True, memory: bool = False
) -> argparse.ArgumentParser:
    """Make a parser with `--repeats`, `--threads`, `--json` and the options asked for.

    Args:
        doc: Docstring of the benchmark.
        repeats: Default of `--repeats`.
        precision: Add `--bf16`.
        device: Add `--device`.
        memory: Add `--release-memory`, of which `keeps_memory` tells.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=positive, default=repeats, help='repetitions, with all cases in each')
    parser.add_argument('--threads', type=positive, help="CPU threads; torch's choice by default")
    if device:
        parser.add_argument('--device', type=_device, default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers to FILE')
    if precision:
        parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16 instead of float32')
    if memory:
        parser.add_argument('--release-memory', action='store_true', help='return freed memory to the system')
    return parser


def keeps_memory(args: argparse.Namespace) -> bool:
    """True if freed memory is kept for the next step, as training does on a CPU."""
    return not args.release_memory and torch.device(args.device).type == 'cpu'


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and set the number of threads."""
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f'argument --json: there is no folder {args.json.parent}')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not 1 or more')
    return value


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text}: {str(error).splitlines()[0]}') from error
    return text


def autocast(device: torch.device | str, bf16: bool) -> Any:
    """Autocast to bfloat16, or do nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else nullcontext()


# Reports


def setting(device: torch.device | str, precision: str = 'float32', *facts: str) -> str:
    """One line with hardware, precision, further facts, and versions."""
    kind = torch.device(device).type
    hardware = str(device)
    if kind == 'cpu':
        hardware = f'{processor()}, {torch.get_num_threads()} threads'
    elif kind == 'cuda':
        hardware = torch.cuda.get_device_name(device)
        if precision == 'float32' and torch.backends.cudnn.allow_tf32:
            precision = 'float32 (TF32 in convolutions)'
    return ', '.join([hardware, precision, *facts, environment()['versions']])


class Report:
    """Tables on the console, and the same numbers in a file.

    Args:
        about: Line from `setting`.
        file: JSON file to write, if any.
    """

    def __init__(self, about: str, file: Path | None = None) -> None:
        self._file = file
        self._content: dict[str, Any] = {'setting': about, 'command': environment()['command'], 'tables': []}
        print(about)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Print a table with the columns of its rows, and write the file with all tables so far."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        numeric = {column for column in columns if not any(isinstance(row.get(column), str) for row in rows)}
        table = Table()
        for column in columns:
            table.add_column(column, justify='right' if column in numeric else 'left')
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        # A file has no width.
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        for line in ('', title):
            console.print(line, style='bold', markup=False)
        console.print(table)
        self._content['tables'].append({'title': title, 'rows': list(rows)})
        if self._file is not None:
            self._file.write_text(json.dumps(self._content, indent=2) + '\n')


def _cell(value: str | float | None) -> str:
    """Three significant digits, or more for a longer integer part."""
    if value is None:
        return '-'
    if isinstance(value, str | int):
        return str(value)
    digits = next((digits for bound, digits in ((100, 0), (10, 1)) if abs(value) >= bound), 2)
    return f'{value:,.{digits}f}'
