"""MMDetection's own command on the coins: train, evaluate every width, resume, test one width; and without COCO."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest
import torch

from slimclr_hub import cli
from slimclr_hub.detection.mmengine_files import allow_mmengine_checkpoints
from tests.scripts import Script, end_well

CONFIGS = Path(__file__).parents[2] / 'transfer'
COINS = CONFIGS / 'mask_rcnn_slim_coins.py'
WIDTHS = ('1.00', '0.75', '0.50', '0.25')
SMALL = [
    'train_dataloader.dataset.times=1',
    'train_dataloader.dataset.dataset.pipeline.2.scale=(96,96)',
    'val_dataloader.dataset.pipeline.1.scale=(96,96)',
    'test_dataloader.dataset.pipeline.1.scale=(96,96)',
    'train_dataloader.dataset.dataset.indices=2',  # a batch
    'val_dataloader.dataset.indices=1',
    'test_dataloader.dataset.indices=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.logger.interval=1',
    'model.test_cfg.rcnn.max_per_img=10',
    'model.test_cfg.rcnn.score_thr=0.0',
]
MIM = shutil.which('mim', path=str(Path(sys.executable).parent))


def mim(place, command, config, *arguments, status=0, **environment):
    """Return what `mim COMMAND mmdet CONFIG ...` prints, in the order in which a terminal shows it."""
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', **environment}
    environment.pop('COCO_ROOT', None)
    done = subprocess.run(
        [MIM, command, 'mmdet', str(config), *arguments],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        # Background jobs of a shell ignore SIGINT, which mim has to see as in a terminal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


def test_missing_coco_is_the_last_line(tmp_path):
    """The remedy is the last line, neither above mim's traceback nor above a log."""
    printed = mim(tmp_path, 'train', CONFIGS / 'faster_rcnn_slim.py', status=1)
    missing = r'no annotations/instances_train2017\.json and no train2017/ in data/coco'
    assert re.search(rf'\nError: {missing}; COCO 2017 .* COCO_ROOT .*\n\s*Aborted!\n$', printed), printed[-3000:]
    assert 'Traceback' not in printed


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('coins')


@pytest.fixture(scope='module')
def trained(place):
    """Train the first of two epochs, and return what mim printed."""
    return mim(place, 'train', COINS, '--cfg-options', *SMALL, 'train_cfg.max_epochs=1')


@pytest.fixture(scope='module')
def run(place, trained):
    return place / 'work_dirs' / 'mask_rcnn_slim_coins'


@pytest.fixture(scope='module')
def resumed(place, run):
    return mim(place, 'train', COINS, '--resume', '--cfg-options', *SMALL, 'train_cfg.max_epochs=2')


def scalars(run, index):
    file = sorted(run.glob('*/vis_data/scalars.json'))[index]
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_trains_and_logs_every_width(trained, run):
    steps = [record for record in scalars(run, 0) if 'lr' in record]
    assert len(steps) == 1
    for record in steps:
        losses = [record[f'width_{width}/loss'] for width in WIDTHS]
        assert record['loss'] == pytest.approx(sum(losses), rel=1e-4)
        assert all(0 < loss < 20 for loss in losses)
        assert all(f'width_{width}/loss_mask' in record for width in WIDTHS)
    assert 'random weights at widths 1.0, 0.75, 0.5, 0.25' in trained


def test_evaluates_boxes_and_masks_of_every_width(trained, run):
    (metrics,) = [record for record in scalars(run, 0) if 'lr' not in record]
    kept = json.loads((run / 'ap_by_width.json').read_text())['1']
    for width in WIDTHS:
        for kind in 'bbox', 'segm':
            key = f'width_{width}/coco/{kind}_mAP'
            assert 0 <= metrics[key] <= 1
            assert kept[key] == metrics[key]
    table = trained[trained.index('Average precision (%) by width after epoch 1') :]
    assert re.search(r'\| width \| backbone \| box AP \| box AP50 \| box AP75 \| mask AP', table)
    assert re.search(r'\n\| +0\.25 \| +1\.5 M \| +\d', table)
    assert (run / 'ap_by_width.png').stat().st_size > 5000


def test_checkpoint_holds_every_width(run, trained):
    allow_mmengine_checkpoints()
    tensors = torch.load(run / 'epoch_1.pth', weights_only=True)['state_dict']
    for key in 'w100', 'w075', 'w050', 'w025':
        assert tensors[f'backbone.network.layer4.2.bn3.{key}.num_batches_tracked'] == 1


def test_resumes(resumed, run):
    assert 'resumed epoch: 1, iter: 1' in resumed
    assert [record['iter'] for record in scalars(run, 1) if 'lr' in record] == [2]
    assert [*json.loads((run / 'ap_by_width.json').read_text())] == ['1', '2']
    allow_mmengine_checkpoints()
    tensors = torch.load(run / 'epoch_2.pth', weights_only=True)['state_dict']
    assert tensors['backbone.network.bn1.w025.num_batches_tracked'] == 2
    assert (run / 'epoch_1.pth').exists()


@pytest.fixture(scope='module')
def linked(tmp_path_factory):
    """Copy mmcv-lite and link operators into it by the command."""
    folder = tmp_path_factory.mktemp('linked')
    shutil.copytree(Path(mmcv.__file__).parent, folder / 'mmcv')
    environment = {'PYTHONPATH': f'{folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    words = 'doctor', '--link-ops'
    printed = end_well(Script(Path(cli.__file__), *words, folder=folder, variables={**os.environ, **environment}))
    if type(mmcv._ext).__name__ == 'StandIn':  # not compiled
        assert f'Written: {folder / "mmcv" / "_ext.py"}' in printed
        assert 'ops: torchvision (linked)' in printed
    return environment


def test_one_width_of_a_checkpoint(place, run, resumed, linked):
    options = ['--cfg-options', 'test_cfg.widths=0.5', *SMALL, 'test_evaluator.outfile_prefix=found']
    printed = mim(place, 'test', COINS, '--checkpoint', str(run / 'epoch_2.pth'), *options, **linked)
    before = json.loads((run / 'ap_by_width.json').read_text())['2']
    found = dict(re.findall(r'(width_[\d.]+/coco/\w+_mAP): (-?[\d.]+)', printed))
    assert {*found} == {'width_0.50/coco/bbox_mAP', 'width_0.50/coco/segm_mAP'}
    for key, value in found.items():
        assert float(value) == pytest.approx(before[key], abs=6e-4)
    assert (place / 'found.width_0.50.bbox.json').exists()
