"""Supervised slimmable training: cross-entropy, and in-place distillation, against loops."""

import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError
from slimclr_hub.methods import Supervised
from slimclr_hub.train.config import MethodConfig, ModelConfig, PretrainConfig
from slimclr_hub.train.diagnostics import last_linear
from slimclr_hub.train.setup import make_method
from tests.methods import plain

WIDTHS = (1.0, 0.75, 0.5, 0.25)
LABELS = torch.tensor([3, 0, 9, 3, 6])


def make(widths=WIDTHS, head='slimmable', **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=10, widths=widths, head=head, zero_init_last=False)
    return Supervised(backbone, **kwargs).double()


def images(seed=1):
    return torch.randn(5, 3, 12, 12, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(('weights', 'numbers'), [('none', [1] * 4), ('full_plus_max', [1.75, 1, 1, 1])])
def test_against_loops(weights, numbers):
    method = make(loss_weights=weights, distillation='kd', distillation_temperature=2.0)
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


def test_gradient_of_the_shared_classifier_is_the_sum_of_the_widths():
    """Each width adds the gradient of its own cross-entropy to the leading columns, so that widths can interfere."""
    method = make()
    method([images()], WIDTHS, labels=LABELS)['loss'].backward()
    classifier = last_linear(method)
    assert classifier is method.backbone.fc.weight
    expected, of_full = torch.zeros_like(classifier), None
    for width in WIDTHS:
        dense = make().backbone.extract(width).train()
        F.cross_entropy(dense(images()), LABELS).backward()
        gradient = dense.fc.weight.grad
        expected[:, : gradient.shape[1]] += gradient
        of_full = gradient if width == 1.0 else of_full
    torch.testing.assert_close(classifier.grad, expected)
    assert (classifier.grad - of_full).norm() > 0.1 * of_full.norm()


def test_gradient_of_a_switchable_classifier_is_that_of_the_full_width():
    method = make(head='switchable')
    method([images()], WIDTHS, labels=LABELS)['loss'].backward()
    dense = make(head='switchable').backbone.extract(1.0).train()
    F.cross_entropy(dense(images()), LABELS).backward()
    torch.testing.assert_close(last_linear(method).grad, dense.fc.weight.grad)


def test_a_run_has_the_shared_classifier_and_no_distillation():
    config = PretrainConfig(method=MethodConfig('supervised', num_classes=10))
    method = make_method(config)
    assert method.backbone.head == 'slimmable'
    output = method([torch.randn(4, 1, 12, 12)], WIDTHS, labels=LABELS[:4])
    assert not any(name.startswith('distillation') for name in output)
    args = ModelConfig(args={'head': 'switchable'})
    assert make_method(replace(config, model=args)).backbone.head == 'switchable'


def test_undecided_network():
    method = make()
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
