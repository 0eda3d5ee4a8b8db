"""`slimclr-hub doctor` where everything is installed, where something is missing, and with the maintained fork."""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from slimclr_hub import cli
from slimclr_hub.detection.doctor import DISTRIBUTIONS, EXTRA, FORK, Package, Report
from tests.hub.files import ROOT, Ended
from tests.scripts import Script

ALONE = "torchvision's Mask R-CNN needs torch, torchvision and timm alone; they are ok.\n"


def doctor(*arguments: object, folder: Path) -> Ended:
    """Run the command in a process in `folder`, which finds packages there before the installed ones."""
    variables = {name: value for name, value in os.environ.items() if name != 'COCO_ROOT'}
    variables['PYTHONPATH'] = str(folder)
    script = Script(Path(cli.__file__), 'doctor', *arguments, folder=folder, variables=variables)
    return Ended(script.end(), script.stdout, script.stderr)


def row(out: str, name: str) -> list[str]:
    """Return the cells of a package's row that are not empty."""
    (line,) = (line for line in out.splitlines() if line.startswith(f'  {name} '))
    return re.split(r'  +', line.strip())


def coco(folder: Path, without: str = '') -> Path:
    """Create the folder of COCO with three images for training and two for validation."""
    for name, count in {'train2017': 3, 'val2017': 2}.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f'{i:012}.jpg').touch()
        (folder / 'annotations').mkdir(exist_ok=True)
        (folder / 'annotations' / f'instances_{name}.json').write_text('not even JSON')
    if without:
        (folder / without).unlink()
    return folder


def install(site: Path, module: str, distribution: str, version: str, text: str = '') -> None:
    """Create a package as pip installs it: the module, and metadata of its distribution."""
    (site / module).mkdir(parents=True)
    (site / module / '__init__.py').write_text(text)
    about = site / f'{distribution.replace("-", "_")}-{version}.dist-info'
    about.mkdir()
    (about / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n')


def test_here(tmp_path):
    """Everything is installed; COCO, which the default config needs, is missing."""
    ended = doctor(folder=tmp_path)
    assert (ended.status, ended.err) == (1, '')
    for name, (distribution, *_) in DISTRIBUTIONS.items():
        assert row(ended.out, name)[1:4] == [metadata.version(distribution), 'ok', distribution]
    assert row(ended.out, 'mmcv')[-1] == 'ops: torchvision (fallback)'
    assert row(ended.out, 'mim')[-1] == str(Path(sys.executable).parent / 'mim')
    gpus = torch.cuda.device_count()
    assert ('no GPU' in row(ended.out, 'torch')[-1]) == (gpus == 0)
    assert 'To fine-tune with MMDetection: mim train mmdet transfer/mask_rcnn_slim.py\n' in ended.out
    assert ('--launcher pytorch' in ended.out) == (gpus > 1)
    assert ALONE in ended.out
    assert 'To install' not in ended.out
    assert ended.out.endswith(
        'data/coco/annotations/instances_train2017.json: missing\n'
        'data/coco/annotations/instances_val2017.json: missing\n'
        'data/coco/train2017: missing\ndata/coco/val2017: missing\n'
    )


def install_fork(site: Path, mmengine: str) -> None:
    """Create packages with names and versions of the maintained fork."""
    install(site, 'mmengine', 'onedl-mmengine', mmengine)
    install(site, 'mmcv', 'onedl-mmcv', '2.3.6')
    install(site, 'mmdet', 'onedl-mmdetection', '3.5.1')
    install(site, 'mim', 'onedl-mim', '0.5.1')


def test_the_fork(tmp_path):
    """Python would import the fork, with compiled operators, though upstream's is installed, too."""
    install_fork(tmp_path, mmengine='0.10.12')
    (tmp_path / 'mmcv' / '_ext.py').touch()
    ended = doctor('--data', coco(tmp_path / 'coco'), folder=tmp_path)
    assert (ended.status, ended.err) == (0, '')
    assert row(ended.out, 'mmengine')[1:] == ['0.10.12', 'ok', 'onedl-mmengine']
    assert row(ended.out, 'mmcv')[1:] == ['2.3.6', 'ok', 'onedl-mmcv', 'ops: compiled']
    assert row(ended.out, 'mmdet')[1:] == ['3.5.1', 'ok', 'onedl-mmdetection']
    assert row(ended.out, 'mim')[1:4] == ['0.5.1', 'ok', 'onedl-mim']
    assert 'pkg_resources' not in ended.out  # only upstream's mmengine and openmim import pkg_resources
    assert 'To fine-tune with MMDetection: mim train onedl-mmdetection transfer/mask_rcnn_slim.py\n' in ended.out
    assert ended.out.endswith(f'{tmp_path}/coco/train2017: 3 files\n{tmp_path}/coco/val2017: 2 files\n')


def test_too_old_and_broken(tmp_path):
    """Operators compiled for another torch and a failed assertion of mmdet are reported by their first line."""
    install_fork(tmp_path, mmengine='0.10.6')
    (tmp_path / 'mmcv' / '_ext.py').write_text("raise ImportError('_ext.so: undefined symbol: _ZN3c10\\nmore')")
    (tmp_path / 'mmdet' / '__init__.py').write_text("raise AssertionError('MMCV==9 is used but incompatible.')")
    ended = doctor(folder=tmp_path)
    assert (ended.status, ended.err) == (1, '')
    assert row(ended.out, 'mmengine')[1:] == ['0.10.6', 'too old', 'onedl-mmengine', '0.10.7 or newer']
    assert row(ended.out, 'mmcv')[1:4] == ['2.3.6', 'broken', 'onedl-mmcv']
    assert row(ended.out, 'mmcv')[4].endswith('ImportError: _ext.so: undefined symbol: _ZN3c10')
    assert row(ended.out, 'mmdet')[2:] == [
        'broken',
        'onedl-mmdetection',
        'AssertionError: MMCV==9 is used but incompatible.',
    ]
    assert f'To install what is missing: {FORK}\n' in ended.out
    assert 'To fine-tune with MMDetection' not in ended.out


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`slimclr-hub doctor` in this process, with COCO in `tmp_path / 'coco'`."""
    monkeypatch.setenv('COCO_ROOT', str(coco(tmp_path / 'coco')))

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, 'argv', ['slimclr-hub', 'doctor', *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_without_mmdet(command, monkeypatch):
    for name in ('mmdet', 'mmcv', 'accelerate'):
        monkeypatch.setitem(sys.modules, name, None)  # as Python marks what cannot be imported
    ended = command()
    assert (ended.status, ended.err) == (1, '')
    assert row(ended.out, 'mmcv') == ['mmcv', 'missing']
    assert row(ended.out, 'mmdet') == ['mmdet', 'missing']
    assert row(ended.out, 'accelerate') == ['accelerate', 'missing (not needed)']
    assert f'To install what is missing: {EXTRA}\nTo install what is missing: {FORK}\n' in ended.out
    assert 'mim train' not in ended.out
    assert ALONE in ended.out


@pytest.mark.parametrize('module', ['mmcv', 'pkg_resources'])
def test_without_one_package(command, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    ended = command()
    assert ended.status == 1
    assert row(ended.out, module)[1] == 'missing'
    assert f'To install what is missing: {EXTRA}\n' in ended.out


def test_compiled_mmcv_is_not_replaced(tmp_path):
    """The extra would install mmcv-lite over it."""
    install(tmp_path, 'mmcv', 'mmcv', '2.0.0')
    (tmp_path / 'mmcv' / '_ext.py').touch()
    ended = doctor(folder=tmp_path)
    assert row(ended.out, 'mmcv')[1:] == ['2.0.0', 'too old', 'mmcv', '2.1.0 or newer, ops: compiled']
    (remedy,) = (line for line in ended.out.splitlines() if line.startswith('To install'))
    assert '"mmdet==3.3.0"' in remedy
    assert '"setuptools<81"' in remedy
    assert 'mmcv-lite' not in remedy


def test_optional_packages_do_not_count(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    assert command().status == 0


@pytest.mark.parametrize('missing', ['annotations/instances_val2017.json', 'val2017/000000000000.jpg'])
def test_missing_file_or_empty_folder(command, tmp_path, missing):
    folder = coco(tmp_path / 'other', without=missing)
    if missing.endswith('.jpg'):
        (folder / 'val2017' / '000000000001.jpg').unlink()
    assert command().status == 0
    ended = command('--data', folder)
    assert ended.status == 1
    name = missing.removesuffix('/000000000000.jpg')
    assert [line for line in ended.out.splitlines() if line.endswith('missing')] == [f'{folder}/{name}: missing']
    assert 'To fine-tune with MMDetection: mim train mmdet' in ended.out


def test_files_are_those_of_the_config(command, monkeypatch, tmp_path):
    """Boxes need COCO as masks do, the coins need nothing, and a data set of one's own needs its own files."""
    monkeypatch.delenv('COCO_ROOT')
    monkeypatch.chdir(tmp_path)
    ended = command('--config', ROOT / 'transfer' / 'faster_rcnn_slim.py')
    assert ended.status == 1
    assert 'data/coco/train2017: missing\n' in ended.out
    coins = ROOT / 'transfer' / 'mask_rcnn_slim_coins.py'
    ended = command('--config', coins)
    assert ended.status == 0
    assert f'mim train mmdet {coins}\n' in ended.out
    assert 'missing' not in ended.out
    own = tmp_path / 'own.py'
    data = "dict(dataset=dict(data_root='mine', ann_file='a.json', data_prefix=dict(img='images/')))"
    own.write_text(f'train_dataloader = {data}\nval_dataloader = {data}\n')
    ended = command('--config', own)
    assert ended.status == 1
    assert ended.out.endswith('\nmine/a.json: missing\nmine/images: missing\n')
    own.write_text(f'train_dataloader = {data}\nval_dataloader = None\n')  # as without validation
    assert command('--config', own).out.endswith('\nmine/a.json: missing\nmine/images: missing\n')


def test_linking_operators_needs_no_data(monkeypatch, tmp_path, command):
    """`mim test` of the coins needs no COCO."""
    monkeypatch.setenv('COCO_ROOT', str(tmp_path / 'nothing'))
    monkeypatch.setattr('slimclr_hub.detection.ops.linked_ops', lambda: tmp_path / '_ext.py')
    ended = command('--link-ops')
    assert ended.status == 0
    assert 'nothing' not in ended.out


def test_no_such_config(command):
    ended = command('--config', 'transfer/nothing.py')
    assert (ended.status, ended.err) == (1, 'Error: transfer/nothing.py does not exist or is not a file\n')


def test_config_that_asks_for_a_file_that_is_missing(command, tmp_path, monkeypatch):
    """Packages are listed all the same; the file is the first mistake with images of one's own."""
    monkeypatch.setenv('COCO_ROOT', str(tmp_path / 'mine'))
    ended = command('--config', ROOT / 'transfer' / 'mask_rcnn_slim_own.py')
    assert (ended.status, ended.err) == (1, '')
    assert row(ended.out, 'mmdet')[2] == 'ok'
    assert f'no annotations/train.json in {tmp_path}/mine' in ended.out.replace('\n', ' ')


def test_several_gpus():
    """The command is told without GPUs."""
    packages = {name: Package() for name in ('mmdet', 'mmcv', 'torch', 'torchvision', 'timm')}
    found = [line for line in Report(packages, 8, Path('a.py'), {}).lines() if 'mim train' in line]
    single = 'To fine-tune with MMDetection: mim train mmdet a.py'
    assert found == [single, f'{single} --launcher pytorch --gpus 8']
