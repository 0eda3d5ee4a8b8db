"""MoCo v3 against loops over both directions; its key encoder, and what a step in parts leaves."""

import copy

import pytest
import timm
import torch

from slimclr_hub.methods import MoCoV3
from tests.methods import plain

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def make(widths=WIDTHS, **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=widths, zero_init_last=False)
    return MoCoV3(backbone, **{'dim': 8, 'hidden_dim': 16, **kwargs}).double()


def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 12, 12, dtype=torch.double, generator=generator) for _ in range(2)]


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def key_parameters(method):
    return [parameter.clone() for parameter in (*method.key_backbone.parameters(), *method.key_head.parameters())]


@torch.no_grad()
def disturb(method):
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


@pytest.mark.parametrize('tau', [1.0, 0.5])
def test_against_loops(tau):
    """Similarities over tau_1 are what distillation compares, and the contrastive loss counts 2 tau_1 times."""
    method = disturb(make(temperature=tau, distillation_temperature=2.0))
    other = copy.deepcopy(method)
    output = method(views(), WIDTHS, 0.9)
    with torch.no_grad():
        queries = [
            {w: unit(other.predictor(other.head(other.backbone.forward_at(view, w), w), w)) for w in WIDTHS}
            for view in views()
        ]
        other.update_key_encoder(0.9)
        keys = [unit(other.key_head(other.key_backbone(view))) for view in views()]
    total, contrastive = 0.0, dict.fromkeys(WIDTHS, 0.0)
    for query, key in (queries[0], keys[1]), (queries[1], keys[0]):
        logits = {w: plain.products(q / tau, key) for w, q in query.items()}
        parts = plain.objective(logits, range(6), [2.5, 1, 1, 1], tau_1=1.0, tau_2=2.0, scale=2 * tau)
        total += sum(parts.values())
        for width, rows in logits.items():
            contrastive[width] += plain.cross_entropy(rows, range(6)) / 2
    assert output['loss'].item() == pytest.approx(total, rel=1e-10)
    assert sum(output[f'loss/{width:g}'] for width in WIDTHS).item() == pytest.approx(total, rel=1e-10)
    for width in WIDTHS:
        assert output[f'info_nce/{width:g}'].item() == pytest.approx(contrastive[width], rel=1e-10)


def test_views_take_turns():
    first, second = views()
    losses = [make()(pair, WIDTHS, 0.9)['loss'] for pair in ([first, second], [second, first])]
    torch.testing.assert_close(*losses)


def test_key_encoder_follows_backbone_and_head():
    method = disturb(make())
    before = key_parameters(method)
    leaders = [
        *method.backbone.extract(1.0).parameters(),
        *method.head.extract(1.0).parameters(),
    ]
    method(views(), WIDTHS[:1], 0.75)['loss'].backward()
    for now, old, leader in zip(key_parameters(method), before, leaders, strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * leader)
    assert {name.split('.')[0] for name, p in method.named_parameters() if p.grad is not None} == {
        'backbone',
        'head',
        'predictor',
    }
    assert not any(p.grad is not None for name, p in method.named_parameters() if '.w050.' in name)


def test_later_parts_of_a_step_leave_the_key_encoder():
    method = disturb(make())
    before = key_parameters(method)
    output = method(views(), WIDTHS, None)
    assert all(torch.equal(a, b) for a, b in zip(before, key_parameters(method), strict=True))
    assert torch.equal(output['loss'], disturb(make())(views(), WIDTHS, 1.0)['loss'])
