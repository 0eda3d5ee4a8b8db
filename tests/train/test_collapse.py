"""What a run says that collapses, through the real script, and what others do not say."""

from dataclasses import replace
from math import log

import pytest
import torch

from slimclr_hub.methods.objective import Objective
from slimclr_hub.train.collapse import CollapseWatch
from slimclr_hub.train.config import ModelConfig, OptimConfig, PretrainConfig
from tests.train.runs import direct, make_place, read_metrics

WIDTHS = (1.0, 0.25)
HEALTHY = {1.0: 14.0, 0.25: 5.0}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp('collapse')
    return make_place(
        place, model={'widths': list(WIDTHS)}, method={'slow_start_epochs': 0}, knn={'every': 1}, optim={'epochs': 2}
    )


def test_run_whose_weights_decay_to_nothing_says_so(place):
    """The first steps shrink the weights to a tenth each, until all images have one feature."""
    result = direct(
        place, '--run.name', 'dead', '--optim.weight_decay', '9', '--optim.lr', '0.1', '--optim.momentum', '0'
    )
    assert result.returncode == 0, result.stderr
    (warning,) = read_metrics(place / 'runs' / 'dead', 'warning')
    assert warning['text'].startswith('Warning: epoch 1: the network collapses')
    for width in WIDTHS:
        assert f'width {width:g}: ' in warning['text']
    for number in 'effective rank 1.0', 'optim.lr, now 0.1', 'optim.warmup_epochs, now 0', 'slow_start_epochs, now 0':
        assert number in warning['text']
    assert (result.stdout + result.stderr).count(warning['text']) == 1
    assert (place / 'runs' / 'dead' / 'model.safetensors').is_file()


def test_run_that_learns_says_nothing(place):
    result = direct(place, '--run.name', 'well')
    assert result.returncode == 0, result.stderr
    assert read_metrics(place / 'runs' / 'well', 'warning') == []
    assert 'Warning: epoch' not in result.stdout + result.stderr


@pytest.mark.parametrize('candidates', [65, 65537])
def test_embeddings_that_are_all_alike_are_at_chance(candidates):
    """The number of candidates is that of the logits, whatever the method."""
    objective = Objective(WIDTHS)
    logits = {width: torch.full((4, candidates), 0.9) for width in WIDTHS}
    losses = objective(logits, torch.zeros(4, dtype=torch.long), temperature=0.2)
    assert objective.candidates == candidates
    watch = CollapseWatch(replace(PretrainConfig(), model=ModelConfig(widths=WIDTHS)), 'info_nce')
    watch.add({name: value.item() for name, value in losses.items()})
    signs = watch.after(1, objective.candidates, {})
    assert signs == dict.fromkeys(
        WIDTHS, f'info_nce {log(candidates):.3f} is at chance, ln {candidates} = {log(candidates):.3f}'
    )


def lines(loss: float) -> dict[str, float]:
    return {f'{name}/{width:g}': loss for name in ('loss', 'info_nce') for width in WIDTHS}


def test_once_until_it_has_recovered_and_not_in_warm_up():
    config = replace(PretrainConfig(), model=ModelConfig(widths=WIDTHS), optim=OptimConfig(epochs=9, warmup_epochs=1.5))
    watch = CollapseWatch(config, 'info_nce')
    told = []
    for epoch, loss in enumerate((4.17, 4.17, 4.17, 4.17, 3.0, 4.18), 1):
        for _ in range(4):
            watch.add(lines(loss - 0.05))
            watch.add(lines(loss + 0.05))
        told.append(list(watch.after(epoch, 65, HEALTHY)))
    assert told == [[], list(WIDTHS), [], [], [], list(WIDTHS)]
    # Of an epoch whose last quarter comes after warm-up, that quarter is looked at: a run may have one epoch alone.
    for warmup, told in (0.7, list(WIDTHS)), (0.8, []):
        watch = CollapseWatch(replace(config, optim=OptimConfig(epochs=1, warmup_epochs=warmup)), 'info_nce')
        watch.add(lines(4.17))
        assert list(watch.after(1, 65, HEALTHY)) == told
    # A mean at chance of losses that are not is no collapse.
    watch = CollapseWatch(replace(config, optim=OptimConfig()), 'info_nce')
    for loss in (4.17 - 0.5, 4.17 + 0.5) * 4:
        watch.add(lines(loss))
    assert watch.after(1, 65, HEALTHY) == {}


@pytest.mark.parametrize(('last', 'told'), [((4.17, 4.18), list(WIDTHS)), ((4.17, 3.9), [])])
def test_a_loss_that_rises_to_chance_in_the_course_of_an_epoch(last, told):
    watch = CollapseWatch(replace(PretrainConfig(), model=ModelConfig(widths=WIDTHS)), 'info_nce')
    for loss in (3.0, 3.3, 3.6, 3.9, 4.0, 4.1, *last):
        watch.add(lines(loss))
    assert list(watch.after(1, 65, HEALTHY)) == told


def test_rank_of_trained_widths_alone():
    """During slow start the statistics of narrower widths are estimates, and nothing can be said of them."""
    watch = CollapseWatch(replace(PretrainConfig(), model=ModelConfig(widths=WIDTHS)), None)
    dead = {1.0: 1.004, 0.25: 1.0}
    watch.add({'loss/1': 3.0})
    assert watch.after(1, 0, dead) == {1.0: 'effective rank 1.00'}
    watch.add(lines(3.0))
    assert watch.after(2, 0, dead) == {0.25: 'effective rank 1.00'}
    watch.add(lines(3.0))
    assert watch.after(3, 0, {**HEALTHY, 0.25: float('nan')}) == {}
    assert watch.after(4, 0, HEALTHY) == {}
