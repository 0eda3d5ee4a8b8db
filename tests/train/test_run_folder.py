import json
import os
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from slimclr_hub.errors import InputError
from slimclr_hub.train import run_folder
from slimclr_hub.train.config import DataConfig, PretrainConfig, RunConfig
from slimclr_hub.train.parse import load_recipe
from slimclr_hub.train.run_folder import RunFolder, write_text


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def layer(accelerator):
    return accelerator.prepare(torch.nn.Linear(2, 1))


def config(tmp_path, **values) -> PretrainConfig:
    return replace(PretrainConfig(), run=RunConfig(output=str(tmp_path / 'runs'), **values))


def set_weight(layer, value: float) -> None:
    torch.nn.init.constant_(layer.weight, value)


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
        folder.write_metrics({'step': step})
    # A kill may cut the last line anywhere.
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "los')
    folder.drop_metrics_after(3)
    assert folder.read_metrics() == [{'step': step} for step in range(4)]
    folder.write_metrics({'step': 4})
    assert folder.read_metrics()[-1] == {'step': 4}


# Checkpoints


def test_checkpoint_round_trip(tmp_path, accelerator, layer):
    folder = RunFolder(tmp_path, accelerator)
    assert folder.load_checkpoint() == (0, 0)
    set_weight(layer, 3.0)
    torch.manual_seed(5)
    folder.save_checkpoint(epoch=2, step=20, keep=1)
    drawn = torch.rand(3)
    set_weight(layer, 0.0)
    assert folder.load_checkpoint() == (2, 20)
    assert (layer.weight == 3.0).all()
    # The generators go on where they were.
    assert torch.rand(3).equal(drawn)


def test_only_the_last_checkpoints_are_kept(tmp_path, accelerator, layer):
    folder = RunFolder(tmp_path, accelerator)
    for epoch in range(1, 5):
        set_weight(layer, epoch)
        folder.save_checkpoint(epoch, 10 * epoch, keep=2)
    assert names(tmp_path / 'checkpoints') == ['epoch-0003', 'epoch-0004']
    assert folder.load_checkpoint() == (4, 40)
    assert (layer.weight == 4).all()


def test_unfinished_checkpoint_is_passed_over(tmp_path, accelerator, layer):
    folder = RunFolder(tmp_path, accelerator)
    set_weight(layer, 1.0)
    folder.save_checkpoint(1, 10, keep=2)
    # What a kill leaves before the rename, and a folder without its last file.
    (tmp_path / 'checkpoints' / 'epoch-0002.partial').mkdir()
    (tmp_path / 'checkpoints' / 'epoch-0002.partial' / 'state.json').write_text('{"epoch": 2, "step": 20}')
    (tmp_path / 'checkpoints' / 'epoch-0003').mkdir()
    assert folder.load_checkpoint() == (1, 10)
    set_weight(layer, 2.0)
    folder.save_checkpoint(2, 20, keep=2)
    assert not (tmp_path / 'checkpoints' / 'epoch-0002.partial').exists()
    assert folder.load_checkpoint() == (2, 20)
    assert (layer.weight == 2.0).all()


def test_older_checkpoint_outlives_a_failed_one(tmp_path, accelerator, layer, monkeypatch):
    folder = RunFolder(tmp_path, accelerator)
    set_weight(layer, 1.0)
    folder.save_checkpoint(1, 10, keep=1)

    def full_disk(*_):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', full_disk)
        with pytest.raises(OSError, match='No space'):
            folder.save_checkpoint(2, 20, keep=1)
    set_weight(layer, 0.0)
    assert folder.load_checkpoint() == (1, 10)
    assert (layer.weight == 1.0).all()


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')

    def failing(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(run_folder.os, 'fsync', failing)
    with pytest.raises(OSError, match='No space'):
        write_text(path, 'new')
    assert path.read_text() == 'old'
