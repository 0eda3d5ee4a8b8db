"""Damaged files through the commands that read them: a part of `make fuzz`, with the same damages each time."""

import os
import subprocess
import sys

from tests.hub.files import ROOT


def test_damaged_files_are_one_line(tmp_path):
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'TMPDIR': str(tmp_path)}
    command = [sys.executable, '-W', 'ignore', '-m', 'tests.fuzz', '--cases', '105']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr[-3000:]}'
    assert [*tmp_path.iterdir()] == []
