import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from slimclr_hub.files import append_json_line, atomic_files, read_json_lines, write_json_lines, write_text
from slimclr_hub.runs.figures import new_figure, save_figure
from slimclr_hub.weights.tensor_file import save_tensors


def test_lines_come_back(tmp_path):
    file = tmp_path / 'lines.jsonl'
    assert read_json_lines(file) == []
    write_json_lines(file, [{'step': 1}, [2]])
    append_json_line(file, {'step': 3})
    assert read_json_lines(file) == [{'step': 1}, [2], {'step': 3}]
    assert file.read_text() == '{"step": 1}\n[2]\n{"step": 3}\n'


@pytest.mark.parametrize('cut', ['{"st', '{"step": 2'])
def test_line_that_a_kill_cut_off_is_passed_over(tmp_path, cut):
    file = tmp_path / 'lines.jsonl'
    file.write_text('{"step": 1}\n' + cut)
    assert read_json_lines(file) == [{'step': 1}]
    append_json_line(file, {'step': 2})
    assert read_json_lines(file) == [{'step': 1}, {'step': 2}]


def test_line_of_which_only_the_end_is_cut_off_counts(tmp_path):
    file = tmp_path / 'lines.jsonl'
    file.write_text('{"step": 1}')
    append_json_line(file, {'step': 2})
    assert read_json_lines(file) == [{'step': 1}, {'step': 2}]


KILLED = """
import os, sys
from pathlib import Path
from slimclr_hub import files
os.replace = lambda *_: os.kill(os.getpid(), 9)
files.write_text(Path(sys.argv[1]), 'new')
"""


def test_a_kill_leaves_nothing_for_good(tmp_path):
    write_text(tmp_path / 'one', 'old')
    done = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path / 'one')])
    assert done.returncode == -9
    (left,) = (path for path in tmp_path.iterdir() if path.name != 'one')
    alive = tmp_path / left.name.replace(left.name.split('-')[-2], str(os.getpid()))
    alive.mkdir()
    write_text(tmp_path / 'two', '')
    assert {path.name for path in tmp_path.iterdir()} == {'one', 'two', alive.name}
    assert (tmp_path / 'one').read_text() == 'old'


def test_files_are_written_together_or_not_at_all(tmp_path):
    write_text(tmp_path / 'one', 'old')
    with pytest.raises(UnicodeEncodeError), atomic_files(tmp_path) as partial:
        (partial / 'one').write_text('new' + chr(0xD800))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'one': 'old'}
    with atomic_files(tmp_path) as partial:
        (partial / 'one').write_text('new')
        (partial / 'two').write_text('')
    assert {path.name for path in tmp_path.iterdir()} == {'one', 'two'}
    assert (tmp_path / 'one').read_text() == 'new'


@contextmanager
def little_room() -> Iterator[None]:
    """A limit on the size of files stands for a full disk: writes fail in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def draw(path):
    save_figure(new_figure()[0], path)


@pytest.mark.parametrize(
    'write',
    [
        lambda path: write_text(path, 'a' * 5000),
        lambda path: save_tensors({'a': torch.zeros(5000)}, path),
        draw,
    ],
)
def test_disk_that_is_full_is_one_kind_of_error(tmp_path, write):
    """As the command line tells in one line; nothing is left behind."""
    with little_room(), pytest.raises(OSError, match='File too large') as error:
        write(tmp_path / 'one')
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())
