"""SimCLR against a loop over all pairs of views, and at its ends."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from slimclr_hub.methods import SimCLR
from tests.methods import plain

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def make(widths=WIDTHS, **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=widths, zero_init_last=False)
    return SimCLR(backbone, **{'dim': 8, 'hidden_dim': 16, **kwargs}).double()


def views(batch=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 12, 12, dtype=torch.double, generator=generator) for _ in range(2)]


def nt_xent(embeddings, batch, temperature):
    """Chen et al. 2020, Eq. (1) over all 2B views: the positive of one is the other view of its image."""
    similarity = nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=2).tolist()
    total = 0.0
    for i in range(2 * batch):
        j = (i + batch) % (2 * batch)
        others = sum(math.exp(similarity[i][k] / temperature) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(similarity[i][j] / temperature) / others)
    return total / (2 * batch)


def test_against_a_loop():
    method = make(temperature=0.3, distillation_temperature=3.0)
    other = copy.deepcopy(method)
    first, second = views()
    output = method([first, second], WIDTHS)

    logits = {}
    for width in WIDTHS:
        out = other.head(other.backbone.forward_at(torch.cat([first, second]), width), width).detach()
        assert output[f'info_nce/{width:g}'].item() == pytest.approx(nt_xent(out, 5, 0.3), rel=1e-10)
        unit = out / out.norm(dim=1, keepdim=True)
        # The view of the same image first, then the other images' by view.
        order = [[(i + 5) % 10, *(k for k in range(10) if k % 5 != i % 5)] for i in range(10)]
        rows = plain.products(unit, unit)
        logits[width] = [[row[k] for k in columns] for row, columns in zip(rows, order, strict=True)]
    parts = plain.objective(logits, [0] * 10, [2.5, 1, 1, 1], tau_1=0.3, tau_2=3.0)
    assert output['loss'].item() == pytest.approx(sum(parts.values()), rel=1e-10)
    hits = {w: sum(row[0] > max(row[1:]) for row in rows) / 10 for w, rows in logits.items()}
    assert {w: output[f'accuracy/{w:g}'].item() for w in WIDTHS} == pytest.approx(hits)


def test_an_individual_width_is_plain_simclr():
    method = make(widths=(0.5,))
    encoder = nn.Sequential(method.backbone.extract(0.5), method.head.extract(0.5))
    pair = views()
    output = method(pair, (0.5,))
    output['loss'].backward()
    out = encoder(torch.cat(pair))
    similarity = nn.functional.cosine_similarity(out[:, None], out[None], dim=2) / 0.1
    similarity = similarity.masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    loss = nn.functional.cross_entropy(similarity, torch.arange(10).roll(5))
    loss.backward()
    assert set(output) == {'loss', 'loss/0.5', 'info_nce/0.5', 'accuracy/0.5'}
    torch.testing.assert_close(output['loss'], loss)
    assert loss.item() == pytest.approx(nt_xent(out.detach(), 5, 0.1), rel=1e-10)
    torch.testing.assert_close(method.backbone.conv1.weight.grad, encoder[0].conv1.weight.grad)
    torch.testing.assert_close(method.head.bn2.w050.bias.grad, encoder[1].bn2.bias.grad)


def test_head_is_the_authors():
    """Linear, normalisation, ReLU, linear without bias, normalisation, each width on its slices."""
    method = make()
    head, x = method.head, torch.randn(6, 64, dtype=torch.double)
    for width in WIDTHS:
        n, hidden = int(64 * width), int(16 * width)
        y = x[:, :n] @ head.fc1.weight[:hidden, :n].T + head.fc1.bias[:hidden]
        y = ((y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()).clamp(min=0)
        y = y @ head.fc2.weight[:, :hidden].T
        y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(head(x[:, :n], width), y)
        torch.testing.assert_close(head.extract(width).train()(x[:, :n]), y)
    assert head.fc2.bias is None
    assert {name for name, _ in head.named_parameters()} >= {'bn1.w025.weight', 'bn2.w025.weight', 'bn2.w100.bias'}


def test_a_collapsed_network():
    """One embedding for everything: log(2B - 1), and no positive recognised."""
    method = make()
    with torch.no_grad():
        for norm in method.head.bn2.values():
            norm.weight.zero_()
            norm.bias.copy_(torch.eye(8)[0])
    output = method(views(), WIDTHS)
    for width in WIDTHS:
        assert output[f'info_nce/{width:g}'].item() == pytest.approx(math.log(9))
        assert output[f'accuracy/{width:g}'] == 0


def test_equal_views_recognise_each_other():
    view = views()[0]
    output = make()([view, view], WIDTHS)
    assert [output[f'accuracy/{width:g}'].item() for width in WIDTHS] == [1] * 4


def test_momentum_and_labels_are_not_used():
    with_both = make()(views(), WIDTHS, 0.9, torch.arange(5))
    assert torch.equal(with_both['loss'], make()(views(), WIDTHS)['loss'])
