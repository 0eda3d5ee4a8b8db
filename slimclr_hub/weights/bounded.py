"""Files and answers from elsewhere that end: in a stated time, whatever a server does, and at a stated size."""

import json
import os
from collections.abc import Callable
from contextvars import copy_context
from math import isfinite
from pathlib import Path
from threading import TIMEOUT_MAX, Thread
from typing import Any, TypeVar

from huggingface_hub import close_session
from huggingface_hub.utils import tqdm

from slimclr_hub.errors import InputError

SECONDS = 1800
"""For weights; the environment variable `SLIMCLR_DOWNLOAD_SECONDS` allows more or less."""

SECONDS_FOR_CONFIG = 60
LARGEST_CONFIG = 1 << 20
"""Bytes of a `config.json`, or of an index of weights in parts."""

Answer = TypeVar('Answer')


def read_json(path: Path) -> Any:
    """Read a JSON file of at most `LARGEST_CONFIG` bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is longer, or no JSON; RecursionError where it is nested too deeply.
    """
    with path.open('rb') as file:
        text = file.read(LARGEST_CONFIG + 1)
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f'{path} has more than {LARGEST_CONFIG} bytes')
    return json.loads(text)


def as_float(value: Any) -> float:
    """A finite number of a file's; a TypeError or OverflowError if it is something else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise TypeError
    return float(value)


class TooLateError(Exception):
    """A server took longer than it may; the message says how to allow more."""


def in_time(call: Callable[[], Answer], seconds: float = SECONDS) -> Answer:
    """Return what a call of huggingface_hub returns, or raise what it raises, within `seconds`.

    Its own timeouts are between two packets, so that a server that sends a byte now and then holds it for days, and one
    that asks to come back tomorrow is obeyed. Such a call goes on in a thread, whose connections are closed here.

    Raises:
        TooLateError: It took longer.
    """
    told = os.environ.get('SLIMCLR_DOWNLOAD_SECONDS')
    try:
        seconds = float(told) if told else seconds
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < TIMEOUT_MAX:
        raise InputError(f'SLIMCLR_DOWNLOAD_SECONDS is {told!r}, not a number of seconds up to {TIMEOUT_MAX:g}')
    values: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not values:
        close_session()
        raise TooLateError(f'no end after {seconds:g} s; set SLIMCLR_DOWNLOAD_SECONDS to allow more')
    return values[0]


class BoundedProgress(tqdm):
    """A progress bar of huggingface_hub that stops a download where more comes than was announced.

    A compressed answer of a few bytes may unpack to any size, which the client compares when all is on the disk.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._received, self._name = kwargs.get('initial') or 0, kwargs.get('desc')  # a disabled bar keeps no name

    def update(self, n: float | None = 1) -> bool | None:
        """Count bytes.

        Raises:
            InputError: There are more than `total`.
        """
        self._received += n or 0
        if self.total is not None and self._received > self.total:
            raise InputError(f'{self._name}: more came than the {self.total} bytes that were announced; it was stopped')
        return super().update(n)
