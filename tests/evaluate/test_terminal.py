"""Tables on terminals that are too narrow for them."""

import io
import re

import pytest
from rich.console import Console

from slimclr_hub.runs.tables import TextTable

NAMES = ['mocov2_slimclr_resnet20_fashion-mnist-6k_12e', 'supervised_slimclr_resnet20_fashion-mnist-6k_12e']
HEADERS = [
    'network',
    *(f'linear evaluation, switchable, cached, at most {n} training images' for n in (600, 6000, 12000)),
]
CELLS = ['71.3 / 98.0', '70.1 / 97.5', '69.9 / 97.0']


def narrow(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=25, markup=False, highlight=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize('width', [20, 80, 300])
def test_comparison_is_not_cut(width):
    console = narrow(width)
    TextTable('accuracies', HEADERS, [[name, *CELLS] for name in NAMES], ['a note']).print(console)
    text = printed(console)
    assert '…' not in text
    for name in NAMES:
        (line,) = (line for line in text.splitlines() if name in line)
        assert all(cell in line for cell in CELLS)
        assert line.rstrip().endswith('│')
        assert len(line) <= console.width
    words = re.sub(r'\x1b\[\d+m|┃', ' ', text).split()
    assert all(word in words for header in HEADERS for word in header.split())
    # No wider than it has to be, where the terminal is not.
    assert console.width == 300 if width == 300 else width <= console.width < 120


def test_names_and_numbers_stay_on_one_line():
    console = narrow()
    rows = [[name, '80.4, 11.4', '0.328, 0.0956', '+86.6 %'] for name in NAMES]
    TextTable('offsets', ['run', 'explained (%)', 'offsets', '2nd vs first'], rows).print(console)
    lines = [line for line in printed(console).splitlines() if '+86.6 %' in line]
    assert len(lines) == 2
    assert all(name in line and '0.328, 0.0956' in line for name, line in zip(NAMES, lines, strict=True))


def test_a_terminal_is_told_nothing_by_the_cells():
    console, hostile = narrow(), '\x1b[2J\x07'
    TextTable(hostile, [hostile], [[hostile]], [hostile]).print(console)
    assert printed(console).count('\\x1b[2J\\x07') == 4
    assert '\x07' not in printed(console)


def test_a_file_has_room(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    TextTable('accuracies', HEADERS, [[name, *CELLS] for name in NAMES]).print()
    assert max(map(len, capsys.readouterr().out.splitlines())) > 120
