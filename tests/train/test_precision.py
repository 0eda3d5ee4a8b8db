"""The precision that the launcher chose is part of the run."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml

from tests.scripts import TIMEOUT, Script, end_well
from tests.train.runs import SCRIPT, direct, environment, launch_command, make_place, read_metrics

BEFORE = Path(__file__).parents[1] / 'data' / 'run_before'


def test_precision_of_the_launcher_is_recorded(tmp_path):
    place = make_place(tmp_path, optim={'epochs': 2}, knn={'every': 0})
    folder = place / 'runs' / 'half'
    command = launch_command(place, '--run.name', 'half')
    command[3:3] = ['--mixed_precision', 'bf16']
    started = subprocess.run(command, capture_output=True, text=True, env=environment(place), timeout=TIMEOUT)
    assert started.returncode == 0, started.stderr
    assert yaml.safe_load((folder / 'recipe.yaml').read_text())['run']['precision'] == 'bf16'
    # From here on what the launcher sets.
    refused = direct(place, '--resume', str(folder), ACCELERATE_MIXED_PRECISION='fp16')
    assert refused.returncode != 0
    assert 'run.precision bf16 -> fp16' in refused.stderr
    # Without an option it goes on as it was.
    before = read_metrics(folder)
    again = direct(place, '--resume', str(folder), ACCELERATE_MIXED_PRECISION='no')
    assert again.returncode == 0, again.stderr
    assert read_metrics(folder) == before
    # As the continuation of the newest run of a recipe it is another one.
    auto = direct(place, '--resume', 'auto', '--run.name', 'half', ACCELERATE_MIXED_PRECISION='no')
    assert auto.returncode != 0
    assert 'run.precision bf16 -> no' in auto.stderr


def test_linear_evaluation_records_it(tmp_path):
    network = tmp_path / 'before'
    shutil.copytree(BEFORE, network)
    variables = {**environment(tmp_path), 'ACCELERATE_MIXED_PRECISION': 'bf16'}
    arguments = '--network', network, '--optim.epochs', '1'
    end_well(Script(SCRIPT.with_name('linear_eval.py'), *arguments, folder=tmp_path, variables=variables))
    assert json.loads((network / 'linear_eval-2' / 'settings.json').read_text())['run.precision'] == 'bf16'
