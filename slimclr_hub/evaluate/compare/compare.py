"""A comparison from its networks to its tables and figure: what `slimclr-hub compare` runs."""

import os
from collections.abc import Sequence
from pathlib import Path

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import read_entries
from slimclr_hub.evaluate.compare.figure import draw_pareto, figure_path
from slimclr_hub.evaluate.compare.speed import measure_speed
from slimclr_hub.evaluate.compare.tables import comparison_tables, reported_tables
from slimclr_hub.files import write_text
from slimclr_hub.runs.result import environment

_STANDARD_OUTPUT = Path('-')


def compare_networks(
    networks: Sequence[str],
    *,
    markdown: Path | None = None,
    figure: Path | None = None,
    reported: bool = False,
    batch_size: int | None = 32,
) -> list[Path]:
    """Print tables of networks side by side, and write them and a figure where asked to.

    Args:
        networks: Folders of runs and networks, and names of published ones.
        markdown: File for the tables as Markdown; `-` for standard output, in the place of the usual tables.
        figure: Where to draw accuracy over multiply-adds, as PNG and PDF.
        reported: Whether to add what the paper reports.
        batch_size: Images at a time while speed is measured; None to leave speed out.

    Returns:
        The files that were written.

    Raises:
        InputError: There is nothing to compare, one of the networks is none or has no accuracy, or a file cannot be
            written there.
    """
    if not networks and not reported:
        raise InputError('nothing to compare; name runs, networks or tags, or give --reported')
    target = figure_path(figure) if figure else None
    if markdown is not None and markdown.is_dir():
        raise InputError(f'--markdown {markdown} is a folder; give the name of a file in it')
    for option, file in ('--markdown', markdown), ('--figure', target):
        if file is not None and file != _STANDARD_OUTPUT:
            _make_room(option, file)
    if batch_size is not None and batch_size < 1:
        raise InputError(f'--batch-size is {batch_size}; give 1 or more')
    entries = read_entries(networks)
    if entries and batch_size:
        entries = measure_speed(entries, batch_size)
    tables = comparison_tables(entries, batch_size or 0, environment()['hardware']) if entries else []
    tables += reported_tables() if reported else []
    text = '\n'.join(table.markdown() for table in tables)
    written = []
    if markdown == _STANDARD_OUTPUT:
        print(text, end='')
    else:
        for table in tables:
            table.print()
        if markdown is not None:
            write_text(markdown, text)
            written.append(markdown)
    if target is not None:
        draw_pareto(entries, target, reported)
        written += [target.parent / f'{target.name}.{suffix}' for suffix in ('png', 'pdf')]
    return written


def _make_room(option: str, file: Path) -> None:
    """Make the folder of a file, before there is any work to lose.

    Raises:
        InputError: It cannot be made or written to.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{option} {file}: {file.parent} cannot be made ({error.strerror}); give another') from error
    if not os.access(file.parent, os.W_OK):
        raise InputError(f'{option} {file}: {file.parent} cannot be written to; give another')
