"""Checkpoints of a real runner of mmengine under torch's check of their content."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pickle import UnpicklingError

import numpy as np
import pytest
import torch

from slimclr_hub.detection.mmengine_files import allow_mmengine_checkpoints

RUNNER = """
import sys
sys.modules['transformers'] = None  # whose optimizers mmengine would import for seconds
import json, sys
import numpy as np, torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint

folder, epochs, resume_from, allow = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None, sys.argv[4] == 'allow'
if allow:
    from slimclr_hub.detection.mmengine_files import allow_mmengine_checkpoints
    allow_mmengine_checkpoints()

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def forward(self, inputs, mode='tensor'):
        y = self.layer(torch.stack(inputs))
        return {'loss': y.square().mean()} if mode == 'loss' else [y]

class Metric(BaseMetric):
    def process(self, batch, outputs):
        self.results.append(len(outputs))
    def compute_metrics(self, results):
        return {'score': np.float32(sum(results) / 8)}

told = {}

class Tell(Hook):
    def before_train(self, runner):
        state = runner.optim_wrapper.optimizer.state_dict()['state']
        told['start'] = [runner.epoch, runner.iter, [s['momentum_buffer'].tolist() for s in state.values()]]

def loader():
    data = [{'inputs': torch.full((3,), float(i))} for i in range(4)]
    return dict(dataset=data, batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))

if resume_from:  # by the function that DetInferencer calls; below, by the runner
    load_checkpoint(Model(), resume_from)
warmup = dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2)
saving = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='score', rule='greater')
runner = Runner(
    model=Model(), work_dir=folder, load_from=resume_from, resume=bool(resume_from), experiment_name='small',
    train_dataloader=loader(), train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
    val_dataloader=loader(), val_evaluator=[Metric()], val_cfg=dict(),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
    param_scheduler=[warmup, dict(type='MultiStepLR', milestones=[1])],
    default_hooks=dict(checkpoint=saving), custom_hooks=[dict(type='EMAHook'), Tell()],
)
runner.train()
told['losses'] = runner.message_hub.get_scalar('train/loss').data[0].tolist()
best = runner.message_hub.get_info('best_score')
told['best'] = [type(best).__name__, float(best)]
print(json.dumps(told))
"""


def run(folder, epochs, resume_from='', allow=''):
    argv = [sys.executable, '-W', 'ignore', '-c', RUNNER, str(folder), str(epochs), str(resume_from), allow]
    return subprocess.run(argv, capture_output=True, text=True)


def told(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run of two epochs, and what the run printed."""
    folder = tmp_path_factory.mktemp('runner')
    return folder, told(run(folder, 2))


@pytest.fixture
def allowed(nothing_allowed):
    """Allow mmengine's classes and no others in this process."""
    allow_mmengine_checkpoints()


def test_resume_goes_on_with_what_is_refused_otherwise(allowed, trained, tmp_path):
    folder, first = trained
    path = folder / 'epoch_2.pth'
    assert first['start'] == [0, 0, []]
    assert len(first['losses']) == 4
    saved = torch.load(path, weights_only=False)['optimizer']['state'].values()

    torch.serialization.clear_safe_globals()
    with pytest.raises(UnpicklingError, match='weights_only'):
        torch.load(path)

    resumed = told(run(tmp_path / 'resumed', 3, path, 'allow'))
    assert resumed['start'] == [2, 4, [state['momentum_buffer'].tolist() for state in saved]]
    assert resumed['losses'][:4] == first['losses']
    assert len(resumed['losses']) == 6
    assert resumed['best'] == first['best'] == ['float32', 0.25]


@pytest.mark.parametrize('name', ['epoch_2.pth', 'best_score_epoch_1.pth'])
def test_all_of_it_is_read(trained, allowed, name):
    path = trained[0] / name
    read, expected = torch.load(path), torch.load(path, weights_only=False)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    assert read.keys() == expected.keys() >= {'meta', 'state_dict', 'message_hub', 'ema_state_dict'}
    assert ('optimizer' in read) == ('param_schedulers' in read) == (name == 'epoch_2.pth')
    for key, log in expected['message_hub'].pop('log_scalars').items():
        other = read['message_hub']['log_scalars'][key]
        for values, other_values in zip(log.data, other.data, strict=True):
            np.testing.assert_array_equal(other_values, values)
        assert other.statistics('mean') == log.mean()
    del read['message_hub']['log_scalars']
    for key in ('meta', 'message_hub', 'param_schedulers'):
        assert read.get(key) == expected.get(key)


def test_a_file_written_with_the_other_numpy(trained, allowed, tmp_path):
    """numpy 2 moved its functions; the names in a file are those of the numpy that wrote it."""
    path, names = trained[0] / 'epoch_2.pth', {b'numpy.core.', b'numpy._core.'}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / 'other.pth', 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                [ours] = (name for name in names if name in content)
                [other] = names - {ours}
                content = content.replace(ours, other)
            target.writestr(name, content)
    log = torch.load(path)['message_hub']['log_scalars']['train/loss']
    other_log = torch.load(tmp_path / 'other.pth')['message_hub']['log_scalars']['train/loss']
    np.testing.assert_array_equal(other_log.data[0], log.data[0])


class Call:
    """Object that is pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(path):
    history = importlib.import_module('mmengine.logging').HistoryBuffer
    return {
        'system': Call(os.system, f'touch {path}'),
        'eval': Call(eval, f'open({str(path)!r}, "w")'),
        'open': Call(open, str(path), 'w'),
        'statistic': Call(getattr, history, 'register_statistics'),
        'dunder': Call(getattr, history, '__init__'),
        'function': Call(getattr, history.min, '__globals__'),
        'numpy': Call(getattr, np.ndarray, 'tofile'),
    }


@pytest.mark.parametrize('kind', ['system', 'eval', 'open', 'statistic', 'dunder', 'function', 'numpy'])
def test_what_can_be_executed_is_refused(allowed, tmp_path, kind):
    path = tmp_path / 'made'
    torch.save({'state_dict': {}, 'meta': calls(path)[kind]}, tmp_path / 'file.pth')
    with pytest.raises(UnpicklingError):
        torch.load(tmp_path / 'file.pth')
    assert not path.exists()
    if kind in ('eval', 'open'):  # the file is one that would do it
        torch.load(tmp_path / 'file.pth', weights_only=False)
        assert path.exists()


def test_again_changes_nothing(allowed):
    once = set(torch.serialization.get_safe_globals())
    allow_mmengine_checkpoints()
    assert set(torch.serialization.get_safe_globals()) == once
    assert getattr not in once
