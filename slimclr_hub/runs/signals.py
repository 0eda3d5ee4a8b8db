"""Signals that ask a run to stop: noted when they come, answered between two steps."""

import os
import signal
from types import FrameType
from typing import Any

PREEMPTED = os.EX_TEMPFAIL
"""Exit status of a run that was asked to stop and can go on: 75, `EX_TEMPFAIL` of sysexits.h."""

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """SIGTERM (a machine is taken back), SIGUSR1 (SLURM's notice) and SIGINT (the keyboard), while in the context.

    A second SIGINT interrupts at once.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> 'StopSignals':
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in _ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int:
        """Exit status that says why: 130 after SIGINT, as shells have it, else `PREEMPTED`."""
        return 128 + signal.SIGINT if self.received is signal.SIGINT else PREEMPTED

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.received is signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
