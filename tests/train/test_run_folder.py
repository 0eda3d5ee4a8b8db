import json
import os
from dataclasses import replace

import pytest

from slimclr_hub import files as whole
from slimclr_hub.errors import InputError
from slimclr_hub.train.command import load_recipe
from slimclr_hub.train.config import DataConfig, PretrainConfig, RunConfig
from slimclr_hub.train.run_folder import RunFolder, find_run


def config(tmp_path, **values) -> PretrainConfig:
    return replace(PretrainConfig(), run=RunConfig(output=str(tmp_path / 'runs'), **values))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Creation


def test_named_run(tmp_path, accelerator):
    folder = RunFolder.create(config(tmp_path, name='mine'), accelerator)
    assert folder.path == tmp_path / 'runs' / 'mine'
    assert names(folder.path) == ['recipe.yaml']
    assert load_recipe(folder.path / 'recipe.yaml') == config(tmp_path, name='mine')


def test_named_run_is_not_overwritten(tmp_path, accelerator):
    folder = RunFolder.create(config(tmp_path, name='mine'), accelerator)
    before = (folder.path / 'recipe.yaml').read_bytes()
    with pytest.raises(InputError, match=r'mine is there already.*--resume'):
        RunFolder.create(config(tmp_path, name='mine', seed=5), accelerator)
    assert (folder.path / 'recipe.yaml').read_bytes() == before
    assert names(folder.path) == ['recipe.yaml']


def test_empty_folder_of_a_process_that_was_killed_is_taken(tmp_path, accelerator):
    (tmp_path / 'runs' / 'mine').mkdir(parents=True)
    assert names(RunFolder.create(config(tmp_path, name='mine'), accelerator).path) == ['recipe.yaml']


def test_run_without_a_name_takes_a_free_one(tmp_path, accelerator):
    made = [RunFolder.create(config(tmp_path), accelerator).path for _ in range(3)]
    stem = 'mocov2_slimclr_resnet20_fashion-mnist-6k_8e'
    assert [path.name for path in made] == [stem, f'{stem}-2', f'{stem}-3']


def test_name_of_a_hub_data_set_makes_one_folder(tmp_path, accelerator):
    hub = replace(config(tmp_path), data=DataConfig(name='hfds/user/images'))
    path = RunFolder.create(hub, accelerator).path
    assert path.parent == tmp_path / 'runs'
    assert 'user-images' in path.name


def test_output_that_cannot_be_a_folder(tmp_path, accelerator):
    (tmp_path / 'runs').write_text('a file')
    with pytest.raises(InputError, match=r'run\.output'):
        RunFolder.create(config(tmp_path), accelerator)


# Metrics


def test_metrics(tmp_path, accelerator):
    folder = RunFolder(tmp_path, accelerator)
    assert folder.read_metrics() == []
    records = [{'kind': 'eval', 'step': 0, 'knn/1': 10.0}, *({'kind': 'train', 'step': step} for step in (2, 4, 6))]
    for record in records:
        folder.write_metrics(record)
    assert folder.read_metrics() == records
    assert [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == records


def test_later_metrics_are_dropped(tmp_path, accelerator):
    folder = RunFolder(tmp_path, accelerator)
    folder.drop_metrics_after(3)  # nothing there yet
    for step in range(6):
        folder.write_metrics({'kind': 'train', 'step': step})
    # A kill may cut the last line anywhere.
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "los')
    # Or what was to be written is on the disk as other bytes.
    with (tmp_path / 'metrics.jsonl').open('ab') as file:
        file.write(b'\xff\xfe{\n')
    folder.drop_metrics_after(3)
    assert folder.read_metrics() == [{'kind': 'train', 'step': step} for step in range(4)]
    folder.write_metrics({'kind': 'eval', 'step': 3})
    folder.drop_metrics_after(3)
    assert folder.read_metrics()[-1] == {'kind': 'eval', 'step': 3}
    folder.drop_metrics_after(3, evaluation_too=True)
    assert folder.read_metrics()[-1] == {'kind': 'train', 'step': 3}
    folder.drop_metrics_after(-1)
    assert folder.read_metrics() == []


# Recipes, and the run that goes on by itself


def test_changed_recipe_is_kept_beside_the_old_one(tmp_path, accelerator):
    folder = RunFolder.create(config(tmp_path, name='mine'), accelerator)
    folder.keep_recipe(config(tmp_path, name='mine'), 5)
    assert names(folder.path) == ['recipe.yaml']
    other = config(tmp_path, name='mine', seed=3)
    folder.keep_recipe(other, 5)
    assert names(folder.path) == ['recipe-until-step-5.yaml', 'recipe.yaml']
    assert load_recipe(folder.path / 'recipe.yaml') == other
    assert load_recipe(folder.path / 'recipe-until-step-5.yaml').run.seed == 0


def test_auto_finds_the_newest_run_of_the_same_recipe(tmp_path, accelerator):
    assert find_run(config(tmp_path), accelerator) is None
    first, second = (RunFolder.create(config(tmp_path), accelerator).path for _ in range(2))
    RunFolder.create(config(tmp_path, seed=1), accelerator)
    os.utime(second / 'recipe.yaml', (1e9, 1e9))
    assert find_run(config(tmp_path), accelerator) == first
    os.utime(first / 'recipe.yaml', (9e8, 9e8))
    assert find_run(config(tmp_path), accelerator) == second
    (tmp_path / 'runs' / 'foreign').mkdir()
    (tmp_path / 'runs' / 'foreign' / 'recipe.yaml').write_text('optim: {rate: 1}')
    (tmp_path / 'runs' / 'hostile').mkdir()
    (tmp_path / 'runs' / 'hostile' / 'recipe.yaml').write_text('imports: [evil.py]')
    (tmp_path / 'runs' / 'hostile' / 'evil.py').write_text('raise SystemExit("was run")')
    # Where it is looked for, and how it is logged, does not make it another run.
    assert find_run(config(tmp_path, log_every=3), accelerator) == second
    assert find_run(config(tmp_path, name='mine'), accelerator) is None
    named = RunFolder.create(config(tmp_path, name='mine'), accelerator).path
    assert find_run(config(tmp_path, name='mine', seed=7), accelerator) == named


def test_folder_that_this_machine_does_not_see(tmp_path, accelerator):
    with pytest.raises(InputError, match=r'run\.output be on a file system that all machines share'):
        RunFolder(tmp_path / 'elsewhere', accelerator)


# Files


def test_text_is_atomic_files_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'file.txt'
    whole.write_text(path, 'old')

    def failing(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(whole.os, 'fsync', failing)
    with pytest.raises(OSError, match='No space'):
        whole.write_text(path, 'new')
    assert path.read_text() == 'old'
