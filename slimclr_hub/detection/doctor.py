"""Whether fine-tuning a detector could start here: what is installed, what to type, and whether COCO's files are there.

Looks at everything without needing any of it: what cannot be imported is a line of the report.
"""

import importlib
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

State = Literal['ok', 'too old', 'missing', 'broken']

CONFIG = 'transfer/mask_rcnn_slim.py'
EXTRA = 'pip install "slimclr-hub[transfer]"'
FORK = 'pip install onedl-mim "onedl-mmdetection[mminstall]"'  # the extra is onedl-mmengine and onedl-mmcv

ANNOTATIONS = ('annotations/instances_train2017.json', 'annotations/instances_val2017.json')
IMAGES = ('train2017', 'val2017')

FALLBACK = 'ops: torchvision (fallback)'
LINKED = 'ops: torchvision (linked)'


@dataclass(frozen=True)
class Wanted:
    """A package that is looked for.

    Args:
        module: What is imported.
        minimum: The oldest version that will do.
        distributions: What it may be installed as: upstream's names, then the maintained fork's. The first one is
            recommended.
        needed: Fine-tuning with MMDetection cannot start without it.
    """

    module: str
    minimum: str
    distributions: tuple[str, ...]
    needed: bool = True


WANTED = (
    Wanted('torch', '2.6', ('torch',)),
    Wanted('torchvision', '0.21', ('torchvision',)),  # the one of torch 2.6
    Wanted('timm', '1.0.31', ('timm',)),
    Wanted('mmengine', '0.10.7', ('mmengine', 'onedl-mmengine')),
    Wanted('mmcv', '2.1.0', ('mmcv-lite', 'mmcv', 'onedl-mmcv')),
    Wanted('mmdet', '3.3.0', ('mmdet', 'onedl-mmdetection')),
    Wanted('mim', '0.3.9', ('openmim', 'onedl-mim')),
    Wanted('accelerate', '1.10', ('accelerate',), needed=False),
)

PINNED = {
    'mmengine': '"mmengine==0.10.7"',
    'mmcv-lite': '"mmcv-lite==2.1.0"',
    'mmcv': '"mmcv>=2.1.0,<2.2"',  # mmdet 3.3 refuses others
    'mmdet': '"mmdet==3.3.0"',
    'openmim': '"openmim==0.3.9" "openxlab<0.0.12"',
    'setuptools': '"setuptools<81"',
}
"""Distribution -> what to ask pip for, where it is not just a version that is new enough."""


@dataclass(frozen=True)
class Part:
    """What was found of one package.

    Args:
        name: What is imported, `python`, or `setuptools`.
        distribution: What it is installed as; empty where that is not known, or nothing is.
        version: Its version, or empty.
        state: Whether it will do.
        needed: Fine-tuning with MMDetection cannot start without it.
        note: Devices of torch, operators of mmcv, where mim is, or the first line of an import's error.
    """

    name: str
    distribution: str
    version: str
    state: State
    needed: bool = True
    note: str = ''


@dataclass(frozen=True)
class Data:
    """What was found of COCO.

    Args:
        folder: Where it was looked for.
        images: Folder of images -> how many it holds, for each that is there.
        missing: What is not there, relative to the folder.
        asked: The user named the folder.
    """

    folder: Path
    images: dict[str, int]
    missing: tuple[str, ...]
    asked: bool


@dataclass(frozen=True)
class Report:
    """All that was found.

    Args:
        parts: The packages.
        gpus: How many GPUs torch sees.
        data: COCO.
    """

    parts: tuple[Part, ...]
    gpus: int
    data: Data

    @property
    def installed(self) -> bool:
        """Everything that MMDetection's way needs will do."""
        return all(part.state == 'ok' for part in self.parts if part.needed)

    @property
    def ready(self) -> bool:
        """Fine-tuning could start: missing data count where the user said where they are."""
        return self.installed and not (self.data.asked and self.data.missing)

    @property
    def torchvision_ready(self) -> bool:
        """Everything that torchvision's way needs will do."""
        return all(part.state == 'ok' for part in self.parts if part.name in ('python', 'torch', 'torchvision', 'timm'))

    @property
    def linkable(self) -> bool:
        """mmcv's operators are torchvision's, and only this package's configs find them."""
        return FALLBACK in _named(self.parts, 'mmcv').note

    def commands(self) -> list[str]:
        """What to type to fine-tune with MMDetection; empty where it is not installed."""
        distribution = _named(self.parts, 'mmdet').distribution
        if not distribution:
            return []
        # The fork does not answer to mmdet, though that is what Python imports.
        command = f'mim train {distribution} {CONFIG}'
        return [command, f'{command} --launcher pytorch --gpus {self.gpus}'] if self.gpus > 1 else [command]

    def remedies(self) -> list[str]:
        """What to install, one command a line; empty where nothing needed is missing or too old."""
        # Where a package of the fork is there, the others are to be of the fork, too.
        fork = any(part.distribution.startswith('onedl-') for part in self.parts)
        if _named(self.parts, 'mmdet').state == 'missing':
            return [FORK] if fork else [EXTRA, FORK]
        wanted = {w.module: w for w in WANTED}
        requirements = []
        for part in self.parts:
            if not part.needed or part.state == 'ok':
                continue
            if part.name == 'setuptools':
                requirements.append(PINNED['setuptools'])
            elif part.name in wanted and part.state != 'broken':
                about = wanted[part.name]
                name = part.distribution or about.distributions[-1 if fork else 0]
                requirements.append(PINNED.get(name, f'"{name}>={about.minimum}"'))
        return [f'pip install {" ".join(requirements)}'] if requirements else []


def examine(data: Path | None) -> Report:
    """Look at what is installed, and for COCO.

    Args:
        data: Folder of COCO; none for the environment variable `COCO_ROOT`, or else `data/coco`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of packages about packages that they import
        parts = {wanted.module: _examine_package(wanted) for wanted in WANTED}
    devices, gpus = _devices() if parts['torch'].state == 'ok' else ('', 0)
    parts['torch'] = _with_note(parts['torch'], devices)
    parts['mmcv'] = _with_operators(parts['mmcv'], parts['torchvision'])
    parts['mim'] = _with_executable(parts['mim'])
    upstream = any(parts[name].distribution in ('mmengine', 'openmim') for name in ('mmengine', 'mim'))
    setuptools = [_setuptools()] if upstream else []  # the fork does without
    return Report((_python(), *parts.values(), *setuptools), gpus, _examine_data(data))


def _named(parts: tuple[Part, ...], name: str) -> Part:
    return next(part for part in parts if part.name == name)


def _with_note(part: Part, note: str, state: State | None = None) -> Part:
    return replace(part, state=state or part.state, note=note or part.note)


def _python() -> Part:
    version = '.'.join(map(str, sys.version_info[:3]))
    return Part('python', '', version, 'ok' if sys.version_info >= (3, 10) else 'too old', note=sys.executable)


def _examine_package(wanted: Wanted) -> Part:
    spec = find_spec(wanted.module)
    if spec is None:
        return Part(wanted.module, '', '', 'missing', wanted.needed)
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    distribution, version = _installed_as(wanted.distributions, places)
    try:
        module = importlib.import_module(wanted.module)
    except Exception as error:  # mmdet asserts, compiled parts raise OSError, others what they like
        return Part(wanted.module, distribution, version, 'broken', wanted.needed, _first_line(error))
    version = version or str(getattr(module, '__version__', ''))
    # What does not tell its version is a checkout, of which the user knows.
    old = bool(version) and _numbers(version) < _numbers(wanted.minimum)
    note = f'{wanted.minimum} or newer' if old else ''
    return Part(wanted.module, distribution, version, 'too old' if old else 'ok', wanted.needed, note)


def _installed_as(names: tuple[str, ...], places: list[Path]) -> tuple[str, str]:
    """Which of the distributions the module is of, and its version; upstream and fork may both have left traces."""
    found = []
    for name in names:
        try:
            found.append((name, metadata.distribution(name)))
        except metadata.PackageNotFoundError:
            continue
    # An editable one lies elsewhere.
    beside = [(name, d) for name, d in found if any(Path(str(d.locate_file(''))) == p.parent for p in places)]
    name, distribution = next(iter(beside or found), ('', None))
    return name, distribution.version if distribution else ''


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', version.partition('+')[0])[:3])


def _first_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


def _devices() -> tuple[str, int]:
    """What torch computes on, and how many GPUs."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'
    if count:
        names = Counter(torch.cuda.get_device_name(i) for i in range(count))
        return f'{built}, ' + ', '.join(f'{number} x {name}' for name, number in names.items()), count
    # A driver that is too old is a warning.
    reasons = [str(warning.message).partition('\n')[0] for warning in caught]
    return ': '.join([f'{built}, no GPU', *reasons[:1]]), 0


def _with_operators(mmcv: Part, torchvision: Part) -> Part:
    """Add where mmcv's operators come from."""
    if mmcv.state in ('missing', 'broken'):
        return mmcv
    # On disk: slimclr_hub puts a module of that name in its place where there is none.
    spec = find_spec('mmcv')
    places = list(spec.submodule_search_locations or ()) if spec else []
    if PathFinder.find_spec('mmcv._ext', places) is not None:
        try:
            operators = importlib.import_module('mmcv._ext')
        except Exception as error:
            return _with_note(mmcv, f'ops: made for another torch? {_first_line(error)}', 'broken')
        if type(operators).__name__ == 'StandIn':  # of slimclr_hub.detection.ops, linked
            return _with_note(mmcv, _joined(mmcv.note, LINKED))
        return _with_note(mmcv, _joined(mmcv.note, 'ops: compiled'))
    if torchvision.state == 'ok':
        return _with_note(mmcv, _joined(mmcv.note, FALLBACK))
    return _with_note(mmcv, _joined(mmcv.note, 'ops: missing'), 'broken')


def _joined(*notes: str) -> str:
    return ', '.join(note for note in notes if note)


def _with_executable(mim: Part) -> Part:
    """Add where the command `mim` is."""
    if mim.state in ('missing', 'broken'):
        return mim
    path = shutil.which('mim', path=str(Path(sys.executable).parent)) or shutil.which('mim')
    if path is None:
        return _with_note(mim, 'no command mim beside python or on PATH', 'missing')
    return _with_note(mim, _joined(mim.note, path))


def _setuptools() -> Part:
    """Upstream's mmengine and openmim import `pkg_resources`, which setuptools 81 and later no longer has."""
    try:
        version = metadata.version('setuptools')
    except metadata.PackageNotFoundError:
        version = ''
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module('pkg_resources')
    except Exception as error:
        state: State = 'broken' if version else 'missing'
        return Part('setuptools', 'setuptools' if version else '', version, state, note=_first_line(error))
    return Part('setuptools', 'setuptools' if version else '', version, 'ok', note='has pkg_resources')


def _examine_data(data: Path | None) -> Data:
    named = data or os.environ.get('COCO_ROOT')
    folder = Path(named or 'data/coco')
    missing = [name for name in ANNOTATIONS if not (folder / name).is_file()]
    images = {}
    for name in IMAGES:
        if not (folder / name).is_dir():
            missing.append(f'{name}/')
            continue
        with os.scandir(folder / name) as entries:
            images[name] = sum(entry.name.lower().endswith(('.jpg', '.jpeg', '.png')) for entry in entries)
        if not images[name]:
            missing.append(f'images in {name}/')
    return Data(folder, images, tuple(missing), asked=bool(named))
