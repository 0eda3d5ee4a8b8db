"""The precision that the launcher chose is part of the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.train.runs import SCRIPT, TIMEOUT, environment, launch_command, make_place, read_metrics

BEFORE = Path(__file__).parents[1] / 'data' / 'run_before'


def launch_in(place, precision, *arguments):
    command = launch_command(place, *arguments)
    command[3:3] = ['--mixed_precision', precision] if precision else []
    return subprocess.run(command, capture_output=True, text=True, env=environment(place), timeout=TIMEOUT, cwd=place)


def test_precision_of_the_launcher_is_recorded(tmp_path):
    place = make_place(tmp_path, optim={'epochs': 2}, knn={'every': 0})
    folder = place / 'runs' / 'half'
    assert launch_in(place, 'bf16', '--run.name', 'half').returncode == 0
    assert yaml.safe_load((folder / 'recipe.yaml').read_text())['run']['precision'] == 'bf16'
    refused = launch_in(place, 'fp16', '--resume', str(folder))
    assert refused.returncode != 0
    assert 'run.precision bf16 -> fp16' in refused.stderr
    # Without an option it goes on as it was.
    before = read_metrics(folder)
    again = launch_in(place, None, '--resume', str(folder))
    assert again.returncode == 0, again.stderr
    assert read_metrics(folder) == before
    # As the continuation of the newest run of a recipe it is another one.
    auto = launch_in(place, None, '--resume', 'auto', '--run.name', 'half')
    assert auto.returncode != 0
    assert 'run.precision bf16 -> no' in auto.stderr


def test_linear_evaluation_records_it(tmp_path):
    network = tmp_path / 'before'
    shutil.copytree(BEFORE, network)
    script = SCRIPT.with_name('linear_eval.py')
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--mixed_precision', 'bf16']
    command = [*launcher, str(script), '--network', str(network), '--optim.epochs', '1']
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((network / 'linear_eval-2' / 'settings.json').read_text())['run.precision'] == 'bf16'
