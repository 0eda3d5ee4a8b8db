import copy
from math import cos, exp, log, pi

import pytest
import timm
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from torch.testing import assert_close

from slimclr_hub.evaluate.linear_eval.config import SweepConfig
from slimclr_hub.evaluate.linear_eval.probe import (
    ProbeSweep,
    accuracies,
    folded,
    lr_factor,
    make_head,
    make_optimizer,
    standardisation,
)
from slimclr_hub.methods.objective import Objective

WIDTHS = (1.0, 0.5, 0.25)
CLASSES = 7
BATCH = 12
KINDS = ('switchable', 'slimmable')


@pytest.fixture(scope='module', params=[True, False], ids=['overlap', 'disjoint'])
def backbone(request):
    return timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, overlap=request.param)


def some_features(count: int = BATCH, seed: int = 0) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Features of a ResNet-20, of means and deviations that differ by width and place."""
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for width in WIDTHS:
        channels = int(64 * width)
        spread, shift = torch.rand(2, channels, generator=generator, dtype=torch.float64) * 3 + 0.1
        features[width] = torch.randn(count, channels, generator=generator, dtype=torch.float64) * spread + shift
    return features, torch.randint(CLASSES, (count,), generator=generator)


def a_head(backbone, kind: str):
    """A head in double precision, far enough from zero for its outputs to matter."""
    head = make_head(backbone, kind, CLASSES, 0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return head


def by_hand(logits: dict[float, list[list[float]]], labels: list[int], distillation: bool) -> float:
    """The paper's loss of the probe, one image and one class at a time."""
    total = 0.0
    for width, rows in logits.items():
        loss = 0.0
        for row, full, label in zip(rows, logits[1.0], labels, strict=True):
            normaliser = log(sum(exp(value) for value in row))
            cross_entropy = normaliser - row[label]
            if width == 1.0 or not distillation:
                loss += cross_entropy
                continue
            teacher = log(sum(exp(value) for value in full))
            soft = sum(exp(f - teacher) * (normaliser - value) for f, value in zip(full, row, strict=True))
            loss += (cross_entropy + soft) / 2
        total += loss / len(labels)
    return total


@pytest.mark.parametrize('distillation', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_loss_is_the_papers(backbone, kind, distillation):
    features, labels = some_features()
    head = a_head(backbone, kind)
    output = ProbeSweep(head, WIDTHS, 2, distillation)(features, labels)
    logits = {width: head(x, width) for width, x in features.items()}
    objective = Objective(
        WIDTHS, distillation='kd' if distillation else 'none', distillation_temperature=1.0, loss_weights='none'
    )
    assert output['loss/0'].item() == pytest.approx(objective(logits, labels)['loss'].item(), rel=1e-12)
    expected = by_hand({width: rows.tolist() for width, rows in logits.items()}, labels.tolist(), distillation)
    assert output['loss/0'].item() == pytest.approx(expected, rel=1e-12)
    assert output['loss'].item() == pytest.approx(2 * expected, rel=1e-12)


def test_full_width_learns_from_labels_alone(backbone):
    """Distillation is detached: the full layer's gradient is that of the cross-entropy."""
    features, labels = some_features()
    head = a_head(backbone, 'switchable')
    sweep = ProbeSweep(head, WIDTHS, 1, True)
    sweep(features, labels)['loss'].backward()
    nn.functional.cross_entropy(head(features[1.0], 1.0), labels).backward()
    assert_close(sweep.heads[0]['w100'].weight.grad, head['w100'].weight.grad, rtol=1e-12, atol=0)


def test_probe_is_in_full_precision(backbone):
    features, labels = some_features()
    sweep = ProbeSweep(make_head(backbone, 'switchable', CLASSES, 0), WIDTHS, 1, True)
    halves = {width: x.bfloat16() for width, x in features.items()}
    plain = sweep({width: x.float() for width, x in halves.items()}, labels)['loss']
    with torch.autocast('cpu', torch.bfloat16):
        assert sweep(halves, labels)['loss'].equal(plain)


def test_initialisation(backbone):
    torch.manual_seed(3)
    undisturbed = torch.rand(2)
    torch.manual_seed(3)
    head = make_head(backbone, 'switchable', 1000, 5)
    assert torch.rand(2).equal(undisturbed)
    assert isinstance(backbone.fc, nn.Identity)
    for linear in head.values():
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert not linear.bias.any()
    again, other = (make_head(backbone, 'switchable', 1000, seed)['w100'].weight for seed in (5, 6))
    assert head['w100'].weight.equal(again)
    assert not head['w100'].weight.equal(other)


# Several learning rates


def train(backbone, kind: str, rates: tuple[float, ...], steps: int = 30) -> list[dict[str, torch.Tensor]]:
    config = SweepConfig(lr=rates, schedule='step', epochs=10)
    sweep = ProbeSweep(make_head(backbone, kind, CLASSES, 0), WIDTHS, len(rates), True)
    optimizer = make_optimizer(sweep, config)
    for step in range(steps):
        features, labels = some_features(seed=step)
        for group in optimizer.param_groups:
            group['lr'] = group['peak'] * lr_factor(config, step, 3)
        optimizer.zero_grad()
        sweep({width: x.float() for width, x in features.items()}, labels)['loss'].backward()
        optimizer.step()
    return [head.state_dict() for head in sweep.heads]


@pytest.mark.parametrize('kind', KINDS)
def test_a_learning_rate_in_a_sweep_is_that_rate_alone(backbone, kind):
    """Bit for bit, and even beside one that diverges."""
    rates = (0.01, 1e38, 0.3)
    together = train(backbone, kind, rates)
    assert not all(tensor.isfinite().all() for tensor in together[1].values())
    for i in 0, 2:
        (alone,) = train(backbone, kind, rates[i : i + 1])
        assert all(together[i][name].equal(tensor) for name, tensor in alone.items())
    assert not together[0].keys() - together[2].keys()
    assert not any(together[0][name].equal(tensor) for name, tensor in together[2].items())


def test_schedules():
    step = SweepConfig(lr=60.0, schedule='step', milestones=(60, 80), epochs=100)
    factors = [lr_factor(step, epoch * 10 + 5, 10) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)
    assert lr_factor(step, 599, 10) == 1
    assert lr_factor(step, 600, 10) == pytest.approx(0.1)
    shorter = SweepConfig(lr=60.0, schedule='step', epochs=20)
    assert [lr_factor(shorter, epoch, 1) for epoch in (11, 12, 15, 16)] == pytest.approx([1, 0.1, 0.1, 0.01])
    cosine = SweepConfig(lr=0.4, schedule='cosine', epochs=90)
    for at in 0, 1, 450, 899:
        assert lr_factor(cosine, at, 10) == pytest.approx((1 + cos(pi * at / 900)) / 2, rel=1e-12)


# The two kinds of head


def test_slimmable_head_is_one_layer(backbone):
    features, labels = some_features()
    head = a_head(backbone, 'slimmable')
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(CLASSES, 64), (CLASSES,)]
    for width, x in features.items():
        start, stop = head.spans(width)[1]
        assert stop - start == x.shape[1]
        assert_close(head(x, width), x @ head.weight[:, start:stop].T + head.bias, rtol=1e-12, atol=1e-12)
    ProbeSweep(head, WIDTHS, 1, False)(features, labels)['loss'].backward()
    whole = copy.deepcopy(head)
    with torch.no_grad():
        head.weight[:, head.spans(0.25)[1][0]] += 1
    assert all(not head(x, w).equal(whole(x, w)) for w, x in features.items() if w in (1.0, 0.25))


def test_switchable_head_shares_nothing(backbone):
    features, _ = some_features()
    head = a_head(backbone, 'switchable')
    before = {width: head(x, width) for width, x in features.items()}
    with torch.no_grad():
        head['w050'].weight += 1
    assert [head(x, width).equal(before[width]) for width, x in features.items()] == [True, False, True]


# Standardised features


@pytest.mark.parametrize('kind', KINDS)
def test_scaling_is_worked_into_the_head(backbone, kind):
    features, _ = some_features(200)
    for x in features.values():
        x[:, 0] = 3.0  # a unit that is dead or saturated
    head = a_head(backbone, kind)
    scaling = standardisation(head, features)
    other, _ = some_features(seed=9)
    raw = folded(head, scaling)
    for width, x in other.items():
        shift, scale = scaling[width]
        assert_close(raw(x, width), head((x - shift) * scale, width), rtol=1e-10, atol=1e-10)
    assert folded(head, None)(other[0.5], 0.5).equal(head(other[0.5], 0.5))


def test_standardised_features(backbone):
    features, _ = some_features(200)
    scaling = standardisation(a_head(backbone, 'switchable'), features)
    for width, x in features.items():
        scaled = (x - scaling[width][0]) * scaling[width][1]
        assert scaled.mean(0).abs().max() < 1e-12
        assert_close(scaled.std(0, correction=0), torch.ones_like(scaled[0]), rtol=1e-12, atol=0)

    head = a_head(backbone, 'slimmable')
    scaling = standardisation(head, features)
    for channel in 0, 20, 63:
        variances, scales = [], []
        for width, x in features.items():
            start, stop = head.spans(width)[1]
            if start <= channel < stop:
                variances.append(x[:, channel - start].var(correction=0).item())
                scales.append(scaling[width][1][channel - start].item())
        assert scales == pytest.approx([(sum(variances) / len(variances)) ** -0.5] * len(scales), rel=1e-12)
    assert not any(shift.any() for shift, _ in scaling.values())


# Accuracies


@pytest.mark.parametrize('k', [1, 5])
def test_accuracies_are_scikit_learns(backbone, k):
    features, labels = some_features(100)
    head = a_head(backbone, 'switchable')
    for width, accuracy in accuracies(head, features, labels, k, chunk=17).items():
        logits = head(features[width], width).detach().numpy()
        expected = 100 * top_k_accuracy_score(labels.numpy(), logits, k=k, labels=range(CLASSES))
        assert accuracy == pytest.approx(expected, rel=1e-12)


def test_a_probe_that_has_diverged_is_never_right(backbone):
    features, labels = some_features(100)
    head = a_head(backbone, 'switchable')
    nn.init.constant_(head['w050'].bias, torch.nan)
    measured = accuracies(head, features, labels, 5)
    assert measured[0.5] == 0
    assert measured[0.25] > 0
