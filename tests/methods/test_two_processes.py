"""Two real processes against one that holds the whole batch: every method, from the losses to the trained tensors."""

from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.methods.batchnorm import sync_batchnorm
from slimclr_hub.methods.registry import settings_of
from tests.networks import method_of
from tests.scripts import in_processes

WORLD = 2
WIDTHS = (1.0, 0.5, 0.25)
STEPS = [WIDTHS[:1], *[WIDTHS] * 4]  # slow start, then all
# Normalised over all processes but where there are parts, of which the one process then has as many as both together.
CASES = {
    'mocov2, 1 part': ('mocov2', {'queue_size': 16, 'bn_splits': 1}),
    'mocov2, 2 parts': ('mocov2', {'queue_size': 16, 'bn_splits': 2}),
    'mocov2, no queue': ('mocov2', {'queue_size': 0}),
    'mocov3': ('mocov3', {}),
    'simclr': ('simclr', {}),
    'seed': ('seed', {'queue_size': 16, 'centre': True}),
    'compress': ('compress', {'queue_size': 16}),
    'bingo': ('bingo', {'queue_size': 16, 'cross_after': 2, 'centre': True}),
    'disco': ('disco', {'queue_size': 16, 'bn_splits': 1}),
    'supervised': ('supervised', {}),
}


def make(case, parts=1):
    """The method of one process, in double: what differs by more than rounding shows."""
    name, options = CASES[case]
    torch.manual_seed(0)  # on every process, as training does: DDP hands parameters round, but not the queue
    classes = 10 if name == 'supervised' else 0
    shape = {'layers': (1, 1, 1), 'widths': WIDTHS, 'num_classes': classes}
    backbone = timm.create_model('slimclr_resnet20', **shape, zero_init_last=False)
    options = {'dim': 16, 'hidden_dim': 64, **options}
    options = {key: value for key, value in options.items() if key in settings_of(name)}
    if 'bn_splits' in options:
        options['bn_splits'] *= parts
    method = method_of(name, backbone, **options).double().train()
    return method if 'bn_splits' in options else sync_batchnorm(method, torch.device('cpu'))


def views(step):
    """Four views of eight images whose statistics differ, so that it matters which are normalised together."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = torch.linspace(0.5, 3, 8, dtype=torch.double)[:, None, None, None]
    return [torch.randn(8, 3, 12, 12, dtype=torch.double, generator=generator) * scale for _ in range(4)]


def train(case, method: nn.Module, inner: Any, rank: int, world: int):
    """Outputs, gradients and queue of each step, and all tensors at the end."""
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], 0.02, 0.9, weight_decay=1e-2)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]).chunk(world)[rank]
    record = []
    for step, widths in enumerate(STEPS):
        torch.manual_seed(1000 * rank + step)  # the permutation is to be the first process's, whatever the others draw
        used = [view.chunk(world)[rank] for view in views(step)][: 4 if case == 'bingo' else 2]
        if case == 'bingo':
            inner.set_epoch(step)
        output = method(used, widths, 0.9, labels)
        optimizer.zero_grad()
        output['loss'].backward()
        record.append(
            {
                'output': {name: value.detach() for name, value in output.items()},
                'gradients': {name: None if p.grad is None else p.grad.clone() for name, p in inner.named_parameters()},
                'buffers': {name: b.clone() for name, b in inner.named_buffers() if name.startswith('queue')},
            }
        )
        optimizer.step()
        if 'bn_splits' in CASES[case][1]:
            average_batchnorm(inner)
    return {'steps': record, 'state': inner.state_dict()}


def run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD)
    for i, case in enumerate(CASES):
        method = make(case)
        parallel = DistributedDataParallel(method, find_unused_parameters=True, broadcast_buffers=False)
        torch.save(train(case, parallel, method, rank, WORLD), f'{folder}/{rank}-{i}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What each process recorded."""
    folder = tmp_path_factory.mktemp('processes')
    in_processes(WORLD, run_process, str(folder))
    return folder


@pytest.mark.parametrize('case', CASES)
def test_two_processes_are_one(folder, case):
    ranks = [torch.load(folder / f'{rank}-{list(CASES).index(case)}.pt') for rank in range(WORLD)]
    method = make(case, parts=WORLD)
    alone = train(case, method, method, 0, 1)

    if CASES[case][1].get('queue_size'):
        assert [step['buffers']['queue_pointer'].item() for step in alone['steps']] == [8, 0, 8, 0, 8]
    for first, second, expected in zip(*(rank['steps'] for rank in ranks), alone['steps'], strict=True):
        assert first['output'].keys() == second['output'].keys() == expected['output'].keys()
        for name, value in expected['output'].items():
            torch.testing.assert_close((first['output'][name] + second['output'][name]) / 2, value, msg=name)
        assert not torch.allclose(first['output']['loss'], second['output']['loss'])
        for mine in first, second:
            torch.testing.assert_close(mine['buffers'], expected['buffers'])
            for name, gradient in expected['gradients'].items():
                if gradient is None:  # the key encoder's, and those of widths that wait
                    assert mine['gradients'][name] is None, name
                else:
                    torch.testing.assert_close(mine['gradients'][name], gradient, msg=name)
    waiting = {name for name, gradient in alone['steps'][0]['gradients'].items() if gradient is None}
    assert any('.w025.' in name for name in waiting)
    for rank in ranks:
        assert rank['state'].keys() == alone['state'].keys()
        for name, value in alone['state'].items():
            torch.testing.assert_close(rank['state'][name], value, msg=name)


def test_parts_matter():
    """The comparison above can tell: with the batch normalised as a whole the losses are others."""
    outputs = [make('mocov2, 1 part', parts)(views(0)[:2], WIDTHS, 0.9)['loss'] for parts in (1, 2)]
    assert abs(outputs[0] - outputs[1]) > 1e-3
