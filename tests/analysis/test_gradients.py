"""Closed forms of what is said of directions, and phases of runs."""

from math import inf, isnan, nan, sqrt

import pytest
import torch

from slimclr_hub.analysis.gradients import GradientsConfig, RunGradients, components, gradients_of, mean_cosines, phases
from slimclr_hub.analysis.replay import slow_start_end
from slimclr_hub.runs.command_line import dump
from slimclr_hub.train.config import MethodConfig, ModelConfig, OptimConfig, PretrainConfig
from slimclr_hub.train.diagnostics import NormRecord, Records


def make_run(gradients, slow_start=1.0, ratios=(4.0, 4.0, 0.5, 1.5)):
    """Two epochs of two steps."""
    norms = [NormRecord(step, 0.5, 2.0, 2 * sqrt(1 + r**2), 2 * r, 2) for step, r in enumerate(ratios)]
    rows = torch.tensor(gradients)
    return RunGradients('run', slow_start, 2, norms, 'records', torch.arange(len(rows)), rows, 'records')


def test_cosines_of_neighbours_and_of_pairs():
    """Directions at 0, 90 and 180 degrees, of any length."""
    consecutive, pairwise = mean_cosines(torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]))
    assert consecutive == pytest.approx(0, abs=1e-12)
    assert pairwise == pytest.approx(-1 / 3)
    assert mean_cosines(torch.ones(4, 3)) == pytest.approx((1, 1))
    assert all(isnan(value) for value in mean_cosines(torch.ones(1, 3)))


def test_directions_are_arrows_from_no_gradient():
    """Closed form: along two axes, of any length. Their mean is zero, so projections are the directions themselves."""
    found = components(
        torch.tensor([[3.0, 0, 0], [-1.0, 0, 0], [0.5, 0, 0], [-7.0, 0, 0], [0, 9.0, 0], [0, -2.0, 0]]), True
    )
    expected = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    torch.testing.assert_close(found.projections, expected)
    torch.testing.assert_close(found.ratios, torch.tensor([4 / 6, 2 / 6], dtype=torch.float64))


def test_gradients_vary_about_their_mean_and_are_drawn_from_no_gradient():
    """Closed form: two directions differ along (1, -1) alone, on which each has a projection of 1 / sqrt(2)."""
    found = components(torch.tensor([[3.0, 0], [5.0, 0], [0, 4.0], [0, 8.0]]), unit_length=True)
    half = sqrt(0.5)
    expected = torch.tensor([[half, 0], [half, 0], [-half, 0], [-half, 0]], dtype=torch.float64)
    torch.testing.assert_close(found.projections * found.projections[0, 0].sign(), expected)
    torch.testing.assert_close(found.ratios, torch.tensor([1.0, 0], dtype=torch.float64))


def test_gradients_as_they_are_count_by_their_length():
    """Closed form: the variance is 18 along the first axis, with a mean of 5, and 2 along the second, with none."""
    found = components(torch.tensor([[2.0, 1], [2.0, -1], [8.0, 1], [8.0, -1]]))
    expected = torch.tensor([[2.0, 1], [2, -1], [8, 1], [8, -1]], dtype=torch.float64)
    torch.testing.assert_close(found.projections, expected)
    torch.testing.assert_close(found.ratios, torch.tensor([0.9, 0.1], dtype=torch.float64))


def test_phases_before_and_after_the_slow_start_point():
    before, after = phases(make_run([[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]))
    assert (before.name, after.name) == ('before S', 'after S')
    assert (before.norms, after.norms, before.gradients, after.gradients) == (2, 2, 2, 2)
    assert (before.rest_ratio, after.rest_ratio) == pytest.approx((4, 1))
    assert before.all_ratio == pytest.approx(sqrt(17))
    assert (before.length, after.length) == pytest.approx((1.5, 1))
    assert (before.consecutive, after.consecutive) == pytest.approx((1, 0))
    assert all(isnan(share) for phase in (before, after) for share in phase.explained)  # two points make a line


@pytest.mark.parametrize(
    ('slow_start', 'widths', 'end'),
    [(0.0, (1.0, 0.5), None), (2.0, (1.0, 0.5), None), (1.0, (1.0,), None), (0.5, (1.0, 0.5), 0.5)],
)
def test_end_of_slow_start(slow_start, widths, end):
    """A run has none that never begins, never ends, or has no other width to begin with."""
    config = PretrainConfig(
        model=ModelConfig(widths=widths),
        method=MethodConfig(slow_start_epochs=slow_start),
        optim=OptimConfig(epochs=2),
    )
    assert slow_start_end(config) == end


def test_run_without_slow_start_has_one_phase():
    (phase,) = phases(make_run([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]], None))
    assert (phase.name, phase.norms, phase.gradients) == ('all', 4, 4)
    assert phase.rest_ratio == pytest.approx(2.5)
    assert phase.explained == pytest.approx((1, 0))


def test_no_gradient_in_the_smallest_width_leaves_no_ratio():
    """As fp16 may leave none at all in a step: such a step is left out of the means."""
    run = make_run([[1.0, 0], [0, 1.0], [1.0, 0]], None)
    run.norms[0] = NormRecord(0, 0.5, 0.0, 0.0, 0.0, 2)
    run.norms[1] = NormRecord(1, 0.5, float('inf'), float('inf'), float('inf'), 2)
    (phase,) = phases(run)
    assert phase.rest_ratio == pytest.approx((0.5 + 1.5) / 2)


def test_steps_that_overflowed_are_left_out(tmp_path, monkeypatch):
    """Those that a loss scaler has skipped; both kinds of record hold them."""
    (tmp_path / 'recipe.yaml').write_text(dump(PretrainConfig()))
    monkeypatch.setattr('slimclr_hub.analysis.gradients._steps_per_epoch', lambda folder: 2)
    whole = [NormRecord(step, 0.25, 1.0, 2.0, 1.0, 4) for step in (0, 2, 3)]
    Records(tmp_path).add_norms([*whole[:1], NormRecord(1, 0.25, inf, inf, 1.0, 4), *whole[1:]])
    gradients = torch.eye(4)
    gradients[1, 2] = nan
    Records(tmp_path).add_gradients([0, 1, 2, 3], gradients)
    found = gradients_of(tmp_path, GradientsConfig())
    assert found.norms == whole
    assert found.steps.tolist() == [0, 2, 3]
    assert found.gradients.equal(torch.eye(4)[[0, 2, 3]])
    assert found.notes == (f'{tmp_path.name}: 2 records whose gradient is not finite are left out',)
