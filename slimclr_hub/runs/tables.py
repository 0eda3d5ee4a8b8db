"""Tables in a terminal, a file or another program."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ROOM = 160  # columns where no terminal says how many there are


def print_table(table: 'Table', console: 'Console | None' = None) -> None:
    """Print a table with all of each cell in one line; titles of columns may take several.

    A terminal that is too narrow for that folds its lines, where rich would cut cells.

    Args:
        table: Of texts, from rich.
        console: Where to; standard output unless given. It keeps the width that the table needs.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console = console or Console(markup=False, emoji=False, highlight=False)
    room = console.width if console.is_terminal else max(_ROOM, console.width)
    titles = [str(column.header) for column in table.columns]
    # Told to rich column by column: what it works out by itself goes below their least widths.
    widths = [
        max(map(cell_len, (*(title.split() if not column.no_wrap else [title]), *map(str, column.cells))), default=0)
        for column, title in zip(table.columns, titles, strict=True)
    ]
    needed = sum(widths) + 3 * len(widths) + 1  # a space on either side, and lines between
    spare = max(room - needed, 0)
    while spare and (long := [i for i, title in enumerate(titles) if cell_len(title) > widths[i]]):
        widths[max(long, key=lambda i: cell_len(titles[i]) / widths[i])] += 1
        spare -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    # Both, as a height alone would leave the width to a terminal that does not tell it.
    console.size = (max(room, needed), console.height)
    console.print(table)
