"""Two real processes against one that holds the whole batch and normalises it in as many parts."""

import pytest
import timm
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from slimclr_hub.methods import MoCoV2
from slimclr_hub.methods.processes import average_batchnorm

WORLD = 2
BN_SPLITS = (1, 2)  # on each process
WIDTHS = (1.0, 0.75, 0.5, 0.25)
STEPS = [WIDTHS[:1], WIDTHS, WIDTHS]  # slow start, then all


def make(bn_splits):
    torch.manual_seed(0)  # on every process, as training does: DDP hands parameters round, but not the queue
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, zero_init_last=False)
    # Double, so that what differs by more than rounding shows.
    return MoCoV2(backbone, dim=8, hidden_dim=16, queue_size=16, bn_splits=bn_splits).double().train()


def views(step):
    """Two views of eight images whose statistics differ, so that it matters which are normalised together."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = torch.linspace(0.5, 3, 8, dtype=torch.double)[:, None, None, None]
    return [torch.randn(8, 3, 12, 12, dtype=torch.double, generator=generator) * scale for _ in range(2)]


def train(method: nn.Module, inner: MoCoV2, rank: int, world: int):
    """Outputs, gradients and queue of each step, and all tensors at the end."""
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=1e-2)
    record = []
    for step, widths in enumerate(STEPS):
        torch.manual_seed(1000 * rank + step)  # the permutation is to be the first process's, whatever the others draw
        output = method([view.chunk(world)[rank] for view in views(step)], widths, 0.9)
        optimizer.zero_grad()
        output['loss'].backward()
        record.append(
            {
                'output': {name: value.detach() for name, value in output.items()},
                'gradients': {name: None if p.grad is None else p.grad.clone() for name, p in inner.named_parameters()},
                'queue': inner.queue.clone(),
                'pointer': inner.queue_pointer.clone(),
            }
        )
        optimizer.step()
        average_batchnorm(inner)
    return {'steps': record, 'state': inner.state_dict()}


def run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD)
    for bn_splits in BN_SPLITS:
        method = make(bn_splits)
        parallel = DistributedDataParallel(method, find_unused_parameters=True, broadcast_buffers=False)
        torch.save(train(parallel, method, rank, WORLD), f'{folder}/{rank}-{bn_splits}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What each process recorded."""
    folder = tmp_path_factory.mktemp('processes')
    multiprocessing.spawn(run_process, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize('bn_splits', BN_SPLITS)
def test_two_processes_are_one(folder, bn_splits):
    ranks = [torch.load(folder / f'{rank}-{bn_splits}.pt') for rank in range(WORLD)]
    method = make(WORLD * bn_splits)
    alone = train(method, method, 0, 1)

    assert [step['pointer'].item() for step in alone['steps']] == [8, 0, 8]
    for first, second, expected in zip(*(rank['steps'] for rank in ranks), alone['steps'], strict=True):
        assert first['output'].keys() == second['output'].keys() == expected['output'].keys()
        for name, value in expected['output'].items():
            torch.testing.assert_close((first['output'][name] + second['output'][name]) / 2, value, msg=name)
        assert not torch.allclose(first['output']['loss'], second['output']['loss'])
        for mine in first, second:
            torch.testing.assert_close(mine['queue'], expected['queue'])
            assert torch.equal(mine['pointer'], expected['pointer'])
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
    outputs = []
    for bn_splits in 1, 2:
        torch.manual_seed(0)
        outputs.append(make(bn_splits)(views(0), WIDTHS, 0.9)['loss'])
    assert abs(outputs[0] - outputs[1]) > 1e-3
