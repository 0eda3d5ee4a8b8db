"""The smallest runs that an error surface can be drawn of, trained in this process by the real script."""

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.state import AcceleratorState

from tests.train.runs import SCRIPT, make_place

_NO_MOCO = [
    argument for name in ('dim', 'queue_size', 'bn_splits', 'momentum') for argument in (f'--method.{name}', 'null')
]
KINDS = {
    'mocov2': [],
    'supervised': [*_NO_MOCO, '--method.name', 'supervised', '--method.num_classes', '10'],
}


def make_runs(place: Path, *kinds: str) -> dict[str, Path]:
    """Kind -> folder of a run of six steps, with checkpoints after each."""
    make_place(
        place,
        model={'widths': [1.0, 0.25]},
        method={'slow_start_epochs': 0},
        optim={'epochs': 1},
        knn={'every': 0},
        data={'size': 8},
        run={'checkpoint_steps': 1, 'keep_checkpoints': 9},
    )
    for kind in kinds:
        arguments = [str(SCRIPT), '--config', str(place / 'tiny.yaml'), '--run.name', kind, *KINDS[kind]]
        AcceleratorState._reset_state(True)
        with patch.object(sys, 'argv', arguments), patch.dict(os.environ, ACCELERATE_USE_CPU='true'):
            runpy.run_path(str(SCRIPT), run_name='__main__')
        AcceleratorState._reset_state(True)
    return {kind: place / 'runs' / kind for kind in kinds}
