"""Batch normalisation over two real processes against an ordinary one on the batch of both."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from slimclr_hub.methods import MoCoV3
from slimclr_hub.methods.batchnorm import sync_batchnorm
from tests.scripts import in_processes

CPU = torch.device('cpu')
WORLD = 2
FIRST = 3  # of eight images, which the first process has; the other has five
STEPS = 3
CASES = {
    '2d': (nn.BatchNorm2d, {}),
    '2d without affine': (nn.BatchNorm2d, {'affine': False}),
    '1d': (nn.BatchNorm1d, {}),
    '1d without affine': (nn.BatchNorm1d, {'affine': False}),
    'cumulative': (nn.BatchNorm2d, {'momentum': None}),
    'without statistics': (nn.BatchNorm2d, {'track_running_stats': False}),
}


def make(case):
    torch.manual_seed(0)
    kind, options = CASES[case]
    norm = kind(5, **options).double()
    for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def batch(case, step):
    """Images whose statistics differ, and the factors of a loss."""
    generator = torch.Generator().manual_seed(step)
    shape = (8, 5, 4, 3) if CASES[case][0] is nn.BatchNorm2d else (8, 5)
    scale = torch.linspace(0.5, 3, 8, dtype=torch.double).view(8, *[1] * (len(shape) - 1))
    x, factors = (torch.randn(shape, dtype=torch.double, generator=generator) for _ in range(2))
    return x * scale + scale, factors


def train(norm, case, part):
    """Output and gradients of each step, and the state after it."""
    record = []
    for step in range(STEPS):
        x, factors = (tensor[part] for tensor in batch(case, step))
        x.requires_grad_()
        norm.zero_grad()
        output = norm(x)
        (output * factors).sum().backward()
        gradients = {name: p.grad.clone() for name, p in norm.named_parameters()}
        state = copy.deepcopy(norm.state_dict())
        record.append({'output': output.detach(), 'input': x.grad, 'gradients': gradients, 'state': state})
    return record


def run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD)
    part = slice(0, FIRST) if rank == 0 else slice(FIRST, 8)
    record = {case: train(sync_batchnorm(make(case), CPU), case, part) for case in CASES}
    record['half'] = {}
    for dtype in torch.bfloat16, torch.float16:
        norm = sync_batchnorm(make('2d').float(), CPU)
        record['half'][dtype] = {'output': norm(batch('2d', 0)[0][part].to(dtype)).detach(), 'state': norm.state_dict()}
    norm = sync_batchnorm(make('2d'), CPU).eval()
    record['eval'] = norm(batch('2d', 0)[0][part]).detach()
    torch.save(record, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What each process recorded."""
    folder = tmp_path_factory.mktemp('processes')
    in_processes(WORLD, run_process, str(folder))
    return [torch.load(folder / f'{rank}.pt') for rank in range(WORLD)]


def both(ranks, name):
    return torch.cat([rank[name] for rank in ranks])


def close(ours, theirs, message=None):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=message)


@pytest.mark.parametrize('case', CASES)
def test_two_processes_normalise_as_one(ranks, case):
    whole = train(make(case), case, slice(None))
    for *parts, expected in zip(*(rank[case] for rank in ranks), whole, strict=True):
        close(both(parts, 'output'), expected['output'])
        close(both(parts, 'input'), expected['input'])
        for name, gradient in expected['gradients'].items():
            close(sum(part['gradients'][name] for part in parts), gradient, name)
        for part in parts:
            assert part['state'].keys() == expected['state'].keys()
            for name, tensor in expected['state'].items():
                close(part['state'][name], tensor, name)


def test_parts_differ():
    """The comparison above can tell: normalised apart the outputs are others."""
    norm, (x, _) = make('2d'), batch('2d', 0)
    apart = torch.cat([copy.deepcopy(norm)(part) for part in (x[:FIRST], x[FIRST:])])
    assert not torch.allclose(apart, norm(x), atol=0.1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(ranks, dtype):
    """Under autocast, which leaves parameters in single: sums too, and only the output is short."""
    norm = make('2d').float()
    expected = norm(batch('2d', 0)[0].to(dtype).float())
    output = both([rank['half'][dtype] for rank in ranks], 'output')
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))
    for rank in ranks:
        torch.testing.assert_close(rank['half'][dtype]['state'], norm.state_dict())


def test_eval_uses_the_statistics(ranks):
    close(both(ranks, 'eval'), make('2d').eval()(batch('2d', 0)[0]))


@pytest.mark.parametrize('case', CASES)
def test_one_process(case):
    ordinary, ours = train(make(case), case, slice(None)), train(sync_batchnorm(make(case), CPU), case, slice(None))
    torch.testing.assert_close(ours, ordinary, rtol=0, atol=0)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_conversion_reaches_all_and_keeps_names_and_tensors(device):
    method = MoCoV3(timm.create_model('slimclr_resnet20', num_classes=0), dim=8, hidden_dim=16)
    before = method.state_dict()
    converted = sync_batchnorm(method, torch.device(device))
    assert converted is method
    after = method.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 21 * 4 + 21 + (2 * 4 + 2) + 4  # backbone and its keys', head and its keys', predictor
    assert len({type(norm) for norm in norms}) == 1
    assert isinstance(norms[0], nn.SyncBatchNorm) == (device == 'cuda')
    assert not isinstance(norms[0], (nn.BatchNorm1d, nn.BatchNorm2d))
