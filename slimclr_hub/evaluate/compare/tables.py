"""Tables of a comparison, for a terminal and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from slimclr_hub.evaluate.compare.entries import Entry, Measure
from slimclr_hub.evaluate.compare.reported import REPORTED, REPORTED_DETECTION, TABLE_1, TABLE_2
from slimclr_hub.evaluate.result import RESULT
from slimclr_hub.runs.tables import print_table
from slimclr_hub.text import human

if TYPE_CHECKING:
    from rich.console import Console

_STEADY = 0.2  # spread of repetitions from which on a speed is not to be relied on


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Args:
        title: What stands above it.
        headers: Titles of the columns.
        rows: A text for each column.
        notes: What stands below it, line by line.
        names: Columns of names, from the left, which are aligned there.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)
    names: int = 1

    def markdown(self) -> str:
        """The table in Markdown, title and notes around it."""
        rules = ['---' if i < self.names else '---:' for i in range(len(self.headers))]
        cells = [self.headers, rules, *self.rows]
        lines = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in cells]
        return '\n'.join([f'**{self.title}**', '', *lines, '', *(f'- {note}' for note in self.notes)]).rstrip() + '\n'

    def print(self, console: 'Console | None' = None) -> None:
        """Print the table, with all of each cell however narrow the terminal is.

        Args:
            console: Where to; standard output unless given.
        """
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title)
        for i, header in enumerate(self.headers):
            table.add_column(header, justify='left' if i < self.names else 'right')
        for row in self.rows:
            table.add_row(*row)
        console = console or Console(markup=False, emoji=False, highlight=False)
        print_table(table, console)
        for note in self.notes:
            console.print(note, soft_wrap=True)


def comparison_tables(entries: Sequence[Entry], batch_size: int, hardware: str) -> list[TextTable]:
    """A table for each data set, with a row for each network and width and a column for each protocol.

    Args:
        entries: The networks.
        batch_size: Images at a time while speed was measured.
        hardware: What it was measured on.
    """
    sets = list(dict.fromkeys(measure.data for entry in entries for measure in entry.measures))
    if not sets:
        return [_table(entries, None, batch_size, hardware)]
    tables = [_table(entries, data, batch_size, hardware) for data in sets]
    if len(sets) > 1:
        notes = [*tables[-1].notes, 'Accuracies on different data sets do not compare.']
        tables[-1] = replace(tables[-1], notes=notes)
    return tables


def reported_tables() -> list[TextTable]:
    """Tables 1 and 2 of the paper, as reported there."""
    first = [
        (
            row.method,
            row.backbone,
            _number(row.width, 'g'),
            row.teacher or '-',
            str(row.epochs or '-'),
            _rounded(row.parameters),
            _rounded(row.multiply_adds),
            _number(row.top1),
            _number(row.top5),
        )
        for row in REPORTED
    ]
    second = [
        (
            row.method,
            row.backbone,
            _number(row.width, 'g'),
            _rounded(row.parameters),
            _number(row.box_ap),
            _number(row.mask_ap),
        )
        for row in REPORTED_DETECTION
    ]
    costs = ('parameters', 'multiply-adds')
    return [
        TextTable(
            f'Reported: {TABLE_1}',
            ['method', 'backbone', 'width', 'teacher', 'epochs', *costs, 'top-1', 'top-5'],
            first,
            ['Reported by the paper, not measured here; cost as rounded there, with a classifier of 1000 classes.'],
            names=4,
        ),
        TextTable(
            f'Reported: {TABLE_2}',
            ['pre-training', 'backbone', 'width', costs[0], 'box AP', 'mask AP'],
            second,
            ['Reported by the paper, not measured here.'],
            names=3,
        ),
    ]


def _table(entries: Sequence[Entry], data: str | None, batch_size: int, hardware: str) -> TextTable:
    shown = [entry for entry in entries if data is None or any(of.data == data for of in entry.measures)]
    alone = len(entries) == 1
    columns = {of.key: of for entry in shown for of in entry.measures if of.data == data}
    labels = [label for _, label, _ in columns]
    headers = ['width', 'parameters', 'multiply-adds']
    headers += ['images/s'] if shown[0].speed else []
    notes = []
    for key, measure in columns.items():
        # One word where it says enough, else in full.
        header = measure.label if labels.count(measure.label) == 1 else measure.protocol
        headers += [f'{header} at start', header, 'gain'] if alone and measure.start else [header]
        both = ' (top-1 / top-5)' if any(of.top5 for entry in shown for of in entry.measures if of.key == key) else ''
        notes.append(f'{header}: {measure.protocol}{both}' if header != measure.protocol else f'{header}{both}')
        notes += [
            f'{header} of {entry.name}: of {of.source}, the newest by this protocol; left out: {", ".join(of.older)} '
            f'(how they differ stands in the settings of their {RESULT})'
            for entry in shown
            for of in entry.measures
            if of.key == key and of.older
        ]
    if len(columns) > 1:
        notes.append('Accuracies by different protocols do not compare: look along a column.')
    if shown[0].speed:
        notes.append(f'images/s: a batch of {batch_size} at a time, in float32, measured now on {hardware}')
        if (spread := max(entry.spread for entry in shown)) > _STEADY:
            notes.append(f'The machine was busy: repetitions of images/s differ by {100 * spread:.0f} %.')
    rows = []
    for entry in shown:
        measures = {of.key: of for of in entry.measures}
        for fact in entry.facts:
            row = [] if alone else [entry.name]
            row += [f'{fact.width:g}', human(fact.parameters), human(fact.multiply_adds)]
            row += [f'{entry.speed[fact.width]:,.0f}'] if entry.speed else []
            for key in columns:
                row += _cells(measures.get(key), fact.width, alone and bool(columns[key].start))
            rows.append(row)
    title = 'cost by width' if data is None else f'accuracies (%) by width on {data}'
    if alone:
        return TextTable(f'{entries[0].name}: {title}', headers, rows, notes, names=0)
    return TextTable(title, ['network', *headers], rows, notes)


def _cells(measure: Measure | None, width: float, with_start: bool) -> list[str]:
    if measure is None or width not in measure.top1:
        return ['', '', ''] if with_start else ['']
    cell = f'{measure.top1[width]:.1f}' + (f' / {measure.top5[width]:.1f}' if width in measure.top5 else '')
    if not with_start:
        return [cell]
    if width not in measure.start:
        return ['', cell, '']
    return [f'{measure.start[width]:.1f}', cell, f'{measure.top1[width] - measure.start[width]:+.1f}']


def _rounded(cost: float) -> str:
    # No more digits than the paper gives.
    return f'{cost / 1e9:.1f} G' if cost >= 1e9 else f'{cost / 1e6:.1f} M' if cost < 1e8 else f'{cost / 1e6:.0f} M'


def _number(value: float | None, form: str = '.1f') -> str:
    return '-' if value is None else format(value, form)
