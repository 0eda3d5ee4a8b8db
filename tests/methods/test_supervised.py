"""Supervised slimmable training: cross-entropy, and in-place distillation, against loops."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError
from slimclr_hub.methods import Supervised
from tests.methods import plain

WIDTHS = (1.0, 0.75, 0.5, 0.25)
LABELS = torch.tensor([3, 0, 9, 3, 6])


def make(widths=WIDTHS, **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=10, widths=widths, zero_init_last=False)
    return Supervised(backbone, **kwargs).double()


def images(seed=1):
    return torch.randn(5, 3, 12, 12, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(('weights', 'numbers'), [('none', [1] * 4), ('full_plus_max', [1.75, 1, 1, 1])])
def test_against_loops(weights, numbers):
    method = make(loss_weights=weights, distillation_temperature=2.0)
    output = method([images()], WIDTHS, labels=LABELS)
    logits = {width: make().backbone.forward_at(images(), width).tolist() for width in WIDTHS}
    parts = plain.objective(logits, LABELS.tolist(), numbers, tau_1=1.0, tau_2=2.0)
    assert output['loss'].item() == pytest.approx(sum(parts.values()), rel=1e-10)
    for width, rows in logits.items():
        expected = plain.cross_entropy(rows, LABELS.tolist())
        assert output[f'cross_entropy/{width:g}'].item() == pytest.approx(expected, rel=1e-10)
        hits = sum(row.index(max(row)) == label for row, label in zip(rows, LABELS.tolist(), strict=True))
        assert output[f'accuracy/{width:g}'].item() == pytest.approx(hits / 5)


def test_an_individual_width_is_ordinary_training():
    method = make(widths=(0.5,))
    dense = method.backbone.extract(0.5)
    output = method([images()], (0.5,), labels=LABELS)
    output['loss'].backward()
    loss = F.cross_entropy(dense(images()), LABELS)
    loss.backward()
    torch.testing.assert_close(output['loss'], loss)
    torch.testing.assert_close(method.backbone.conv1.weight.grad, dense.conv1.weight.grad)


def test_undecided_network():
    method = make(distillation='none')
    with torch.no_grad():
        for parameter in method.backbone.get_classifier().parameters():
            parameter.zero_()
    output = method([images()], WIDTHS, labels=LABELS)
    assert output['loss'].item() == pytest.approx(4 * math.log(10))
    assert [output[f'accuracy/{width:g}'].item() for width in WIDTHS] == [0] * 4


def test_only_the_first_view_counts():
    pair = make()([images(), images(2)], WIDTHS, None, LABELS)
    assert torch.equal(pair['loss'], make()([images()], WIDTHS, None, LABELS)['loss'])


def test_labels_are_needed():
    with pytest.raises(InputError, match='needs labels'):
        make()([images()], WIDTHS)
