"""Tiny runs through the real script, by the real launcher or in a process that has everything imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.data_room.files import write_idx_set
from tests.scripts import TIMEOUT, Script, start_together

SCRIPT = Path(__file__).parents[2] / 'recipes' / 'pretrain.py'
WIDTHS = (1.0, 0.75, 0.5, 0.25)
SHALLOW = {'args': {'zero_init_last': False, 'layers': [1, 1, 1]}}  # a block in each stage
EPOCHS, STEPS = 4, 6  # 96 images in batches of 16
QUERIES = 37  # which no batch and no number of processes divides
OF_THE_CLOCK = ('images_per_second', 'data_wait', 'peak_memory_gib')


def make_place(place: Path, **changes: dict) -> Path:
    """A folder with a data set and a recipe, in which runs lie; `changes` are further values by section."""
    recipe: dict[str, dict] = {
        'model': {'name': 'slimclr_resnet20', 'args': {'zero_init_last': False}},
        'method': {'dim': 16, 'queue_size': 64, 'bn_splits': 2, 'momentum': 0.9},
        'data': {
            'name': 'fashion-mnist',
            'root': str(write_idx_set(place / 'idx', 96, QUERIES)),
            'batch_size': 16,
            'size': 16,
            'num_workers': 0,
        },
        'views': {'blur_prob': 0.0},
        'optim': {'epochs': EPOCHS},
        'knn': {'k': 20, 'every': 2},
        'run': {'output': str(place / 'runs'), 'log_every': 2},
    }
    for section, values in changes.items():
        recipe.setdefault(section, {}).update(values)
    (place / 'tiny.yaml').write_text(yaml.safe_dump(recipe))
    return place


def environment(place: Path) -> dict[str, str]:
    # The CPU, so that results can be compared bit for bit; no accelerate configuration of whoever runs the tests.
    return {
        **os.environ,
        'ACCELERATE_USE_CPU': 'true',
        'CUDA_VISIBLE_DEVICES': '',
        'HF_HOME': str(place / 'hf'),
        'OMP_NUM_THREADS': '1',
        'PYTHONUNBUFFERED': '1',
    }


def launch_command(place: Path, *arguments: str, processes: int = 1) -> list[str]:
    # Several processes on the CPU take --multi_gpu and ACCELERATE_USE_CPU; --cpu starts one, whatever is asked for.
    several = ['--multi_gpu', '--num_processes', str(processes), '--main_process_port', '0'] if processes > 1 else []
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', *several]
    return [*launcher, str(SCRIPT), '--config', str(place / 'tiny.yaml'), *arguments]


def launch(place: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    command = launch_command(place, *arguments, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, env=environment(place), timeout=TIMEOUT, cwd=place)


def launch_well(place: Path, *arguments: str, processes: int = 1) -> str:
    result = launch(place, *arguments, processes=processes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def direct(place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """The script without its launcher, and with everything imported already; `variables` are of the environment."""
    arguments = '--config', 'tiny.yaml', *arguments
    script = start(place, *arguments, **variables)
    return subprocess.CompletedProcess([SCRIPT, *arguments], script.end(), script.stdout, script.stderr)


def direct_well(place: Path, *arguments: str) -> str:
    result = direct(place, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(place: Path, *arguments: str, **variables: str) -> Script:
    return Script(SCRIPT, *arguments, folder=place, variables={**environment(place), **variables})


def start_two(place: Path, *arguments: str) -> list[Script]:
    """Two processes of one run."""
    return start_together(2, SCRIPT, *arguments, folder=place, variables=environment(place))


def read_metrics(folder: Path, kind: str | None = None) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    for record in records:
        for name in OF_THE_CLOCK:
            record.pop(name, None)
    return [record for record in records if kind in (None, record['kind'])]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
