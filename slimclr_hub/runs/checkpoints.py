"""Checkpoints of a run: written beside, verified, renamed, and only then are older ones removed.

checkpoints/step-00001000/   model, optimizer, scaler, random generators of every process (accelerate's files),
                             process_N.pt   what only process N knows
                             state.json     step, processes, a hash of every file and of itself; its presence makes it
                                            complete
"""

import hashlib
import json
import os
import random
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors import SafetensorError

from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash, sync_folder, write_text
from slimclr_hub.text import first_line
from slimclr_hub.weights.tensor_file import TensorFile

STATE = 'state.json'
_NAME = re.compile(r'step-(\d{8})')
_PARTIAL = '.partial'
_DAMAGED = '.damaged'
_SCHEMA: dict[str, type] = {'step': int, 'steps_per_epoch': int, 'evaluated': bool, 'processes': int, 'files': dict}
_DIGEST = 'sha256'  # of the other values; those that earlier versions wrote have none
_PICKLES = ('.bin', '.pt', '.pkl')


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint with its state.json, if any, and newer incomplete ones, with the reasons."""

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[tuple[Path, str], ...] = ()

    @property
    def step(self) -> int:
        """Optimizer step after which it was written; 0 where there is none."""
        return self.state.get('step', 0)


def newest(folder: Path) -> Found:
    """The newest whole checkpoint in the folder of a run, every byte of which is what was written.

    Raises:
        InputError: `checkpoints/`, or a file of a checkpoint, is there and cannot be read: that is no damage.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(_listed(folder / 'checkpoints')):
        try:
            return Found(path, verified(path), tuple(skipped))
        except OSError as error:
            raise InputError(
                f'{path} cannot be read ({error}), and may be whole; make it readable, or move it away to go on from '
                'the one before'
            ) from error
        except ValueError as error:
            skipped.append((path, str(error)))
    return Found(skipped=tuple(skipped))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run in `folder` keeps its checkpoint after `step`."""
    return folder / 'checkpoints' / _name(step)


def _name(step: int) -> str:
    return f'step-{step:08d}'


def _listed(folder: Path) -> list[Path]:
    """Checkpoints under their own names, in order of steps; none only where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        raise InputError(
            f'{folder} cannot be read ({error.strerror}); it may hold checkpoints, so nothing begins anew: make it '
            'readable, or move it away'
        ) from error


class Checkpoints:
    """The newest `keep` checkpoints of the run in `folder`; all processes call every method together."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self._folder = folder / 'checkpoints'
        self._run = folder
        self._accelerator = accelerator
        self._keep = keep
        self._damaged: tuple[Path, ...] = ()

    def find(self) -> Found:
        """The newest whole checkpoint, found by the main process, as `newest` does; `save` puts damaged ones aside."""
        found = from_main_process(lambda: newest(self._run))
        self._damaged = tuple(path for path, _ in found.skipped)
        return found

    def save(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write the state of all processes; nothing of it moves.

        Args:
            state: Goes into state.json, with the optimizer step under `step`.
            own: What only this process knows: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            OSError: It could not be written, or not be read again; older checkpoints are as they were.
        """
        final = checkpoint_path(self._run, state['step'])
        if self._accelerator.is_main_process:
            for path in self._damaged:
                _put_aside(path)
        self._damaged = ()
        self._accelerator.wait_for_everyone()
        if from_main_process(final.exists):  # the one that this process has resumed from, or has just written
            return final
        partial = final.with_suffix(_PARTIAL)
        try:
            self._write(partial, state, own)
        except (OSError, RuntimeError, SafetensorError) as error:
            with suppress(OSError):
                _remove(partial)  # half of it only takes room
            raise error if isinstance(error, OSError) else OSError(first_line(error)) from error
        if self._accelerator.is_main_process:
            os.rename(partial, final)
            sync_folder(self._folder)
            for old in _listed(self._folder)[: -self._keep]:
                with suppress(OSError):  # of one that is protected, or open elsewhere
                    os.rename(old, old.with_suffix(_PARTIAL))  # a kill must not leave half of it under its own name
            for left in self._folder.glob(f'*{_PARTIAL}'):
                with suppress(OSError):
                    _remove(left)
        self._accelerator.wait_for_everyone()
        return final

    @property
    def last(self) -> Path | None:
        """The newest checkpoint in the folder: one that was found or written whole."""
        return next(reversed(_listed(self._folder)), None)

    def save_aside(self, name: str, state: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write the state into a folder of the run beside the checkpoints, from which nothing resumes by itself."""
        path = self._run / name
        self._write(path, state, own)
        return path

    def load(self, found: Found) -> dict[str, Any]:
        """Load a checkpoint into what the accelerator prepared.

        Returns the `own` of this process, or of the first one if fewer processes wrote the checkpoint.

        Raises:
            InputError: It is of another network, method or optimizer.
        """
        assert found.path is not None
        with fitting(found.path):
            self._accelerator.load_state(str(found.path))
            path = found.path / f'process_{self._accelerator.process_index}.pt'
            if not path.exists():
                path = found.path / 'process_0.pt'
            return torch.load(path, map_location='cpu', weights_only=True)

    def _write(self, path: Path, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            _remove(path)
            path.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        torch.save(dict(own), path / f'process_{accelerator.process_index}.pt')
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {file.name: _settled(file) for file in sorted(path.iterdir())}
            for process in range(accelerator.num_processes):
                if f'process_{process}.pt' not in files:
                    raise OSError(
                        f'the file of process {process} is not in {path}; all machines have to share the folder'
                    )
            content = {**state, 'processes': accelerator.num_processes, 'files': files}
            write_text(path / STATE, json.dumps({**content, _DIGEST: _digest(content)}))
            sync_folder(path)


def _settled(path: Path) -> str:
    """Hash of a file that has reached the disk and can be read again."""
    with path.open('rb') as file:
        os.fsync(file.fileno())
    if path.suffix == '.safetensors':
        with TensorFile(path):
            pass
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise OSError(f'{path} was written but reads back damaged, at {damaged}')
    return file_hash(path, 'sha256')


def verified(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose files are what was written, and load.

    Raises:
        ValueError: A file is missing or damaged, or state.json is not that of this step.
        OSError: A file is there and cannot be read.
    """
    state = read_state(path)
    for name, digest in state['files'].items():
        if not _is_file(path / name):
            raise ValueError(f'{name} is missing')
        if file_hash(path / name, 'sha256') != digest:
            raise ValueError(f'{name} is not what was written')
        try:
            _check_loading(path / name)
        except OSError:
            raise
        except Exception as error:  # whatever a foreign pickle or archive makes of its reader
            raise ValueError(f'{name} cannot be loaded: {first_line(error)}') from error
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; errors as of `verified`, which looks at the other files, too."""
    if not _is_file(path / STATE):
        raise ValueError(f'it has no {STATE}')
    try:
        state = json.loads((path / STATE).read_bytes())
    except RecursionError as error:
        raise ValueError(f'{STATE} is nested too deeply') from error
    if not isinstance(state, dict):
        raise ValueError(f'{STATE} is no JSON object')
    digest = state.pop(_DIGEST, None)
    if digest is not None and digest != _digest(state):
        raise ValueError(f'{STATE} is not what was written')
    for name, kind in _SCHEMA.items():
        value = state.get(name)
        if type(value) is not kind or (type(value) is int and value < 1):
            raise ValueError(f'{STATE} has no {name}, but {str(value)[:40]!r}')
    if path.name != _name(state['step']):
        raise ValueError(f'{STATE} is of step {state["step"]}')
    for name, hash_ in state['files'].items():
        if not isinstance(hash_, str) or Path(name).name != name:
            raise ValueError(f'{STATE} has no hash of a file {name[:40]!r}')
    for process in range(state['processes']):
        if f'process_{process}.pt' not in state['files']:
            raise ValueError(f'{STATE} has no hash of process_{process}.pt')
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Context that loads a checkpoint of any content; whatever error that causes becomes an InputError."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        raise InputError(f'{path} does not fit this configuration: {reason}; start a new run') from error


def _check_loading(file: Path) -> None:
    if file.suffix == '.safetensors':
        with TensorFile(file):
            return
    if file.suffix in _PICKLES:
        content = load(file, map_location='cpu')
        if file.name.startswith('random_states_'):
            # Accelerate goes on without those that it cannot set.
            random.Random().setstate(content['random_state'])
            np.random.RandomState().set_state(content['numpy_random_seed'])
            torch.Generator().set_state(content['torch_manual_seed'])


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _is_file(path: Path) -> bool:
    # Path.is_file() takes some errors of the disk for a file that is not there.
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _put_aside(path: Path) -> None:
    names = (path.with_suffix(_DAMAGED + (f'-{number}' if number > 1 else '')) for number in count(1))
    os.rename(path, next(name for name in names if not os.path.lexists(name)))


def _remove(path: Path) -> None:
    """Remove a folder and its files; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
