"""Check that fine-tuning a detector could start: installed packages, the command to type, data files.

No check needs the package it looks for: an import that fails becomes a row of the report.
"""

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from slimclr_hub.detection.coco import FILES, coco_root
from slimclr_hub.errors import InputError
from slimclr_hub.text import first_line

CONFIG = Path('transfer/mask_rcnn_slim.py')
EXTRA = 'pip install "slimclr-hub[transfer]"'
FORK = 'pip install -U onedl-mim onedl-mmengine "onedl-mmdetection[mminstall]"'
FALLBACK = 'ops: torchvision (fallback)'
OPTIONAL = {'accelerate'}

DISTRIBUTIONS = {
    **{name: (name,) for name in ('torch', 'torchvision', 'timm')},
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv-lite', 'mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mim': ('openmim', 'onedl-mim'),
    'pkg_resources': ('setuptools',),  # imported by upstream's mmengine and openmim; setuptools 81 dropped it
    'accelerate': ('accelerate',),
}
"""Module -> distributions that provide it; the first is the one that slimclr-hub requires, the fork's is the last."""


@dataclass
class Package:
    """One row of the report, with a state of `ok`, `too old`, `missing` or `broken`."""

    state: str = 'ok'
    distribution: str = ''
    version: str = ''
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Result of `examine`; `files` counts the files at each required path, 0 if it is missing or empty.

    `problem` says why they are not known, where a config cannot be run.
    """

    packages: dict[str, Package]
    gpus: int
    config: Path
    files: dict[Path, int]
    problem: str = ''

    @property
    def installed(self) -> bool:
        """True if every package that MMDetection needs is ok."""
        return self._all_ok(self.packages.keys() - OPTIONAL)

    @property
    def ready(self) -> bool:
        """True if training could start: every needed package is ok, and no required file is missing."""
        return self.installed and not self.problem and all(self.files.values())

    def lines(self) -> list[str]:
        """Return what to install, what to type, and which files are there, a line each."""
        lines = [f'To install what is missing: {command}' for command in self._remedies()]
        if self.installed:
            # The fork does not answer to mmdet, though that is what Python imports.
            command = f'mim train {self.packages["mmdet"].distribution or "mmdet"} {self.config}'
            lines.append(f'To fine-tune with MMDetection: {command}')
            if self.gpus > 1:
                lines.append(f'{lines[-1]} --launcher pytorch --gpus {self.gpus}')
            if FALLBACK in self.packages['mmcv'].notes:
                lines.append('For `mim test`, once: slimclr-hub doctor --link-ops')
        else:
            lines.append('Fine-tuning with MMDetection cannot start: see the states that are not ok.')
        state = 'are ok' if self._all_ok(('torch', 'torchvision', 'timm')) else 'are not all ok'
        lines.append(f"torchvision's Mask R-CNN needs torch, torchvision and timm alone; they {state}.")
        for path, count in self.files.items():
            there = f'{count:,} files' if path.is_dir() else 'ok'
            lines.append(f'{path}: {there if count else "missing"}')
        if self.problem:
            lines.append(self.problem)
        return lines

    def _all_ok(self, names: Iterable[str]) -> bool:
        return all(self.packages[name].state == 'ok' for name in names)

    def _remedies(self) -> list[str]:
        lacking = [p for name, p in self.packages.items() if name not in OPTIONAL and p.state in ('missing', 'too old')]
        if not lacking:
            return []
        if any(package.distribution.startswith('onedl-') for package in self.packages.values()):
            return [FORK]
        if self.packages['mmcv'].distribution == 'mmcv':  # compiled; the extra would put mmcv-lite over it
            extra = [r for r in _requirements() if 'transfer' in str(r.marker) and r.name != 'mmcv-lite']
            return ['pip install ' + ' '.join(f'"{r.name}{r.specifier}"' for r in extra)]
        return [EXTRA, FORK] if self.packages['mmdet'].state == 'missing' else [EXTRA]


def examine(config: Path | None = None, data: Path | None = None, with_files: bool = True) -> Report:
    """Look at the installed packages and at the files that a config needs.

    Args:
        config: Config of MMDetection, which is run if MMDetection is installed; `CONFIG`, on COCO, unless given.
        data: Folder of COCO, in place of the environment variable `COCO_ROOT`.
        with_files: False to skip the files.

    Raises:
        InputError: `config` does not exist.
    """
    if config is not None and not config.is_file():
        raise InputError(f'{config} does not exist or is not a file')
    if data is not None:
        os.environ['COCO_ROOT'] = str(data)  # as configs read it
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of packages about packages that they import
        packages = {module: _examine(module) for module in DISTRIBUTIONS}
    if packages['mmengine'].distribution != 'mmengine' and packages['mim'].distribution != 'openmim':
        del packages['pkg_resources']
    gpus = _add_devices(packages['torch'])
    _add_operators(packages['mmcv'], packages['torchvision'])
    if (mim := packages['mim']).state in ('ok', 'too old'):
        path = shutil.which('mim', path=str(Path(sys.executable).parent)) or shutil.which('mim')
        mim.state = mim.state if path else 'missing'
        mim.notes.append(path or 'no command mim beside python or on PATH')
    report = Report(packages, gpus, config or CONFIG, {})
    if with_files and (config is None or report.installed):
        try:
            report.files = _files(config)
        except InputError as error:  # a config that reads the classes of a file, and the file is missing
            report.problem = str(error)
    return report


def _examine(module: str) -> Package:
    spec = find_spec(module)
    if spec is None:
        return Package('missing')
    package = Package()
    parents = [Path(place).parent for place in spec.submodule_search_locations or ()]
    # Both upstream and the fork may have left metadata; an editable install has no module beside its own.
    found = [d for name in DISTRIBUTIONS[module] for d in metadata.distributions(name=name)]
    if found := [d for d in found if Path(str(d.locate_file(''))) in parents] or found:
        package.distribution, package.version = found[0].metadata['Name'], found[0].version
    try:
        importlib.import_module(module)
    except Exception as error:  # mmdet asserts, compiled extensions raise OSError
        return Package('broken', package.distribution, package.version, [_first_line(error)])
    specifiers = [s for r in _requirements() if r.name == DISTRIBUTIONS[module][0] for s in r.specifier]
    minimum = [s.version for s in specifiers if s.operator in ('==', '>=')]
    if minimum and package.version and Version(package.version) < Version(minimum[0]):
        package.state, package.notes = 'too old', [f'{minimum[0]} or newer']
    return package


def _requirements() -> list[Requirement]:
    """Return what slimclr-hub itself requires, extras included; nothing if it is not installed."""
    return [Requirement(line) for d in metadata.distributions(name='slimclr-hub') for line in d.requires or ()]


def _first_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {first_line(error)}'


def _add_devices(package: Package) -> int:
    if package.state != 'ok':
        return 0
    import torch

    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old is a warning
        warnings.simplefilter('always')
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    package.notes.append(f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA')
    reasons = ['no GPU', *(str(warning.message).partition('\n')[0] for warning in caught[:1])]
    package.notes += [f'{count} x {torch.cuda.get_device_name(0)}'] if count else reasons
    return count


def _add_operators(mmcv: Package, torchvision: Package) -> None:
    spec = find_spec('mmcv')
    if mmcv.state in ('missing', 'broken') or spec is None:
        return
    # On disk, since slimclr_hub itself puts a module of this name into sys.modules.
    if PathFinder.find_spec('mmcv._ext', list(spec.submodule_search_locations or ())):
        try:
            operators = type(importlib.import_module('mmcv._ext')).__name__
            note = 'ops: torchvision (linked)' if operators == 'StandIn' else 'ops: compiled'
        except Exception as error:
            mmcv.state, note = 'broken', f'ops: made for another torch? {_first_line(error)}'
    elif torchvision.state == 'ok':
        note = FALLBACK
    else:
        mmcv.state, note = 'broken', 'ops: missing'
    mmcv.notes.append(note)


def _files(config: Path | None) -> dict[Path, int]:
    required = [coco_root() / name for name in FILES]
    if config is not None:
        from slimclr_hub.detection.mmengine_files import run_config

        cfg, required = run_config(config), []
        for loader in ('train_dataloader', 'val_dataloader'):
            dataset = (cfg.get(loader) or {}).get('dataset', {})  # None where nothing is validated
            while 'dataset' in dataset:  # repeated, or wrapped otherwise
                dataset = dataset['dataset']
            if dataset.get('type') != 'CoinsFolder':  # written when training starts
                names = (dataset.get('ann_file'), dataset.get('data_prefix', {}).get('img'))
                required += [Path(dataset.get('data_root') or '') / name for name in names if name]
    return {path: len(os.listdir(path)) if path.is_dir() else int(path.exists()) for path in required}
