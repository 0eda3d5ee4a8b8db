"""Objective (7) over given logits: loops, what is logged, weights, and no value that has to reach the host."""

import math

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.losses import DISTILLATIONS, atkd, dkd, info_nce, kd, kl_divergence, mse
from slimclr_hub.methods.objective import Objective
from slimclr_hub.methods.registry import settings_of, training_of
from tests.methods import plain
from tests.networks import method_of

WIDTHS = (1.0, 0.75, 0.5, 0.25)
LOSSES = {
    'kd': lambda student, teacher, target: kd(student, teacher, 3.0),
    'mse': lambda student, teacher, target: mse(student, teacher),
    'dkd': dkd,
    'atkd': lambda student, teacher, target: atkd(student, teacher),
}


def make_logits(widths=WIDTHS):
    torch.manual_seed(3)
    target = torch.tensor([0, 4, 32, 4, 17, 1])
    return {width: torch.randn(6, 33, dtype=torch.double, requires_grad=True) for width in widths}, target


@pytest.mark.parametrize(
    ('weights', 'numbers'), [('full_plus_sum', [2.5, 1, 1, 1]), ([2, 1, 0.5, 0.25], [2, 1, 0.5, 0.25])]
)
def test_against_loops(weights, numbers):
    logits, target = make_logits()
    objective = Objective(WIDTHS, distillation_temperature=3.0, loss_weights=weights)
    output = objective(logits, target, temperature=0.2, scale=0.4)
    rows = {width: values.tolist() for width, values in logits.items()}
    parts = plain.objective(rows, target.tolist(), numbers, tau_1=0.2, tau_2=3.0, scale=0.4)
    assert output['loss'].item() == pytest.approx(sum(parts.values()), rel=1e-12)
    for width, part in parts.items():
        assert output[f'loss/{width:g}'].item() == pytest.approx(part, rel=1e-12)
        contrastive = plain.cross_entropy(rows[width], target.tolist(), 0.2)
        assert output[f'info_nce/{width:g}'].item() == pytest.approx(contrastive, rel=1e-12)
        hits = sum(row.index(max(row)) == column for row, column in zip(rows[width], target.tolist(), strict=True))
        assert output[f'accuracy/{width:g}'].item() == pytest.approx(hits / 6)


@pytest.mark.parametrize('distillation', DISTILLATIONS)
def test_each_distillation(distillation):
    logits, target = make_logits()
    output = Objective(WIDTHS, distillation=distillation, distillation_temperature=3.0)(logits, target, temperature=0.2)
    full = logits[1.0].detach()
    expected = {'loss': 2.5 * info_nce(logits[1.0], 0.2, target)}
    for width in WIDTHS[1:]:
        part = info_nce(logits[width], 0.2, target)
        if distillation != 'none':
            expected[f'distillation/{width:g}'] = LOSSES[distillation](logits[width], full, target)
            part = (part + expected[f'distillation/{width:g}']) / 2
        expected[f'loss/{width:g}'] = part
        expected[f'kl/{width:g}'] = kl_divergence(logits[width], full, 3.0)
        expected['loss'] = expected['loss'] + part
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, msg=name, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(output[f'loss/{width:g}'] for width in WIDTHS), output['loss'], rtol=1e-12, atol=0)
    always = {f'{name}/{width:g}' for name in ('loss', 'info_nce', 'accuracy') for width in WIDTHS}
    assert output.keys() == always | expected.keys()
    assert [name for name, value in output.items() if value.requires_grad] == ['loss']
    # The same gradient to each pupil; and the full network learns nothing from its pupils.
    alone = 2.5 * info_nce(logits[1.0], 0.2, target)
    for ours, theirs in (
        (torch.autograd.grad(output['loss'], list(logits.values())[1:], retain_graph=True), expected['loss']),
        (torch.autograd.grad(output['loss'], [logits[1.0]]), alone),
    ):
        at = list(logits.values())[1:] if len(ours) > 1 else [logits[1.0]]
        torch.testing.assert_close(ours, torch.autograd.grad(theirs, at, retain_graph=True), rtol=1e-10, atol=1e-12)


def test_unsquared_kd():
    logits, target = make_logits()
    squared = Objective(WIDTHS, distillation_temperature=3.0)(logits, target)
    output = Objective(WIDTHS, distillation_temperature=3.0, distillation_squared=False)(logits, target)
    for width in WIDTHS[1:]:
        torch.testing.assert_close(output[f'distillation/{width:g}'] * 9, squared[f'distillation/{width:g}'])
        torch.testing.assert_close(output[f'kl/{width:g}'], squared[f'kl/{width:g}'])


@pytest.mark.parametrize('weights', ['full_plus_sum', 'cumulative', [3.0, 1.0, 1.0, 1.0]])
def test_the_full_width_alone_counts_once(weights):
    """Slow start: a weight for each width is for all of them together."""
    logits, target = make_logits(WIDTHS[:1])
    output = Objective(WIDTHS, loss_weights=weights)(logits, target, temperature=0.2)
    assert set(output) == {'loss', 'loss/1', 'info_nce/1', 'accuracy/1'}
    torch.testing.assert_close(output['loss'], info_nce(logits[1.0], 0.2, target), rtol=1e-12, atol=0)


def test_accuracy_and_divergence_at_their_ends():
    near = torch.full((4, 33), -1.0)
    near[:, 0] = 1
    logits = {1.0: near, 0.75: near, 0.5: near.roll(1, 1), 0.25: torch.zeros(4, 33)}
    output = Objective(WIDTHS)(logits, torch.zeros(4, dtype=torch.long), 0.2)
    assert [output[f'accuracy/{width:g}'].item() for width in WIDTHS] == [1, 1, 0, 0]  # a collapsed one recognises none
    assert output['info_nce/0.25'].item() == pytest.approx(math.log(33), rel=1e-6)
    assert output['kl/0.75'].item() == pytest.approx(0, abs=1e-6)
    # Two candidates changed places whose similarities differ by 2: (a - b) log(a / b) at temperature 5.
    a, b = math.exp(0.2), math.exp(-0.2)
    assert output['kl/0.5'].item() == pytest.approx((a - b) / (a + 32 * b) * 0.4, rel=1e-4)


def test_name_in_the_logs():
    logits, target = make_logits((0.5,))
    output = Objective((0.5,), name='cross_entropy')(logits, target)
    assert set(output) == {'loss', 'loss/0.5', 'cross_entropy/0.5', 'accuracy/0.5'}


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match=r"'cosine'.*kd, mse, dkd, atkd, none"):
        Objective(WIDTHS, distillation='cosine')
    with pytest.raises(InputError, match=r"'heavy'.*full_plus_sum"):
        Objective(WIDTHS, loss_weights='heavy')
    with pytest.raises(InputError, match=r'2 numbers for 4 widths'):
        Objective(WIDTHS, loss_weights=[1.0, 2.0])


@pytest.mark.parametrize('distillation', DISTILLATIONS)
def test_no_value_is_asked_for(distillation):
    """On the meta device there are none: asking for one, or for a size that depends on one, raises."""
    logits = {width: torch.zeros(6, 33, device='meta', requires_grad=True) for width in WIDTHS}
    target = torch.zeros(6, dtype=torch.long, device='meta')
    Objective(WIDTHS, distillation=distillation)(logits, target, 0.2)['loss'].backward()


@pytest.mark.parametrize('name', METHODS)
def test_no_method_asks_for_a_value(name):
    """As above, so that a step has no reason to wait for an accelerator."""
    # Dense networks begin on the meta device, whose tensors some releases of PyTorch (2.14) do not take for fake ones.
    with FakeTensorMode(allow_non_fake_inputs=True):
        classes = 10 if name == 'supervised' else 0
        backbone = timm.create_model('slimclr_resnet20', num_classes=classes, widths=(1.0, 0.25))
        queue = {'queue_size': 32} if 'queue_size' in settings_of(name) else {}
        method = method_of(name, backbone, **queue)
        views = [torch.zeros(8, 3, 12, 12)] * (2 if training_of(name).neighbours is None else 4)
        method(views, (1.0, 0.25), 0.9, torch.zeros(8, dtype=torch.long))['loss'].backward()
