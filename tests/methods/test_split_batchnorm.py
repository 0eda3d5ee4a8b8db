"""Batch normalisation by parts of the batch, against an ordinary one on each part."""

import copy

import pytest
import timm
import torch
from torch import nn

from slimclr_hub.methods.batchnorm import SplitBatchNorm2d, split_batchnorm


def make(splits, momentum=0.1):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, momentum=momentum)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    split = copy.deepcopy(norm)
    split_batchnorm(split, splits)
    return norm, split


def batch(n=12):
    # Parts that differ in mean and spread, or else statistics of the whole would pass for those of the parts.
    scale = torch.linspace(0.5, 3, n)[:, None, None, None]
    return torch.randn(n, 5, 4, 3, generator=torch.Generator().manual_seed(1)) * scale + scale


@pytest.mark.parametrize('splits', [1, 2, 3, 12])
def test_each_part_is_normalised_alone(splits):
    plain, split = make(splits)
    x, y = batch().requires_grad_(), batch().requires_grad_()
    weights = torch.randn(12, 5, 4, 3, generator=torch.Generator().manual_seed(2))

    parts = [copy.deepcopy(plain) for _ in range(splits)]
    size = 12 // splits
    expected = torch.cat([part(x[i * size : (i + 1) * size]) for i, part in enumerate(parts)])
    (expected * weights).sum().backward()
    output = split(y)
    (output * weights).sum().backward()

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(split.weight.grad, sum(part.weight.grad for part in parts))
    torch.testing.assert_close(split.bias.grad, sum(part.bias.grad for part in parts))
    torch.testing.assert_close(split.running_mean, sum(part.running_mean for part in parts) / splits)
    torch.testing.assert_close(split.running_var, sum(part.running_var for part in parts) / splits)
    assert split.num_batches_tracked == 1
    if splits > 1:
        assert not torch.allclose(output, copy.deepcopy(plain)(batch()), atol=0.1)


def test_statistics_over_several_batches():
    plain, split = make(2)
    parts = [copy.deepcopy(plain) for _ in range(2)]
    mean, var = plain.running_mean.clone(), plain.running_var.clone()
    for scale in 1, 2, 3:
        x = batch() * scale
        split(x)
        # Both processes start each step from the buffers that were averaged after the one before.
        for part, half in zip(parts, x.chunk(2), strict=True):
            part.running_mean.copy_(mean)
            part.running_var.copy_(var)
            part(half)
        mean = (parts[0].running_mean + parts[1].running_mean) / 2
        var = (parts[0].running_var + parts[1].running_var) / 2
    torch.testing.assert_close(split.running_mean, mean)
    torch.testing.assert_close(split.running_var, var)
    assert split.num_batches_tracked == 3


@pytest.mark.parametrize('n', [12, 5])
def test_eval_is_an_ordinary_one(n):
    plain, split = make(4)
    before = copy.deepcopy(split.state_dict())
    assert torch.equal(split.eval()(batch(n)), plain.eval()(batch(n)))
    torch.testing.assert_close(split.state_dict(), before, rtol=0, atol=0)


def test_indivisible_batch_is_refused():
    _, split = make(4)
    with pytest.raises(ValueError, match=r'10.*4 BN splits'):
        split(batch(10))


@pytest.mark.parametrize('splits', [0, -1])
def test_impossible_splits_are_refused(splits):
    with pytest.raises(ValueError, match=f'bn_splits {splits}'):
        split_batchnorm(nn.BatchNorm2d(3), splits)


def test_conversion_reaches_all_and_moves_nothing():
    model = timm.create_model('slimclr_resnet20')
    names = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    split_batchnorm(model, 2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == count == (1 + 3 * 6 + 2) * 4
    assert all(type(norm) is SplitBatchNorm2d and norm.splits == 2 for norm in norms)
    assert names == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_whole_network_equals_its_parts():
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', num_classes=0, zero_init_last=False)
    split = copy.deepcopy(model)
    split_batchnorm(split, 2)
    x = torch.randn(8, 3, 16, 16) * torch.linspace(0.5, 2, 8)[:, None, None, None]
    parts = [copy.deepcopy(model), copy.deepcopy(model)]
    with torch.no_grad():
        expected = torch.cat([part.forward_at(half, 0.5) for part, half in zip(parts, x.chunk(2), strict=True)])
        torch.testing.assert_close(split.forward_at(x, 0.5), expected)
    states = [part.state_dict() for part in parts]
    for name, tensor in split.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2, msg=name)


def test_compiles():
    _, split = make(2)
    other = copy.deepcopy(split)
    compiled = torch.compile(other, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(batch()), split(batch()))
    torch.testing.assert_close(other.running_var, split.running_var)
