"""Downloads and uploads that end: in a stated time, whatever a server does, and at the size that it announced."""

import os
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
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
        raise InputError(f'SLIMCLR_DOWNLOAD_SECONDS is {told!r}, not a number of seconds') from None
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
