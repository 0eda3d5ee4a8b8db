"""A job that trains for epochs: it resumes, stops between two steps when asked to, and keeps checkpoints."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from slimclr_hub.errors import DataError, InputError, PreemptedError, StorageError
from slimclr_hub.runs.checkpoints import Checkpoints, Found, fitting
from slimclr_hub.runs.meter import Meter
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.text import first_line

PREEMPTED = os.EX_TEMPFAIL
"""Exit status of a run that was asked to stop and can go on: 75, `EX_TEMPFAIL` of sysexits.h."""

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_LATE = signal.SIGALRM
_LAUNCHED = 'ACCELERATE_DYNAMO_MODE'  # which `accelerate launch` always sets, and hardly anyone else
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_SHARED_MEMORY = '/dev/shm'
_CHECKPOINT_SECONDS = 60  # an epoch of few images, or on cached features, takes less than its checkpoint
# Of torch's errors where workers, or the thread that pins their batches, have come to an end.
_END_OF_WORKERS = ('DataLoader worker', 'Pin memory thread', 'Communication with the workers')
_START_OF_WORKERS = _MultiProcessingDataLoaderIter.__init__.__code__

BatchT = TypeVar('BatchT')
T = TypeVar('T')


class StopSignals:
    """Context that notes SIGTERM (a machine is taken back), SIGUSR1 (SLURM), SIGHUP (a terminal ends) and SIGINT.

    A second SIGINT interrupts. SIGHUP stays ignored where it is, as under nohup. Under `accelerate launch` on Linux the
    end of the launcher counts as SIGTERM, since the launcher passes none on. A thread gets no signals and notes none.
    """

    received: signal.Signals | None = None
    """The last signal; SIGALRM where `wait` has waited for too long."""

    def __init__(self) -> None:
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            numbers = [number for number in (*_STOPPING, _LATE) if not (ignored and number is signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
            # Torch's loader sets a handler that raises wherever the process is, in the middle of a step, too. Without
            # it, a worker that has ended is noticed where its batch is waited for, within 5 seconds.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self._by_launcher and not _follow_parent(signal.SIGTERM):
                self.received = signal.SIGTERM
        return self

    def __exit__(self, *_: object) -> None:
        if self._by_launcher:
            _follow_parent(0)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @property
    def _by_launcher(self) -> bool:
        return bool(self._before) and _LAUNCHED in os.environ and sys.platform == 'linux'

    @property
    def status(self) -> int:
        """Exit status of the stopped process: 130 after SIGINT, as shells have it, else `PREEMPTED`."""
        return 128 + signal.SIGINT if self.received is signal.SIGINT else PREEMPTED

    def wait(self, work: Callable[[], T], at_most: int) -> T | None:
        """The result of `work`, or None once a signal breaks it off, such as SIGALRM after `at_most` seconds."""
        try:
            self._waiting = True
            if self.received is not None:
                return None
            if self._before:
                signal.alarm(at_most)
            return work()
        except _BrokenOff:
            return None
        finally:
            self._waiting = False
            if self._before:
                signal.alarm(0)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == _LATE and not self._waiting:
            return
        if number != _LATE or self.received is None:
            self.received = signal.Signals(number)
        if self.received is signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._waiting:
            # Again: after a start of workers, and where Python ignores what is raised, as in what runs after a fork.
            signal.alarm(1)
            if not _starts_workers(frame):
                raise _BrokenOff


class _BrokenOff(BaseException):  # no Exception, which readers of images take for theirs
    pass


def _starts_workers(frame: FrameType | None) -> bool:
    """True where a loader starts its workers: if that is broken off, there may be one that nobody knows of and ends."""
    while frame is not None and frame.f_code is not _START_OF_WORKERS:
        frame = frame.f_back
    return frame is not None


def _follow_parent(number: int) -> bool:
    """Ask the system for a signal when the parent of this process ends, 0 for none; false if it has ended already.

    Who has lost its parent gets one of another session. One that began a session itself cannot tell by that.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)
    session = os.getsid(0)
    return session == os.getpid() or os.getsid(os.getppid()) == session


class Agreement:
    """All-reduce of flags over gloo, so that an accelerator with queued work is not synchronised.

    With several processes, the process group has to be initialised.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = dist.new_group(backend='gloo') if processes > 1 else None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, true if it is so on any process; all processes call this together."""
        if self._group is None:
            return flags
        shared = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return tuple(map(bool, shared.tolist()))


class Job(ABC, Generic[BatchT]):
    """Trains for epochs on all processes together, whatever is trained.

    A subclass says where batches come from (`batches`), what a step is (`train_step`), what follows an epoch
    (`evaluate`) and what a checkpoint holds (`state`, `own`, `restore`). It sets `checkpoints` before it calls
    `resume` or `train`.

    Args:
        accelerator: Accelerator of the processes.
        signals: Signals that ask to stop.
        epochs: Epochs to train.
        steps_per_epoch: Optimizer steps in each.
        batch_size: Images of a step over all processes.
        title: Name of the job beside its progress bar.
        timeout: Seconds to wait for a batch.
        log_every: Steps from one call of `log` to the next, besides that after each epoch; 0 for none.

    Attributes:
        step: Optimizer steps that have been taken.
        position: Place of this process in its stream of images after the last step; None if it follows from the step.
        meter: Means since the last log, which checkpoints keep.
    """

    checkpoints: Checkpoints
    evaluate_before_stop = False
    """True if `evaluate` is so quick that it still is done when a signal arrives in the last step of an epoch."""

    def __init__(
        self,
        accelerator: Accelerator,
        signals: StopSignals,
        *,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        title: str,
        timeout: int,
        log_every: int = 0,
    ) -> None:
        self.accelerator = accelerator
        self.signals = signals
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.title = title
        self.timeout = timeout
        self.log_every = log_every
        self.agreement = Agreement(accelerator.num_processes)
        self.meter = Meter()
        self.step = 0
        self.position: dict[str, Any] | None = None
        self._iterator: Iterator[BatchT] = iter(())
        self._following: BatchT | None = None
        self._stop = self._ended = False
        self._trouble: str | None = None
        self._unusable = False
        self._others: set[Any] = set()
        self._saved_at = time.monotonic()
        self._start_clock()

    # For subclasses

    @abstractmethod
    def batches(self, epoch: int, start: int, position: dict[str, Any] | None) -> Iterator[BatchT]:
        """Batches of an epoch from its step `start` on; a stream may end early."""

    @abstractmethod
    def train_step(self, batch: BatchT) -> dict[str, Any] | None:
        """Take one optimizer step, call `look_ahead` once in it, and return the position after the batch."""

    @abstractmethod
    def evaluate(self, epoch: int) -> None:
        """Do what is due after `epoch` epochs; 0 before training."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What all processes share, as JSON, for a checkpoint."""

    @abstractmethod
    def own(self) -> dict[str, Any]:
        """What this process alone has, for a checkpoint: tensors, numbers, strings, and lists and dicts of them."""

    @abstractmethod
    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on from what `state` and `own` gave; models that accelerate prepared are loaded already."""

    @abstractmethod
    def checkpoint_is_due(self, epoch: int | None) -> bool:
        """True if a checkpoint follows this step, after the `epoch`-th epoch or, where None, within one."""

    def log(self, epoch: int) -> None:
        """Write what the meter has; `epoch` counts from 0."""

    @property
    def how_to_resume(self) -> str:
        """Subject of the sentence that ends in `goes on from there`."""
        return 'the same command'

    @property
    def source(self) -> str:
        """Words for the source of the batches, with its settings."""
        return self.title

    # What all jobs do

    def resume(self) -> Found:
        """Go on from the newest complete checkpoint, if there is one; nothing is written.

        Raises:
            InputError: It was written with another number of steps in an epoch, or by another network; or it is there
                and cannot be read.
        """
        accelerator, found = self.accelerator, self.checkpoints.find()
        for path, reason in found.skipped:
            accelerator.print(f'Skipped a damaged checkpoint, {path}: {reason}')
        if found.path is None:
            return found
        if found.state['steps_per_epoch'] != self.steps_per_epoch:
            raise InputError(
                f'{found.path} was written with {found.state["steps_per_epoch"]} steps an epoch, and now there are '
                f'{self.steps_per_epoch}; data.batch_size and the images have to be the same'
            )
        own = self.checkpoints.load(found)
        self.step = found.step
        same_processes = found.state['processes'] == accelerator.num_processes
        if not same_processes and own['position'] is not None and self.step % self.steps_per_epoch:
            raise InputError(
                f'{found.path} lies within an epoch of a stream, where {found.state["processes"]} processes can go on, '
                f'and not {accelerator.num_processes}; launch as many, or move this checkpoint away'
            )
        with fitting(found.path):
            if same_processes:
                self.meter.load_state_dict(own['meter'], accelerator.device)
                self.position = own['position']
            self.restore(found.state, own)
        if not same_processes:
            accelerator.print(
                f'Warning: {found.path} was written by {found.state["processes"]} processes, and now there are '
                f'{accelerator.num_processes}; the run goes on, but not as it would have'
            )
        epoch, step = divmod(self.step, self.steps_per_epoch)
        place = f'after epoch {epoch}' + (f', {step} steps' if step else '')
        accelerator.print(f'Resuming {place}: {found.path}')
        return found

    def train(self) -> None:
        """Train from the current step to the end.

        Raises:
            InputError: There is no batch.
            PreemptedError: A signal asked to stop, or data failed to come; the state is kept.
            StorageError: A checkpoint could not be written; the one before is kept.
        """
        self._others = set(multiprocessing.active_children())
        first, start = divmod(self.step, self.steps_per_epoch)
        self.progress = progress_bar(
            self.epochs * self.steps_per_epoch * self.batch_size,
            self.title,
            self.accelerator.is_main_process,
            initial=self.step * self.batch_size,
            delay=0,
        )
        with closing(self.progress):
            for epoch in range(first, self.epochs):
                self._train_epoch(epoch, start)
                start = 0
                if self._stop and not self.evaluate_before_stop:
                    # An evaluation may take longer than whoever asks to stop allows.
                    self._save_and_stop(evaluated=False)
                due = self.checkpoint_is_due(epoch + 1)
                if due and self.accelerator.num_processes > 1 and not self.evaluate_before_stop:
                    self.save(evaluated=False)  # no signal is heard in the evaluation, which may take long
                self.evaluate_or_stop(epoch + 1)
                if self._stop and epoch + 1 < self.epochs:
                    self._save_and_stop()
                if due:
                    self.save()

    def look_ahead(self, failed: Callable[[], bool] = lambda: False) -> bool:
        """Load the next batch and agree with the other processes, while the device is busy with the backward.

        Returns True if any process cannot go on. `failed` says so of this one, and is called once the batch is there.
        """
        self._following = self._next_batch()
        # Who stops has not asked for a batch, and then only the count tells whether this step is the last.
        ended = self._following is None and (not self._asked_to_stop or (self.step + 1) % self.steps_per_epoch == 0)
        any_failed, self._stop, self._ended = self.agreement.any(failed(), self._asked_to_stop, ended)
        return any_failed

    def a_minute_unsaved(self) -> bool:
        """True, in all processes, once a minute has passed since the last checkpoint, or since there is this job."""
        (passed,) = self.agreement.any(time.monotonic() - self._saved_at > _CHECKPOINT_SECONDS)
        return passed

    def evaluate_or_stop(self, epoch: int) -> None:
        """Call `evaluate`; of a single process, a signal breaks it off, unless it is quick, and it is done on resuming.

        Raises:
            PreemptedError: As `train`.
        """
        if self.evaluate_before_stop or self.accelerator.num_processes > 1:
            self.evaluate(epoch)  # signals would reach several processes at different moments of it
        elif not self._wait(lambda: self.evaluate(epoch) is None, 0):
            self._save_and_stop(evaluated=False)

    def stop_if_asked(self) -> None:
        """Stop if a signal asks any process to; for work of all processes that lies between steps and takes long.

        Raises:
            PreemptedError: As `train`.
        """
        (self._stop,) = self.agreement.any(self._asked_to_stop)
        if self._stop:
            self._save_and_stop()

    def save(self, evaluated: bool = True) -> Path:
        """Write a checkpoint; `evaluated` is false if the evaluation after this step is still to be done.

        Raises:
            StorageError: It could not be written; the one before is kept.
        """
        state = {'step': self.step, 'steps_per_epoch': self.steps_per_epoch, 'evaluated': evaluated}
        self._saved_at = time.monotonic()
        try:
            return self.checkpoints.save({**state, **self.state()}, self.all_own())
        except OSError as error:
            last = self.checkpoints.last
            kept = f'the last whole one is {last}' if last is not None else 'there is none before it'
            raise StorageError(
                f'the checkpoint after step {self.step} could not be written ({error}); {kept}. Make room, and '
                f'{self.how_to_resume} goes on from there',
                PREEMPTED,
            ) from error

    def all_own(self) -> dict[str, Any]:
        """What this process alone has, with its meter and its position."""
        return {'meter': self.meter.state_dict(), 'position': self.position, **self.own()}

    def pace(self) -> dict[str, float]:
        """Images per second, and the share of time spent waiting for data, since the last call or the epoch's start."""
        seconds, images = time.perf_counter() - self._clock, (self.step - self._clock_step) * self.batch_size
        measured = {'images_per_second': images / seconds, 'data_wait': self._waited / seconds}
        self._start_clock()
        return measured

    def _train_epoch(self, epoch: int, start: int) -> None:
        self._start_clock()
        # At its beginning an epoch needs no position, and the one there is belongs to the epoch before.
        self._iterator = self.batches(epoch, start, self.position if start else None)
        self._following = self._next_batch()
        ended = self._following is None and not self._asked_to_stop
        self._stop, self._ended = self.agreement.any(self._asked_to_stop, ended)
        if self._stop:
            self._save_and_stop()
        if self._ended and not start:
            raise InputError(
                f'{self.source}: the stream gave no batch of {self.batch_size}; lower data.batch_size or '
                'data.num_workers, so that every process and worker has images'
            )
        while not self._ended:
            batch = self._following
            assert batch is not None
            self.position = self.train_step(batch)
            self.step += 1
            self.progress.update(self.batch_size)
            if self._ended:
                break
            if self.log_every and self.step % self.log_every == 0:
                self.log(epoch)
            if self._stop:
                self._save_and_stop()
            if self.checkpoint_is_due(None):
                self.save()
        end = (epoch + 1) * self.steps_per_epoch
        if self.step < end:
            self.accelerator.print(
                f'Epoch {epoch + 1} ended {end - self.step} steps early, with the stream of one process; '
                'data.num_samples is what all of them give'
            )
            self.step = end
        self.log(epoch)

    def _save_and_stop(self, evaluated: bool = True) -> None:
        kept = 'there is no state yet'
        if self.step:
            kept = f'the state is in {self.save(evaluated)}'
        reasons = gather_object([(self._unusable, self._reason)])
        unusable, reason = max(reasons, key=lambda each: (each[0], each[1] is not None))
        for worker in set(multiprocessing.active_children()) - self._others:
            worker.kill()  # the end of this process would wait for one that is stopped
            worker.join(1)
        self.accelerator.end_training()
        after = f'after step {self.step} of {self.epochs * self.steps_per_epoch}'
        raise PreemptedError(
            f'{f"stopped {after}: {reason}" if unusable else f"stopped by {reason} {after}"}; {kept}, and '
            f'{self.how_to_resume} goes on from there',
            2 if unusable else self.signals.status,  # not 75, after which a queue would start it over and over
        )

    @property
    def _asked_to_stop(self) -> bool:
        return self.signals.received is not None or self._trouble is not None

    @property
    def _reason(self) -> str | None:
        """Words for what has asked this process to stop."""
        if self.signals.received is _LATE:
            return f'a wait of {self.timeout} s for a batch (data.timeout; {self.source})'
        return self.signals.received.name if self.signals.received is not None else self._trouble

    def _next_batch(self) -> BatchT | None:
        asked = time.perf_counter()
        batch = self._wait(lambda: next(self._iterator, None), self.timeout)
        self._waited += time.perf_counter() - asked
        return batch

    def _wait(self, work: Callable[[], T], at_most: int) -> T | None:
        """The result of work that waits for data, or None where it was broken off."""
        try:
            return self.signals.wait(work, at_most)
        except RuntimeError as error:
            if isinstance(error, DataError):
                self._trouble, self._unusable = str(error), True
                return None
            if not any(words in str(error) for words in _END_OF_WORKERS):
                raise
            self._trouble = f'the end of a data worker ({first_line(error)}{_memory_hint()})'
            return None

    def _start_clock(self) -> None:
        self._clock, self._clock_step, self._waited = time.perf_counter(), self.step, 0.0


def _memory_hint() -> str:
    if not os.path.isdir(_SHARED_MEMORY):
        return ''
    total = shutil.disk_usage(_SHARED_MEMORY).total / 2**20
    return (
        f'; it may have run out of memory, or of shared memory: {_SHARED_MEMORY}, by which workers hand over batches, '
        f'holds {total:.0f} MiB; lower data.num_workers, or enlarge it'
    )
