"""Images per second of training on one process and on several, by the real launcher.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 4 8 --device cuda --batch 64 -- \
        --config recipes/configs/mocov2_resnet50_imagenet_200e.yaml --data.root /data/imagenet --method.queue_size 8192

Every run is `accelerate launch recipes/pretrain.py` without evaluation, until its log has `--lines` lines. Options
after `--` are passed on to it; by default MoCo v2 trains on the embedded images. Several processes have the batch of
one process each (`per process`), or all together (`in total`). The speed of a run is the median over its log without
the first line, which contains the start; `waited` is the share of the time spent waiting for data. Efficiency is the
speed over that of one process, on GPUs divided by the number of processes. A CPU's cores are divided among the
processes, so that one process could be as fast. Runs are interleaved.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Report, Row, in_turns, make_parser, measured, parse, positive, ratios, setting

from slimclr_hub.runs.command_line import run_script

RECIPES = Path(__file__).parents[1] / 'recipes'
SCRIPT = RECIPES / 'pretrain.py'
# Each process normalises its own part.
MOCOV2 = [f'--config={RECIPES}/configs/mocov2_resnet20_fashionmnist6k.yaml', '--method.bn_splits=1']
Speed = tuple[float, float]
"""Images per second, and share of the time spent waiting for data."""

_POLL = 0.5  # seconds


def run(processes: int, batch: int, args: argparse.Namespace) -> Speed:
    """Measure one run, with a batch of `batch` over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        several = ['--multi_gpu', f'--num_processes={processes}', '--main_process_port=0'] if processes > 1 else []
        options = {
            'data.batch_size': batch,
            'optim.epochs': 1,
            'optim.warmup_epochs': 0,
            'method.slow_start_epochs': 1 if args.slow_start else 0,
            'knn.every': 0,
            'run.output': folder,
            'run.name': 'run',
            'run.log_every': args.log_every,
            'run.precision': 'bf16' if args.bf16 else 'no',
        }
        command = [sys.executable, '-m', 'accelerate.commands.launch', '-q', *several, str(SCRIPT)]
        command += [f'--{key}={value}' for key, value in options.items()] + args.options
        metrics, log = Path(folder) / 'run' / 'metrics.jsonl', Path(folder) / 'log'
        status = run_until(
            lambda: len(trained(metrics)) >= args.lines, command, environment(processes, args.device), log
        )
        lines = trained(metrics)
        if status > 0 or len(lines) < 2:
            text = log.read_text(encoding='utf-8')
            last = text.strip().rpartition('\n')[2] if status > 0 else 'the log had not two lines'
            sys.exit(f'error: {" ".join(command[4:])} ended with {status}: {last}')
        return median(each['images_per_second'] for each in lines[1:]), median(each['data_wait'] for each in lines[1:])


def run_until(enough: Callable[[], bool], command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command until it ends or `enough` is true; return its status, negative if it was killed."""
    with log.open('w', encoding='utf-8') as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None and not enough():
                time.sleep(_POLL)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher and its children
        return process.wait()


def environment(processes: int, device: str) -> dict[str, str]:
    """Variables that divide the threads among processes, and for a CPU hide GPUs."""
    threads = str(max(torch.get_num_threads() // processes, 1))
    on_cpu = {'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''} if device == 'cpu' else {}
    return {**os.environ, 'OMP_NUM_THREADS': threads, **on_cpu}


def trained(metrics: Path) -> list[dict[str, Any]]:
    """Training lines of a log that may still be written to."""
    if not metrics.exists():
        return []
    lines = (line for line in metrics.read_text(encoding='utf-8').splitlines(keepends=True) if line.endswith('\n'))
    return [record for record in map(json.loads, lines) if record['kind'] == 'train']


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument('--processes', type=positive, nargs='+', default=[1, 2])
    parser.add_argument('--batch', type=positive, default=64, help='batch of one process')
    parser.add_argument('--slow-start', action='store_true', help='train the full width alone')
    parser.add_argument('--log-every', type=positive, default=10, help='steps between lines of the log')
    parser.add_argument('--lines', type=positive, default=6, help='lines of the log; the first does not count')
    parser.add_argument('options', nargs='*', default=MOCOV2, help='after --: options of recipes/pretrain.py')
    args = parse(parser)
    if args.lines < 2:
        parser.error('argument --lines: the first does not count; give 2 or more')
    if args.device != 'cpu' and max(args.processes) > torch.accelerator.device_count():
        parser.error(f'argument --processes: there are {torch.accelerator.device_count()} devices')

    cases: dict[str, tuple[int, str, int]] = {'one': (1, '', args.batch)}
    for processes in sorted({*args.processes} - {1}):
        cases[f'{processes} per process'] = (processes, 'per process', args.batch * processes)
        cases[f'{processes} in total'] = (processes, 'in total', args.batch)
    about = setting(args.device, 'bf16' if args.bf16 else 'float32', f'batch {args.batch} of one process')
    report = Report(about, args.json)
    runs = {name: partial(run, processes, batch, args) for name, (processes, _, batch) in cases.items()}
    found = in_turns(runs, args.repeats)
    reference = [speed for speed, _ in found['one']]
    rows: list[Row] = []
    for name, (processes, same, batch) in cases.items():
        speeds = [speed for speed, _ in found[name]]
        row: Row = {'processes': processes, 'batch': batch, 'same batch': same}
        row |= measured(speeds, 'images/s', reference)
        devices = 1 if args.device == 'cpu' else processes
        row['efficiency (%)'] = 100 * median(ratios(speeds, reference)) / devices
        row['waited (%)'] = 100 * median(wait for _, wait in found[name])
        rows.append(row)
    report.table('training by the number of processes; ratio of the speed to that of one process', rows)


if __name__ == '__main__':
    run_script(main)
