from math import cos, pi

import pytest

from slimclr_hub.runs.schedule import Schedule, cosine_momentum, warmup_cosine
from tests.reference import TRAINING

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def schedule(**values) -> Schedule:
    defaults = {
        'epochs': 4,
        'steps_per_epoch': 2,
        'warmup_epochs': 1,
        'lr': 0.2,
        'momentum': 0.999,
        'widths': WIDTHS,
        'slow_start_epochs': 1,
    }
    return Schedule(**{**defaults, **values})


def test_equals_what_was_recorded_from_the_authors_implementation():
    recorded = TRAINING['mocov2']
    ours = schedule()
    assert ours.total_steps == recorded['total_steps']
    assert ours.warmup_epochs * ours.steps_per_epoch == recorded['warmup_steps']
    for step in recorded['steps']:
        assert ours.lr_at(step['step']) == pytest.approx(step['lr'], rel=1e-9)
        # A width that does not train has a loss of exactly zero there.
        trained = tuple(width for width, loss in zip(WIDTHS, step['losses'], strict=True) if loss > 0)
        assert ours.widths_at(step['step']) == trained
        assert ours.momentum_at(step['step']) == 0.999


def test_equals_what_was_recorded_of_moco_v3():
    recorded = TRAINING['mocov3']
    ours = schedule(lr=1.2, lr_after_slow_start=3.2, momentum=0.99, momentum_schedule='cosine')
    assert ours.total_steps == recorded['total_steps']
    assert ours.epochs == recorded['epochs']
    assert ours.warmup_epochs * ours.steps_per_epoch == recorded['warmup_steps']
    for step in recorded['steps']:
        assert ours.lr_at(step['step']) == pytest.approx(step['lr'], rel=1e-9)
        assert ours.momentum_at(step['step']) == pytest.approx(step['momentum'], rel=1e-12)
        trained = tuple(width for width, loss in zip(WIDTHS, step['losses_view1'], strict=True) if loss > 0)
        assert ours.widths_at(step['step']) == trained


def test_cosine_after_the_warmup():
    ours = schedule(epochs=10, steps_per_epoch=10, warmup_epochs=2, lr=0.6)
    assert ours.lr_at(10) == pytest.approx(0.3)
    assert ours.lr_at(20) == 0.6
    assert ours.lr_at(60) == pytest.approx(0.3)
    assert ours.lr_at(100) == pytest.approx(0, abs=1e-12)
    assert ours.lr_at(99) == pytest.approx(0.3 * (1 + cos(pi * 79 / 80)))
    rates = [ours.lr_at(step) for step in range(100)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert min(rates) > 0


def test_without_warmup():
    ours = schedule(warmup_epochs=0)
    assert ours.lr_at(0) == 0.2
    assert ours.lr_at(4) == pytest.approx(0.1)


def test_warmup_to_the_end():
    """Only a warm-up: no division by the nothing that is left for the cosine."""
    assert warmup_cosine(9, 10, 10, 1.0) == pytest.approx(0.9)
    assert warmup_cosine(10, 10, 10, 1.0) == 1.0


@pytest.mark.parametrize(
    ('epochs', 'steps'),
    [(0, 0), (1, 2), (4, 8), (1.5, 3), (0.4, 1)],
    ids=['none', 'one', 'all', 'one and a half', 'part'],
)
def test_slow_start(epochs, steps):
    ours = schedule(slow_start_epochs=epochs)
    slow = [step for step in range(8) if ours.widths_at(step) == (1.0,)]
    assert slow == list(range(steps))
    assert all(ours.widths_at(step) == WIDTHS for step in range(steps, 8))


def test_slow_start_of_other_widths():
    ours = schedule(widths=(0.5, 0.25))
    assert ours.widths_at(0) == (0.5,)
    assert ours.widths_at(2) == (0.5, 0.25)


@pytest.mark.parametrize('epochs', [0, 1, 2.5, 4])
def test_learning_rate_after_slow_start(epochs):
    """The same curve at another height from epoch S on, in the warm-up too."""
    ours = schedule(warmup_epochs=2, slow_start_epochs=epochs, lr_after_slow_start=0.6)
    before, after = schedule(warmup_epochs=2), schedule(warmup_epochs=2, lr=0.6)
    for step in range(8):
        assert ours.lr_at(step) == (before if step < 2 * epochs else after).lr_at(step)


def test_learning_rate_stays_where_no_other_is_given():
    assert [schedule(slow_start_epochs=2).lr_at(step) for step in range(8)] == [
        schedule(slow_start_epochs=0).lr_at(step) for step in range(8)
    ]


def test_cosine_momentum():
    """From the given one at the first step through the middle to one after the last."""
    ours = schedule(epochs=10, steps_per_epoch=10, momentum=0.9, momentum_schedule='cosine')
    assert ours.momentum_at(0) == pytest.approx(0.9, rel=1e-15)
    assert ours.momentum_at(25) == pytest.approx(1 - 0.1 * (1 + cos(pi / 4)) / 2)
    assert ours.momentum_at(50) == pytest.approx(0.95)
    assert ours.momentum_at(100) == 1
    momenta = [ours.momentum_at(step) for step in range(100)]
    assert momenta == sorted(set(momenta))
    assert momenta[-1] < 1
    assert cosine_momentum(0.5, 2.0, 0.9) == ours.momentum_at(25)


def test_constant_momentum():
    assert {schedule(momentum=0.9).momentum_at(step) for step in range(9)} == {0.9}
    assert schedule(momentum=0.0).momentum_at(3) == 0
