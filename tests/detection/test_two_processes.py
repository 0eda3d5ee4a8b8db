"""Two real processes: gradients are their mean at every width, and training of one width by mistake is refused."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper

from slimclr_hub.detection.coins import write_coins
from slimclr_hub.detection.mmdetection.detectors import SlimmableDistributedDataParallel
from slimclr_hub.errors import InputError
from tests.detection.small import WIDTHS, batch, detector, width_gradients
from tests.detection.test_loops import runner, training, validation
from tests.scripts import in_processes

WORLD = 2


class Seen(torch.optim.SGD):
    """Optimizer that keeps its gradients and moves nothing."""

    def step(self, closure=None):
        self.seen = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]['params']]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=WORLD)
    model, data = detector(), batch(seed=rank)
    names = [name for name, _ in model.named_parameters()]
    wrapped = SlimmableDistributedDataParallel(model)
    wrapped.train()
    optimizer = Seen(model.parameters(), lr=0.1)
    steps = []
    for _ in range(2):  # whatever the reducer keeps from one iteration must not spoil the next
        wrapped.train_step(data, OptimWrapper(optimizer))
        steps.append(dict(zip(names, optimizer.seen, strict=True)))
    accumulated = OptimWrapper(optimizer, accumulative_counts=2)
    for _ in range(2):
        wrapped.train_step(data, accumulated)
    steps.append(dict(zip(names, optimizer.seen, strict=True)))
    stock = MMDistributedDataParallel(detector(), find_unused_parameters=True)
    try:
        stock.train_step(data, OptimWrapper(torch.optim.SGD(stock.parameters(), lr=0.1)))
        message = 'no error'
    except InputError as error:
        message = str(error)
    metrics, buffers = whole_run(rank, folder)
    torch.save({'steps': steps, 'message': message, 'metrics': metrics, 'buffers': buffers}, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def whole_run(rank, folder):
    """Train and evaluate an epoch by mmengine's runner; return metrics and buffers."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(WORLD))
    run = runner(
        folder / 'coins',
        folder / 'work_dir',
        **training(folder / 'coins'),
        **validation(folder / 'coins'),
        val_cfg=dict(type='SlimmableValLoop'),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(type='SlimmableDistributedDataParallel')),
    )
    assert isinstance(run.model, SlimmableDistributedDataParallel)
    assert run.world_size == WORLD
    run.train()
    return run.val_loop.run(), dict(run.model.module.named_buffers())


@pytest.fixture(scope='module')
def records_folder(tmp_path_factory):
    return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def records(records_folder):
    folder = records_folder
    write_coins(folder / 'coins')
    (folder / 'work_dir').mkdir()
    in_processes(WORLD, worker, folder)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope='module')
def alone():
    """Gradients of each width on each process's batch, computed in one process."""
    model = detector().train()
    return {(width, rank): width_gradients(model, batch(seed=rank), width) for width in WIDTHS for rank in range(WORLD)}


@pytest.mark.parametrize('step', [0, 1, 2])
def test_gradients_are_the_mean_over_processes(records, alone, step):
    for name in alone[1.0, 0]:
        expected = sum(alone[width, rank][name] for width in WIDTHS for rank in range(WORLD)) / WORLD
        for record in records:
            torch.testing.assert_close(
                record['steps'][step][name], expected, rtol=1e-4, atol=1e-6 * max(1.0, expected.abs().max().item())
            )


@pytest.mark.parametrize('width', WIDTHS)
def test_each_width_takes_part(records, alone, width):
    """Parameters of one width have the mean of its gradients; if the width were left out, they would be zero."""
    key = {1.0: 'w100', 0.75: 'w075', 0.5: 'w050', 0.25: 'w025'}[width]
    names = [name for name in alone[width, 0] if f'.{key}.' in name]
    assert names
    for name in names:
        expected = (alone[width, 0][name] + alone[width, 1][name]) / WORLD
        assert expected.abs().sum() > 0
        assert not torch.equal(alone[width, 0][name], alone[width, 1][name])
        for record in records:
            torch.testing.assert_close(record['steps'][0][name], expected, rtol=1e-4, atol=1e-5)


def test_stock_wrapper_is_refused(records):
    for record in records:
        assert 'would train one width only' in record['message']
        assert "model_wrapper_cfg=dict(type='SlimmableDistributedDataParallel')" in record['message']


def test_run_evaluates_every_width_over_all_processes(records, records_folder):
    """The two images of the test set lie on two processes, and both report the metrics of both."""
    metrics = [record['metrics'] for record in records]
    assert metrics[0] == metrics[1]
    kept = json.loads((records_folder / 'work_dir' / 'ap_by_width.json').read_text())['1']
    for width in '1.00', '0.75', '0.50', '0.25':
        assert metrics[0][f'width_{width}/coco/bbox_mAP'] == kept[f'width_{width}/coco/bbox_mAP'] >= 0
    assert (records_folder / 'work_dir' / 'epoch_1.pth').exists()


def test_statistics_are_those_of_all_processes(records):
    """Without SyncBN each process normalises by itself; the mean of the statistics is evaluated and saved."""
    first, second = (record['buffers'] for record in records)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize('key', ['static_graph', 'detect_anomalous_params'])
def test_what_the_wrapper_cannot(key):
    with pytest.raises(InputError, match=f'{key} does not work with several widths'):
        SlimmableDistributedDataParallel(detector(), **{key: True})
