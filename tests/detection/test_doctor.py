"""What `slimclr-hub doctor` finds: here, where everything is installed; where something is not; and the fork."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from slimclr_hub import cli
from slimclr_hub.detection.doctor import EXTRA, FORK, PINNED, WANTED, Data, Part, Report, examine
from tests.hub.files import ROOT, Ended

DISTRIBUTIONS = {
    'torch': 'torch',
    'torchvision': 'torchvision',
    'timm': 'timm',
    'mmengine': 'mmengine',
    'mmcv': 'mmcv-lite',
    'mmdet': 'mmdet',
    'mim': 'openmim',
    'accelerate': 'accelerate',
    'setuptools': 'setuptools',
}


def doctor(*arguments: object, path: Path | None = None, cwd: Path | None = None) -> Ended:
    """The command in a process, which finds packages in `path` before those that are installed."""
    environment = {name: value for name, value in os.environ.items() if name != 'COCO_ROOT'}
    found = [str(path)] if path else []
    environment['PYTHONPATH'] = os.pathsep.join([*found, str(ROOT)])
    argv = [sys.executable, '-m', 'slimclr_hub.cli', 'doctor', *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=cwd)
    return Ended(done.returncode, done.stdout, done.stderr)


def row(out: str, name: str) -> list[str]:
    """The cells of the line of a package, those that are not empty."""
    (line,) = (line for line in out.splitlines() if line.startswith(f'  {name} '))
    return re.split(r'  +', line.strip())


def coco(folder: Path, without: str = '') -> Path:
    """A folder as COCO is unpacked, with three images for training and two for validation."""
    for name, count in {'train2017': 3, 'val2017': 2}.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f'{i:012}.jpg').touch()
        (folder / name / 'notes.txt').touch()
        (folder / 'annotations').mkdir(exist_ok=True)
        (folder / 'annotations' / f'instances_{name}.json').write_text('not even JSON')
    if without:
        (folder / without).unlink()
    return folder


def install(site: Path, module: str, distribution: str, version: str, text: str = '') -> None:
    """A package as pip leaves it: the module, and what says of which distribution it is."""
    (site / module).mkdir(parents=True)
    (site / module / '__init__.py').write_text(text)
    about = site / f'{distribution.replace("-", "_")}-{version}.dist-info'
    about.mkdir()
    (about / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n')


def test_here(tmp_path):
    """Everything is installed, and there are no data, which is told."""
    ended = doctor(cwd=tmp_path)
    assert (ended.status, ended.err) == (0, '')
    assert row(ended.out, 'python')[1:3] == ['.'.join(map(str, sys.version_info[:3])), 'ok']
    for name, distribution in DISTRIBUTIONS.items():
        assert row(ended.out, name)[1:4] == [metadata.version(distribution), 'ok', distribution]
    assert row(ended.out, 'mmcv')[-1] == 'ops: torchvision (fallback)'
    assert row(ended.out, 'mim')[-1] == str(Path(sys.executable).parent / 'mim')
    gpus = torch.cuda.device_count()
    assert ('no GPU' in row(ended.out, 'torch')[-1]) == (gpus == 0)
    assert 'To fine-tune with MMDetection: mim train mmdet transfer/mask_rcnn_slim.py\n' in ended.out
    assert ('--launcher pytorch' in ended.out) == (gpus > 1)
    assert 'For detectors of torchvision, torch, torchvision and timm are enough; they are there.\n' in ended.out
    assert 'To install' not in ended.out
    assert ended.out.endswith(
        'data/coco: no annotations/instances_train2017.json\ndata/coco: no annotations/instances_val2017.json\n'
        'data/coco: no train2017/\ndata/coco: no val2017/\n'
    )


def install_fork(site: Path, mmengine: str) -> None:
    """Stands in for the maintained fork: its names, and versions of it."""
    install(site, 'mmengine', 'onedl-mmengine', mmengine)
    install(site, 'mmcv', 'onedl-mmcv', '2.3.6')
    install(site, 'mmdet', 'onedl-mmdetection', '3.5.1')
    install(site, 'mim', 'onedl-mim', '0.5.1')


def test_the_fork(tmp_path):
    """It is what Python would import, though upstream's is installed, too; it has compiled operators."""
    install_fork(tmp_path, mmengine='0.10.12')
    (tmp_path / 'mmcv' / '_ext.py').touch()
    ended = doctor('--data', coco(tmp_path / 'coco'), path=tmp_path)
    assert (ended.status, ended.err) == (0, '')
    assert row(ended.out, 'mmengine')[1:] == ['0.10.12', 'ok', 'onedl-mmengine']
    assert row(ended.out, 'mmcv')[1:] == ['2.3.6', 'ok', 'onedl-mmcv', 'ops: compiled']
    assert row(ended.out, 'mmdet')[1:] == ['3.5.1', 'ok', 'onedl-mmdetection']
    assert row(ended.out, 'mim')[1:4] == ['0.5.1', 'ok', 'onedl-mim']
    assert 'setuptools' not in ended.out  # only upstream's mmengine and openmim import pkg_resources
    assert 'To fine-tune with MMDetection: mim train onedl-mmdetection transfer/mask_rcnn_slim.py\n' in ended.out
    assert ended.out.endswith(f'{tmp_path}/coco/train2017: 3 images\n{tmp_path}/coco/val2017: 2 images\n')


def test_too_old_and_broken(tmp_path):
    """As when operators were compiled for another torch, and when mmdet asserts that versions fit."""
    install_fork(tmp_path, mmengine='0.10.6')
    (tmp_path / 'mmcv' / '_ext.py').write_text("raise ImportError('_ext.so: undefined symbol: _ZN3c10\\nmore')")
    (tmp_path / 'mmdet' / '__init__.py').write_text("raise AssertionError('MMCV==9 is used but incompatible.')")
    ended = doctor(path=tmp_path)
    assert (ended.status, ended.err) == (1, '')
    assert row(ended.out, 'mmengine')[1:] == ['0.10.6', 'too old', 'onedl-mmengine', '0.10.7 or newer']
    assert row(ended.out, 'mmcv')[1:4] == ['2.3.6', 'broken', 'onedl-mmcv']
    assert row(ended.out, 'mmcv')[4].endswith('ImportError: _ext.so: undefined symbol: _ZN3c10')
    assert row(ended.out, 'mmdet')[2:] == [
        'broken',
        'onedl-mmdetection',
        'AssertionError: MMCV==9 is used but incompatible.',
    ]
    assert 'To install what is missing: pip install "onedl-mmengine>=0.10.7"\n' in ended.out
    assert 'To fine-tune with MMDetection' not in ended.out


@pytest.fixture
def command(monkeypatch, capsys):
    """`slimclr-hub doctor` in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, 'argv', ['slimclr-hub', 'doctor', *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_without_mmdet(command, monkeypatch, tmp_path):
    for name in ('mmdet', 'mmcv', 'accelerate'):
        monkeypatch.setitem(sys.modules, name, None)  # as Python marks what cannot be imported
    ended = command('--data', coco(tmp_path))
    assert (ended.status, ended.err) == (1, '')
    assert row(ended.out, 'mmcv') == ['mmcv', 'missing']
    assert row(ended.out, 'mmdet') == ['mmdet', 'missing']
    assert row(ended.out, 'accelerate') == ['accelerate', 'missing (not needed)']
    assert f'To install what is missing: {EXTRA}\nTo install what is missing: {FORK}\n' in ended.out
    assert 'mim train' not in ended.out
    assert 'For detectors of torchvision, torch, torchvision and timm are enough; they are there.\n' in ended.out


def test_without_mmcv_alone(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    ended = command()
    assert ended.status == 1
    assert 'To install what is missing: pip install "mmcv-lite==2.1.0"\n' in ended.out


def test_without_pkg_resources(command, monkeypatch):
    """As with setuptools 81."""
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    ended = command()
    assert ended.status == 1
    assert row(ended.out, 'setuptools')[2] == 'broken'
    assert 'To install what is missing: pip install "setuptools<81"\n' in ended.out


def test_what_is_not_needed_does_not_count(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    assert command().status == 0


def test_data_that_were_asked_for_count(command, tmp_path):
    missing = 'annotations/instances_val2017.json'
    ended = command('--data', coco(tmp_path / 'coco', without=missing))
    assert ended.status == 1
    assert ended.out.endswith(f'val2017: 2 images\n{tmp_path}/coco: no {missing}\n')
    assert 'To fine-tune with MMDetection: mim train mmdet' in ended.out  # that much could start


def test_where_data_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv('COCO_ROOT', str(coco(tmp_path / 'set')))
    assert examine(None).data == Data(tmp_path / 'set', {'train2017': 3, 'val2017': 2}, (), asked=True)
    (tmp_path / 'other' / 'val2017').mkdir(parents=True)
    assert examine(tmp_path / 'other').data.missing == (
        'annotations/instances_train2017.json',
        'annotations/instances_val2017.json',
        'train2017/',
        'images in val2017/',
    )
    monkeypatch.setenv('COCO_ROOT', '')
    assert examine(None).data.folder == Path('data/coco')
    assert not examine(None).data.asked


def test_several_gpus():
    """No machine is needed to tell the command."""
    parts = (Part('mmdet', 'mmdet', '3.3.0', 'ok'),)
    single, several = Report(parts, 8, Data(Path('data/coco'), {}, (), asked=False)).commands()
    assert single == 'mim train mmdet transfer/mask_rcnn_slim.py'
    assert several == f'{single} --launcher pytorch --gpus 8'


def test_versions_are_those_that_pip_is_told():
    """The oldest versions, and the pins, of pyproject.toml."""
    required = re.findall(r'^    "([\w.-]+)([=<>]=?)([\d.]+)"', (ROOT / 'pyproject.toml').read_text(), flags=re.M)
    lowest = {name: version for name, operator, version in required if operator in ('==', '>=')}
    told = {name: wanted.minimum for wanted in WANTED for name in wanted.distributions if name in lowest}
    assert told == {name: lowest[name] for name in told}
    assert {'torch', 'timm', 'mmengine', 'mmcv-lite', 'mmdet', 'openmim', 'accelerate'} == set(told)
    pins = {f'"{"".join(parts)}"' for parts in required}
    for name in ('mmengine', 'mmcv-lite', 'mmdet', 'openmim', 'setuptools'):
        assert set(PINNED[name].split()) <= pins
