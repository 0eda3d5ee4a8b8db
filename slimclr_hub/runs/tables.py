"""Tables in a terminal, a file or another program, in Markdown and in LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DEFAULT_COLUMNS = 160  # where no terminal tells how many there are
_LATEX = {'\\': r'\textbackslash{}', '±': r'$\pm$', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
_LATEX |= {character: f'\\{character}' for character in '&%$#_{}'}


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Args:
        title: Title above the table.
        headers: Titles of the columns.
        rows: A text for each column.
        notes: Lines below the table.
        names: Number of columns from the left that hold names and are aligned left.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 1

    def markdown(self) -> str:
        """Return the table in Markdown, with title and notes."""
        rules = ['---' if i < self.names else '---:' for i in range(len(self.headers))]
        cells = [self.headers, rules, *self.rows]
        lines = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in cells]
        return '\n'.join([f'**{self.title}**', '', *lines, '', *(f'- {note}' for note in self.notes)]).rstrip() + '\n'

    def latex(self) -> str:
        """Return the table as a LaTeX `table`, with the title as its caption and notes as comments."""
        columns = ''.join('l' if i < self.names else 'r' for i in range(len(self.headers)))
        head, *body = (' & '.join(map(_escaped, row)) + r' \\' for row in (self.headers, *self.rows))
        lines = [r'\begin{table}', r'\centering', rf'\caption{{{_escaped(self.title)}}}']
        lines.append(rf'\begin{{tabular}}{{{columns}}}')
        lines += [r'\hline', head, r'\hline', *body, r'\hline', r'\end{tabular}', r'\end{table}']
        return '\n'.join([*lines, *(f'% {note}' for note in self.notes)]) + '\n'

    def print(self, console: 'Console | None' = None) -> None:
        """Print the table without cutting any cell, however narrow the terminal is.

        Args:
            console: The console; standard output unless given.
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


def print_table(table: 'Table', console: 'Console | None' = None) -> None:
    """Print a table with each cell on one line; titles of columns may take several.

    A terminal that is too narrow folds lines, where rich would cut cells.

    Args:
        table: A table of texts, from rich.
        console: The console; standard output unless given. It keeps the width that the table needs.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console = console or Console(markup=False, emoji=False, highlight=False)
    columns = console.width if console.is_terminal else max(_DEFAULT_COLUMNS, console.width)
    titles = [str(column.header) for column in table.columns]
    # Rich's own widths would be below the least ones.
    widths = [
        max(map(cell_len, (*(title.split() if not column.no_wrap else [title]), *map(str, column.cells))), default=0)
        for column, title in zip(table.columns, titles, strict=True)
    ]
    needed = sum(widths) + 3 * len(widths) + 1  # a space on either side, and lines between
    spare = max(columns - needed, 0)
    while spare and (long := [i for i, title in enumerate(titles) if cell_len(title) > widths[i]]):
        widths[max(long, key=lambda i: cell_len(titles[i]) / widths[i])] += 1
        spare -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    # Both, as a height alone would leave the width to a terminal that does not tell it.
    console.size = (max(columns, needed), console.height)
    console.print(table)


def _escaped(text: str) -> str:
    return ''.join(_LATEX.get(character, character) for character in text)
