"""Small runs, and analyses of them, in this process."""

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState

from slimclr_hub.analysis.entry import main
from tests.train.runs import SCRIPT, make_place

ANALYZE = SCRIPT.with_name('analyze.py')


def small_place(place: Path) -> Path:
    """A data set and a recipe of two epochs of six steps with two microbatches each; the first epoch is slow start."""
    return make_place(
        place,
        optim={'epochs': 2, 'accumulation_steps': 2},
        knn={'every': 0},
        data={'size': 8},
        run={'checkpoint_steps': 5, 'keep_checkpoints': 9, 'log_every': 1},
    )


def pretrain(place: Path, *arguments: str) -> None:
    """Train by the place's recipe, or resume, on the CPU."""
    recipe = [] if '--resume' in arguments else ['--config', str(place / 'tiny.yaml')]
    run_script(SCRIPT, *recipe, *arguments)


def run_script(script: Path, *arguments: str) -> None:
    """Run a script of recipes/ as a process would."""
    AcceleratorState._reset_state(True)
    with patch.object(sys, 'argv', [str(script), *arguments]), patch.dict(os.environ, ACCELERATE_USE_CPU='true'):
        runpy.run_path(str(script), run_name='__main__')
    AcceleratorState._reset_state(True)


def analyse(*arguments: object) -> None:
    """Run `slimclr-hub analyze`."""
    main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run an analysis that ends with exit status 2, and return its one line of error."""
    with pytest.raises(SystemExit) as end:
        analyse(*arguments)
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('error: '))
    return line
