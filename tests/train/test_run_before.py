"""A run that an earlier version wrote, with keys that are gone, goes on from its checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import load_recipe
from tests.scripts import end_well
from tests.train.runs import make_place, read_metrics, start

BEFORE = Path(__file__).parents[1] / 'data' / 'run_before'


def test_resumes(tmp_path):
    place = make_place(tmp_path)
    folder = place / 'runs' / 'before'
    shutil.copytree(BEFORE, folder)
    (folder / 'model.safetensors').unlink()
    recorded = read_metrics(BEFORE)
    printed = end_well(start(place, '--resume', str(folder)))
    assert printed.count('was written by an earlier version') == 1
    assert 'Resuming after epoch 1: ' in printed
    metrics = read_metrics(folder)
    assert [(each['kind'], each['step']) for each in metrics] == [(each['kind'], each['step']) for each in recorded]
    for ours, theirs in zip(metrics, recorded, strict=True):
        for key, value in theirs.items():
            tolerance = {'abs': 1.0} if key.startswith(('knn/', 'linear/', 'accuracy/')) else {'rel': 1e-3, 'abs': 1e-6}
            assert ours[key] == value or ours[key] == pytest.approx(value, **tolerance), key
    tensors, expected = load_file(folder / 'model.safetensors'), load_file(BEFORE / 'model.safetensors')
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    assert load_recipe(folder / RECIPE).run.precision == 'no'
    assert load_recipe(folder / 'recipe-until-step-20.yaml').run.precision is None
