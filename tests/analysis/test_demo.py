"""A run by the recipe of the demo records enough for every analysis in docs/analysis.md."""

import json
from pathlib import Path

import pytest

from slimclr_hub.analysis.replay import checkpoint_steps
from slimclr_hub.train.command import load_recipe
from tests.analysis.runs import ANALYZE, run_script
from tests.data_room.files import write_idx_set
from tests.train.runs import SCRIPT

CONFIGS = SCRIPT.parent / 'configs'


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """192 steps on few and small images, with the diagnostics and the two checkpoints that the recipe has."""
    place = tmp_path_factory.mktemp('demo')
    data = ['--data.name', 'fashion-mnist', '--data.root', str(write_idx_set(place / 'idx', 96, 37))]
    sizes = ['--data.size', '8', '--views.size', '8', '--data.batch_size', '16', '--data.num_workers', '0']
    method = ['--knn.every', '0', '--probe.every', '0', '--optim.epochs', '32']
    method += ['--run.checkpoint_every', '31']  # the last two epochs have one
    run_script(SCRIPT, *data, *sizes, *method, '--run.output', str(place), '--run.name', 'demo')
    assert len(checkpoint_steps(place / 'demo')) == 2
    return place / 'demo'


@pytest.mark.parametrize(
    ('arguments', 'data'),
    [
        (['gradients'], 'gradients'),
        (['trajectory'], 'trajectory'),
        (['surface', '--resolution', '3'], 'error-surface'),
    ],
    ids=['gradients', 'trajectory', 'surface'],
)
def test_analysis(run, arguments, data, capsys):
    name, *options = arguments
    run_script(ANALYZE, name, str(run), *options)
    assert 'error' not in capsys.readouterr().err
    content = json.loads((run / 'analysis' / f'{data}.json').read_text())
    if name == 'gradients':
        (found,) = content['runs']
        assert (found['norms_from'], found['gradients_from']) == ('records', 'records')
    if name == 'trajectory':
        assert content['trajectories'][0]['none']['steps'] == [0, 186, 187, 192]


def test_recipes_of_results_record_alike():
    """RESULTS.md compares their gradients, whose directions depend on how far apart they lie, and their ways."""
    recipes = {path.stem: path for path in (CONFIGS / 'small_scale').glob('*.yaml')}
    del recipes['collapse'], recipes['compress']  # in none of those figures; CompRess has no head
    (recorded,) = {load_recipe(path).diagnostics for path in recipes.values()}
    assert recorded.on
    assert load_recipe(CONFIGS / 'mocov3_resnet20_fashionmnist6k.yaml').diagnostics.on
