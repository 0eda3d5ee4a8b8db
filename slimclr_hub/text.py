"""Numbers and foreign messages in a few words, names in natural order, and those of Fashion-MNIST's classes."""

import io
import re
import sys

GARMENTS = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']
"""Classes of Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747, table 1)."""


def human(number: int) -> str:
    """A count with three digits and its unit: 25557032 -> `25.6 M`."""
    for unit, factor in ('G', 1e9), ('M', 1e6), ('k', 1e3):
        if number >= 0.9995 * factor:
            return f'{number / factor:#.3g} {unit}'.replace('. ', ' ')
    return str(number)


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message; those of HTTP clients go on for several."""
    return str(error).strip().partition('\n')[0]


def printable(text: object) -> str:
    """Text of others' with its control characters escaped, which a terminal would obey; lines stay lines."""
    return ''.join(
        char if char == '\n' or char.isprintable() else char.encode('unicode_escape').decode() for char in str(text)
    )


def last_part(name: object) -> str:
    """The part of a dotted name after its last dot; nothing if it is no text."""
    return name.rpartition('.')[2] if isinstance(name, str) else ''


def print_anything() -> None:
    """Let standard output and error escape what the encoding of the locale lacks, where they would raise an error."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Key that sorts names by the numbers in them, 2 before 10, whatever their case.

    The name itself decides between those that differ in nothing else, else the order of a file system would.
    """
    parts = re.split(r'(\d+)', name.lower())
    # Not as integers: Python refuses those of thousands of digits.
    keys = [(len(part.lstrip('0')), part.lstrip('0')) if i % 2 else part for i, part in enumerate(parts)]
    return keys, name
