"""Training steps by the fast paths are those by the plain ones."""

import copy
from contextlib import nullcontext

import pytest
import timm
import torch

from slimclr_hub.methods import MoCoV2, MoCoV3, SimCLR, Supervised
from slimclr_hub.methods.momentum import EMA
from tests.methods.plain import plain_paths

WIDTHS = (1.0, 0.75, 0.25)
MAKERS = {
    'mocov2': lambda backbone: MoCoV2(backbone, queue_size=32, bn_splits=2),
    'mocov3': lambda backbone: MoCoV3(backbone, dim=16, hidden_dim=32),
    'simclr': lambda backbone: SimCLR(backbone, dim=16),
    'supervised': Supervised,
}


def make(name, overlap=True):
    torch.manual_seed(0)
    widths = WIDTHS if overlap else (1.0, 0.5, 0.25)
    classes = 5 if name == 'supervised' else 0
    backbone = timm.create_model(
        'slimclr_resnet20', num_classes=classes, widths=widths, overlap=overlap, zero_init_last=False
    )
    return MAKERS[name](backbone).double().train()


@pytest.mark.parametrize('overlap', [True, False], ids=['overlap', 'disjoint'])
@pytest.mark.parametrize('name', MAKERS)
def test_steps_are_those_of_the_plain_paths(name, overlap):
    """Losses, gradients and all tensors of three steps, one of them in slow start, in double precision."""
    fast = make(name, overlap)
    plain = copy.deepcopy(fast)
    if name in ('mocov2', 'mocov3'):
        assert plain.ema.averages[0] is plain.key_backbone.conv1.weight
    generator = torch.Generator().manual_seed(1)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (fast, plain)]
    for step in range(3):
        views = [torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
        labels = torch.arange(8) % 5
        outputs = []
        for method, optimizer, paths in zip((fast, plain), optimizers, (nullcontext, plain_paths), strict=True):
            torch.manual_seed(step)  # which keys are shuffled by
            with paths():
                output = method(views, method.widths[:1] if step == 0 else method.widths, 0.9, labels)
                optimizer.zero_grad()
                output['loss'].backward()
            outputs.append({key: value.detach() for key, value in output.items()})
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
        for (key, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=key)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('paths', [nullcontext, plain_paths])
def test_momentum_encoder_by_loop(paths):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=WIDTHS)
    follower, leader = backbone.extract(1.0), backbone.extract(1.0)
    for parameter in follower.parameters():
        torch.nn.init.normal_(parameter)
    before = {name: parameter.detach().clone() for name, parameter in follower.named_parameters()}
    with paths():
        EMA([(follower, backbone)], 1.0).update(0.9)
    leading = dict(leader.named_parameters())
    for name, parameter in follower.named_parameters():
        expected = 0.9 * before[name].double() + 0.1 * leading[name].double()
        torch.testing.assert_close(parameter.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6, msg=name)
