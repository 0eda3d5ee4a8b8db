"""Losses and loss weights against recorded numbers, plain transcriptions of their formulas, and closed forms."""

import math

import pytest
import torch

from slimclr_hub.methods.losses import (
    DISTILLATIONS,
    SCHEMES,
    accuracy,
    atkd,
    dkd,
    info_nce,
    kd,
    kl_divergence,
    loss_weights,
    make_distillation,
    mse,
    similarities,
    without_column,
)
from tests.formula import tensor
from tests.methods import plain
from tests.methods.plain import divergence, softmax
from tests.reference import TRAINING

RECORDED = TRAINING['functions']
WIDTHS = (1.0, 0.75, 0.5, 0.25)
STUDENT = torch.from_numpy(tensor('student', (6, 33))) * 3
TEACHER = torch.from_numpy(tensor('teacher', (6, 33))) * 3
LABELS = torch.arange(6) % 5


def rows(x):
    return x.double().tolist()


def test_recorded():
    assert kd(STUDENT, TEACHER, 5.0).item() == pytest.approx(
        RECORDED['kd T=5 (cross-entropy form, times T^2)'], rel=1e-5
    )
    assert 25 * kl_divergence(STUDENT, TEACHER, 5.0).item() == pytest.approx(
        RECORDED['kd T=5 (kl_div form, times T^2)'], rel=1e-5
    )
    assert dkd(STUDENT, TEACHER, LABELS).item() == pytest.approx(RECORDED['dkd alpha=1 beta=0.5 T=1'], rel=1e-5)
    assert atkd(STUDENT, TEACHER).item() == pytest.approx(RECORDED['atkd multiplier=2 T=4'], rel=1e-5)
    assert mse(STUDENT, TEACHER).item() == pytest.approx(RECORDED['mse'], rel=1e-5)


# Transcriptions


def test_similarities():
    torch.manual_seed(0)
    query, key, negatives = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    expected = [[float(query[b] @ key[b]), *(float(query[b] @ negatives[k]) for k in range(5))] for b in range(3)]
    torch.testing.assert_close(similarities(query, key, negatives), torch.tensor(expected))


def test_similarities_without_keys():
    """The keys are among the others then, each in the column of its place."""
    torch.manual_seed(0)
    query, keys = torch.randn(3, 4), torch.randn(7, 4)
    torch.testing.assert_close(similarities(query, None, keys), torch.tensor(plain.products(query, keys)))


@pytest.mark.parametrize(
    ('given', 'kept'), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_precision_of_similarities(given, kept):
    """At least single, under autocast too; double stays double."""
    unit = torch.nn.functional.normalize(torch.randn(5, 16, dtype=torch.double), dim=1).to(given)
    with torch.autocast('cpu', torch.bfloat16):
        ours = similarities(unit[:2], unit[:2], unit)
    assert ours.dtype == kept
    torch.testing.assert_close(ours[:, 1:], (unit[:2].double() @ unit.double().T).to(kept))


def test_without_column():
    x = torch.arange(12).view(3, 4)
    assert without_column(x, torch.tensor([0, 2, 3])).tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]


@pytest.mark.parametrize('temperature', [0.07, 0.2, 1.0])
def test_info_nce(temperature):
    expected = plain.cross_entropy(rows(STUDENT), [0] * 6, temperature)
    assert info_nce(STUDENT, temperature).item() == pytest.approx(expected, rel=1e-5)
    expected = plain.cross_entropy(rows(STUDENT), LABELS.tolist(), temperature)
    assert info_nce(STUDENT, temperature, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_accuracy():
    logits = torch.tensor([[3.0, 1, 2], [1, 3, 2], [1, 2, 3], [3, 2, 1]])
    assert accuracy(logits, torch.tensor([0, 1, 2, 0])) == 1
    assert accuracy(logits, torch.tensor([1, 0, 1, 2])) == 0
    assert accuracy(logits, torch.tensor([0, 1, 0, 1])) == 0.5


def test_accuracy_of_ties():
    """Being as large as another is a miss, wherever the target stands: a collapsed network recognises nothing."""
    for column in range(5):
        assert accuracy(torch.ones(4, 5), torch.full((4,), column)) == 0
    assert accuracy(torch.tensor([[2.0, 2, 1], [2, 1, 1]]), torch.zeros(2, dtype=torch.long)) == 0.5
    assert accuracy(torch.full((4, 5), torch.nan), torch.zeros(4, dtype=torch.long)) == 0


@pytest.mark.parametrize('temperature', [0.5, 5.0])
def test_kd(temperature):
    expected = plain.kd(rows(STUDENT), rows(TEACHER), temperature, squared=False)
    assert kd(STUDENT, TEACHER, temperature, squared=False).item() == pytest.approx(expected, rel=1e-5)
    assert kd(STUDENT, TEACHER, temperature).item() == pytest.approx(expected * temperature**2, rel=1e-5)


@pytest.mark.parametrize('temperature', [0.5, 5.0])
def test_kl_divergence(temperature):
    expected = 0.0
    for student, teacher in zip(rows(STUDENT), rows(TEACHER), strict=True):
        p = softmax([value / temperature for value in teacher])
        expected += divergence(p, softmax([value / temperature for value in student])) / 6
    assert kl_divergence(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ('alpha', 'beta', 'temperature'), [(1.0, 0.5, 1.0), (0.3, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
)
def test_dkd(alpha, beta, temperature):
    """Eq. (7) of Zhao et al. 2022: target-class and non-target-class distillation."""
    expected = 0.0
    for student, teacher, label in zip(rows(STUDENT), rows(TEACHER), LABELS.tolist(), strict=True):
        p = softmax([value / temperature for value in teacher])
        q = softmax([value / temperature for value in student])
        target = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = divergence(
            [value / (1 - p[label]) for i, value in enumerate(p) if i != label],
            [value / (1 - q[label]) for i, value in enumerate(q) if i != label],
        )
        expected += (alpha * target + beta * others) * temperature**2 / 6
    assert dkd(STUDENT, TEACHER, LABELS, alpha, beta, temperature).item() == pytest.approx(expected, rel=1e-4)


def test_atkd():
    def standardised(row):
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-5)
        return [(value - mean) / deviation / 2 for value in row]

    expected = sum(
        divergence(softmax(standardised(teacher)), softmax(standardised(student))) * 16 / 6
        for student, teacher in zip(rows(STUDENT), rows(TEACHER), strict=True)
    )
    assert atkd(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-5)


def test_mse():
    pairs = list(zip(STUDENT.flatten().tolist(), TEACHER.flatten().tolist(), strict=True))
    assert mse(STUDENT, TEACHER).item() == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / len(pairs), rel=1e-5)


# Closed forms


def test_uniform_similarities():
    """No preference among C candidates costs log C, and log C times tau squared."""
    uniform = torch.full((4, 33), 0.3)
    assert info_nce(uniform, 0.2).item() == pytest.approx(math.log(33), rel=1e-6)
    assert kd(uniform, uniform, 5.0).item() == pytest.approx(25 * math.log(33), rel=1e-6)
    assert kd(uniform, TEACHER[:4], 5.0, squared=False).item() == pytest.approx(math.log(33), rel=1e-6)


def test_certain_positive():
    similarity = torch.tensor([[1.0, -1.0, -1.0]])
    assert info_nce(similarity, 0.2).item() == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-2)
    assert info_nce(similarity.flip(1), 0.2).item() == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize('name', [name for name in DISTILLATIONS if name not in ('kd', 'none')])
def test_no_loss_where_student_and_teacher_agree(name):
    assert make_distillation(name, 5.0)(TEACHER, TEACHER, LABELS).item() == pytest.approx(0, abs=1e-6)
    assert make_distillation(name, 5.0)(STUDENT, TEACHER, LABELS).item() > 0.1


def test_kd_lies_above_the_divergence_by_the_entropy():
    entropy = -sum(sum(p * math.log(p) for p in softmax([value / 5 for value in row])) for row in rows(TEACHER)) / len(
        TEACHER
    )
    gap = kd(STUDENT, TEACHER, 5.0, squared=False) - kl_divergence(STUDENT, TEACHER, 5.0)
    assert gap.item() == pytest.approx(entropy, rel=1e-4)


def test_gradients():
    """d info_nce and d kd with respect to the logits: softmax minus the target, over B and tau."""
    student = STUDENT.double().requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(student, 0.2), student)
    target = torch.zeros(6, 33, dtype=torch.double)
    target[:, 0] = 1
    torch.testing.assert_close(gradient, ((student / 0.2).softmax(1) - target).detach() / 6 / 0.2)
    (gradient,) = torch.autograd.grad(kd(student, TEACHER.double(), 5.0), student)
    expected = ((student / 5).softmax(1) - (TEACHER.double() / 5).softmax(1)).detach() / 6 / 5 * 25
    torch.testing.assert_close(gradient, expected)
    (other,) = torch.autograd.grad(kl_divergence(student, TEACHER.double(), 5.0), student)
    torch.testing.assert_close(other * 25, expected)


# By name


def test_make_distillation():
    expected = {
        'kd': kd(STUDENT, TEACHER, 3.0),
        'mse': mse(STUDENT, TEACHER),
        'dkd': dkd(STUDENT, TEACHER, LABELS),
        'atkd': atkd(STUDENT, TEACHER),
    }
    for name, value in expected.items():
        assert torch.equal(make_distillation(name, 3.0)(STUDENT, TEACHER, LABELS), value)
    assert torch.equal(make_distillation('kd', 3.0, squared=False)(STUDENT, TEACHER, LABELS) * 9, expected['kd'])
    assert make_distillation('none', 3.0) is None
    assert {*expected, 'none'} == set(DISTILLATIONS)


# Loss weights


@pytest.mark.parametrize(
    ('scheme', 'paper', 'recorded'),
    [
        ('full_plus_sum', [2.5, 1.0, 1.0, 1.0], 'paper (1)'),
        ('full_plus_max', [1.75, 1.0, 1.0, 1.0], 'paper (2)'),
        ('proportional', [1.6, 1.2, 0.8, 0.4], 'paper (3)'),
        ('cumulative', [1.54, 1.08, 0.77, 0.62], 'paper (4)'),
        ('none', [1.0, 1.0, 1.0, 1.0], 'none'),
    ],
)
def test_loss_weights(scheme, paper, recorded):
    weights = loss_weights(scheme, WIDTHS)
    assert weights == pytest.approx(paper, abs=0.0051)  # printed with two decimals
    assert weights == pytest.approx(RECORDED[f'loss weights {recorded}'], abs=0.00051)  # recorded with three


def test_loss_weights_of_other_widths():
    widths = (0.8, 0.4)
    assert loss_weights('full_plus_sum', widths) == pytest.approx([1.4, 1])
    assert loss_weights('full_plus_max', (0.8, 0.4, 0.2)) == pytest.approx([1.4, 1, 1])
    assert loss_weights('proportional', widths) == pytest.approx([2 * 0.8 / 1.2, 2 * 0.4 / 1.2])
    assert loss_weights('cumulative', widths) == pytest.approx([2 * 1.4 / 2.4, 2 / 2.4])
    assert sum(loss_weights('cumulative', WIDTHS)) == pytest.approx(4)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_single_width_has_weight_one(scheme):
    for width in WIDTHS:
        assert loss_weights(scheme, [width]) == pytest.approx([1.0])


def test_loss_weights_as_numbers():
    assert loss_weights([3, 1, 0.5], (1.0, 0.5, 0.25)) == [3.0, 1.0, 0.5]


def test_wrong_loss_weights_are_refused():
    with pytest.raises(ValueError, match=r"'sum'.*full_plus_sum, full_plus_max, proportional, cumulative, none"):
        loss_weights('sum', WIDTHS)
    with pytest.raises(ValueError, match=r'2 numbers for 4 widths'):
        loss_weights([1.0, 2.0], WIDTHS)
