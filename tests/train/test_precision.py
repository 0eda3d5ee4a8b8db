"""The precision that the launcher chose is part of the run."""

import subprocess

import yaml

from tests.train.runs import TIMEOUT, environment, launch_command, make_place, read_metrics


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
