"""Tables in a terminal, a file or another program, in Markdown and in LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimclr_hub.text import printable

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT_COLUMNS = 160  # where no terminal tells how many there are
_LATEX = {'\\': r'\textbackslash{}', '±': r'$\pm$', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
_LATEX |= {character: f'\\{character}' for character in '&%$#_{}'}


@dataclass(frozen=True)
class TextTable:
    """A table of texts with a title above and lines of notes below; its first `names` columns are aligned left."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 1

    def markdown(self) -> str:
        """Return the table in Markdown, with title and notes."""
        table = markdown(self.headers, self.rows, self.names)
        return '\n'.join([f'**{self.title}**', '', table, '', *(f'- {note}' for note in self.notes)]).rstrip() + '\n'

    def latex(self) -> str:
        """Return the table as a LaTeX `table`, with the title as its caption and notes as comments."""
        columns = ''.join('l' if i < self.names else 'r' for i in range(len(self.headers)))
        head, *body = (' & '.join(map(_escaped, row)) + r' \\' for row in (self.headers, *self.rows))
        lines = [r'\begin{table}', r'\centering', rf'\caption{{{_escaped(self.title)}}}']
        lines.append(rf'\begin{{tabular}}{{{columns}}}')
        lines += [r'\hline', head, r'\hline', *body, r'\hline', r'\end{tabular}', r'\end{table}']
        return '\n'.join([*lines, *(f'% {note}' for note in self.notes)]) + '\n'

    def print(self, console: 'Console | None' = None) -> None:
        """Print the table, on standard output by default, with each cell on one line; headers may take several.

        A terminal that is too narrow folds lines, where rich would cut cells; `console` keeps the width it then needs.
        """
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table

        headers, *rows = ([printable(cell) for cell in row] for row in (self.headers, *self.rows))
        console = console or Console(markup=False, emoji=False, highlight=False)
        columns = console.width if console.is_terminal else max(_DEFAULT_COLUMNS, console.width)
        cells = [[row[i] for row in rows] for i in range(len(headers))]
        # Rich's own widths would be below the least ones.
        widths = [
            max(map(cell_len, (*header.split(), *column)), default=0)
            for header, column in zip(headers, cells, strict=True)
        ]
        needed = sum(widths) + 3 * len(widths) + 1  # a space on either side, and lines between
        spare = max(columns - needed, 0)
        while spare and (long := [i for i, header in enumerate(headers) if cell_len(header) > widths[i]]):
            widths[max(long, key=lambda i: cell_len(headers[i]) / widths[i])] += 1
            spare -= 1
        table = Table(title=printable(self.title))
        for i, (header, width) in enumerate(zip(headers, widths, strict=True)):
            table.add_column(header, justify='left' if i < self.names else 'right', width=width)
        for row in rows:
            table.add_row(*row)
        # Both, as a height alone would leave the width to a terminal that does not tell it.
        console.size = (max(columns, needed), console.height)
        console.print(table)
        for note in self.notes:
            console.print(printable(note), soft_wrap=True)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Format a table in Markdown, whose first `names` columns are aligned left."""
    rules = ['---' if i < names else '---:' for i in range(len(headers))]
    lines = [' | '.join(cell.replace('|', r'\|') for cell in row) for row in (headers, rules, *rows)]
    return '\n'.join(f'| {line} |' for line in lines)


def _escaped(text: str) -> str:
    return ''.join(_LATEX.get(character, character) for character in text)
