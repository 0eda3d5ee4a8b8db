"""Comparison of networks, from their names to tables, files and a figure: `slimclr-hub compare`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import SameRecipe, measure_speed, read_entries
from slimclr_hub.evaluate.compare.figure import draw_pareto
from slimclr_hub.evaluate.compare.tables import comparison_tables, csv_text, reported_networks, reported_tables
from slimclr_hub.files import write_text
from slimclr_hub.runs.figures import figure_name
from slimclr_hub.runs.result import environment
from slimclr_hub.text import printable

_STANDARD_OUTPUT = Path('-')


def compare_networks(
    networks: Sequence[str],
    *,
    markdown: Path | None = None,
    csv: Path | None = None,
    latex: Path | None = None,
    figure: Path | None = None,
    reported: bool = False,
    same_recipe: SameRecipe | None = None,
    batch_size: int | None = 32,
    baselines: bool = True,
) -> list[Path]:
    """Print tables of networks side by side, write files and a figure where asked to, and return the files.

    Args:
        networks: Folders of runs and networks, and names of published ones.
        markdown: File for the tables in Markdown; `-` prints them so, instead of the usual tables.
        csv: Likewise for all numbers in CSV, a row for each network, width and protocol, in timm's columns.
        latex: Likewise for the tables in LaTeX.
        figure: Where to draw accuracy over multiply-adds, as PNG and PDF.
        reported: Add networks of such a cost that the paper reports, or all without `networks`.
        same_recipe: Combines runs that differ in nothing but the seed, as in `read_entries`.
        batch_size: Images at a time while speed is measured; None to leave speed out.
        baselines: Show what raw pixels and random weights reach, where it was measured.

    Raises:
        InputError: There is nothing to compare, one of the networks is none, or a file cannot be written there.
    """
    if not networks and not reported:
        raise InputError('nothing to compare; name runs, networks or tags, or give --reported')
    if figure and figure.suffix not in ('', '.png', '.pdf'):
        raise InputError(f'--figure {figure}: figures are PNG and PDF; give a name in .png or without suffix')
    outputs = {'--markdown': markdown, '--csv': csv, '--latex': latex}
    if list(outputs.values()).count(_STANDARD_OUTPUT) > 1:
        raise InputError(f'only one of {", ".join(outputs)} can be printed by -; give the others the name of a file')
    for option, file in (*outputs.items(), ('--figure', figure)):
        if file is not None and file != _STANDARD_OUTPUT:
            _check_writable(option, file)
    if batch_size is not None and batch_size < 1:
        raise InputError(f'--batch-size is {batch_size}; give 1 or more')
    entries = read_entries(networks, same_recipe, baselines)
    if entries and batch_size:
        entries = measure_speed(entries, batch_size)
    tables = comparison_tables(entries, batch_size or 0, environment()['hardware']) if entries else []
    if reported and entries and not reported_networks(entries):
        note = 'The paper reports no network of about this cost; --reported alone shows all that it reports.'
        tables[-1] = replace(tables[-1], notes=[*tables[-1].notes, note])
    elif reported:
        tables += reported_tables(entries)
    texts = {
        '--markdown': '\n'.join(table.markdown() for table in tables),
        '--csv': csv_text(entries, reported),
        '--latex': '\n'.join(table.latex() for table in tables),
    }
    for table in tables if _STANDARD_OUTPUT not in outputs.values() else ():
        table.print()
    written = []
    for option, file in outputs.items():
        if file == _STANDARD_OUTPUT:
            print(printable(texts[option]), end='')
        elif file is not None:
            write_text(file, texts[option])
            written.append(file)
    if figure is not None and draw_pareto(entries, name := figure_name(figure), reported):
        written += [name.with_name(name.name + suffix) for suffix in ('.png', '.pdf')]
    return written


def _check_writable(option: str, file: Path) -> None:
    """Make the folder of a file, before there is any work to lose; raise an InputError if it cannot be written."""
    if file.is_dir():
        raise InputError(f'{option} {file} is a folder; give the name of a file in it')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{option} {file}: {file.parent} cannot be made ({error.strerror}); give another') from error
    if not os.access(file.parent, os.W_OK):
        raise InputError(f'{option} {file}: {file.parent} cannot be written to; give another')
