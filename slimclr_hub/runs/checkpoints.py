"""Checkpoints of a run: written beside, verified, renamed, and only then are older ones removed.

checkpoints/step-00001000/   model, optimizer, scaler, random generators of every process (accelerate's files),
                             process_N.pt   what only process N knows
                             state.json     step, processes, and a hash of every file; its presence makes it complete
"""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash, sync_folder, write_text
from slimclr_hub.weights.tensor_file import TensorFile

STATE = 'state.json'
_PARTIAL = '.partial'
_DAMAGED = '.damaged'


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
    """The newest whole checkpoint in the folder of a run, every byte of which is what was written."""
    skipped: list[tuple[Path, str]] = []
    for path in sorted((folder / 'checkpoints').glob('step-*'), reverse=True):
        if path.suffix in (_PARTIAL, _DAMAGED):
            continue
        try:
            return Found(path, verified(path), tuple(skipped))
        except (OSError, ValueError) as error:
            skipped.append((path, str(error)))
    return Found(skipped=tuple(skipped))


class Checkpoints:
    """The newest `keep` checkpoints of the run in `folder`; all processes call every method together."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self._folder = folder / 'checkpoints'
        self._run = folder
        self._accelerator = accelerator
        self._keep = keep

    def find(self) -> Found:
        """The newest whole checkpoint, found by the main process; damaged ones are put aside under another name."""
        found: list[Any] = [None]
        if self._accelerator.is_main_process:
            found[0] = newest(self._run)
            for path, _ in found[0].skipped:
                os.rename(path, path.with_suffix(_DAMAGED))  # the run will write this step again
        return broadcast_object_list(found)[0]

    def save(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write the state of all processes; nothing of it moves.

        Args:
            state: Goes into state.json, with the optimizer step under `step`.
            own: What only this process knows: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            OSError: It could not be written, or not be read again; older checkpoints are as they were.
        """
        final = self._folder / f'step-{state["step"]:08d}'
        if final.exists():  # the one that this process has resumed from, or has just written
            return final
        self._write(final.with_suffix(_PARTIAL), state, own)
        if self._accelerator.is_main_process:
            os.rename(final.with_suffix(_PARTIAL), final)
            sync_folder(self._folder)
            for old in sorted(self._folder.glob('step-????????'))[: -self._keep]:
                os.rename(old, old.with_suffix(_PARTIAL))  # a kill must not leave half of it under its own name
            for partial in self._folder.glob(f'*{_PARTIAL}'):
                shutil.rmtree(partial)
        self._accelerator.wait_for_everyone()
        return final

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
        try:
            self._accelerator.load_state(str(found.path))
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f'{found.path} does not fit this configuration: {" ".join(str(error).split())[:500]}; start a new run'
            ) from error
        path = found.path / f'process_{self._accelerator.process_index}.pt'
        if not path.exists():
            path = found.path / 'process_0.pt'
        return torch.load(path, map_location='cpu', weights_only=True)

    def _write(self, path: Path, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        torch.save(dict(own), path / f'process_{accelerator.process_index}.pt')
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {file.name: _settled(file) for file in sorted(path.iterdir())}
            write_text(path / STATE, json.dumps({**state, 'processes': accelerator.num_processes, 'files': files}))
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
    """The state.json of a checkpoint; a ValueError if a file is missing or changed, an OSError if it cannot be read."""
    if not (path / STATE).is_file():
        raise ValueError(f'it has no {STATE}')
    state = json.loads((path / STATE).read_text())
    for name, digest in state['files'].items():
        if not (path / name).is_file():
            raise ValueError(f'{name} is missing')
        if file_hash(path / name, 'sha256') != digest:
            raise ValueError(f'{name} is not what was written')
    return state
