"""Shards that are cut, flipped or announced wrongly: named and refused, never trained on in part."""

import json
import multiprocessing
import os
import random
import re
import tarfile
from pathlib import Path

import pytest

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import make_dataset
from slimclr_hub.data.streams.shards import open_shards
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError
from tests.data_room.files import png_bytes, some_images, write_parquet, write_shards, write_tar

LENGTH = 12


def config(root: Path | str, **values) -> DataConfig:
    return DataConfig(**{'name': 'wds/', 'root': str(root), 'batch_size': 4, 'num_workers': 0, **values})


def labels(of: DataConfig) -> list[int]:
    data = TrainData(of, ViewConfig(size=8), seed=0)
    return sorted(label for batch in data.epoch(0) for label in batch.labels.tolist())


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shards(tmp_path, (LENGTH,))[0]


def end_of_members(path: Path) -> int:
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset


@pytest.mark.parametrize('remote', [False, True])
def test_every_truncation_is_noticed(shard, remote):
    """Between members and in the padding of one, too, where `tarfile` sees an end."""
    whole, end = shard.read_bytes(), end_of_members(shard)
    root = f'pipe:cat {shard.parent}' if remote else str(shard.parent)
    values: dict = {'train_split': shard.name, 'num_samples': LENGTH} if remote else {}
    places = [*random.Random(0).sample(range(1, end), 20), *range(512, end, 2560), end, end + 511]
    for at in places if not remote else places[:3]:
        shard.write_bytes(whole[:at])
        with pytest.raises((InputError, DataError), match=r'train-0000\.tar.*fetch'):
            labels(config(root, **values))
    shard.write_bytes(whole[: end + 512])  # one block of zeros marks the end
    assert labels(config(root, **values)) == list(range(LENGTH))


def test_every_bit_of_a_header_is_noticed(shard):
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        offsets = [member.offset for member in tar][1:]
    rng = random.Random(1)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.choice(offsets) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        shard.write_bytes(flipped)
        with pytest.raises(InputError, match=r'train-0000\.tar.*fetch'):
            open_shards(config(shard.parent), 'train')


def test_member_of_40_gigabytes_without_its_bytes(shard):
    """A sparse one, whose zeros would be made up in memory."""
    header = tarfile.TarInfo('huge.png')
    header.type = tarfile.GNUTYPE_SPARSE
    header.size = 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b'00000000000\0', b'00000001000\0'  # 512 bytes at the beginning
    block[483:495] = b'\x80' + bytes(3) + (40 << 30).to_bytes(8, 'big')
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    shard.write_bytes(bytes(block) + bytes(512) + shard.read_bytes())
    with tarfile.open(shard) as tar:
        assert tar.getmembers()[0].size == 40 << 30
    with pytest.raises(InputError, match=r'train-0000\.tar: the member huge\.png is sparse, of 42949672960 b'):
        open_shards(config(shard.parent), 'train')


def test_member_that_is_there_twice(tmp_path):
    png = png_bytes(some_images('train', 1)[0][0])
    write_tar(tmp_path / 'train.tar', [('0.png', png), ('0.png', png)])
    with pytest.raises(InputError, match=r'train\.tar: the member 0\.png is there twice'):
        open_shards(config(tmp_path), 'train')


@pytest.mark.parametrize(
    'info',
    [
        '[]',
        'null',
        '{"splits": []}',
        '{"splits": {"train": null}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"]}}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": []}}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": ["12"]}}}',
        '{"splits": {"train": {"filenames": ["train-0000.tar"], "shard_lengths": [-1]}}}',
        '{"splits": {"train": {"filenames": [["train-0000.tar"]], "shard_lengths": [12]}}}',
        '{"splits": {"train": {"filenames": [5], "shard_lengths": [12]}}}',
        '[' * 100_000,
        '\udcff',
    ],
)
def test_malformed_info(shard, info):
    path = shard.parent / '_info.json'
    path.write_bytes(info.encode('utf-8', 'surrogateescape'))
    with pytest.raises(InputError, match=rf'{path} does not give splits with filenames and shard_lengths.*correct or'):
        open_shards(config(shard.parent), 'train')


def test_info_of_other_shards(shard):
    info = {'splits': {'train': {'filenames': ['gone.tar'], 'shard_lengths': [12]}}}
    (shard.parent / '_info.json').write_text(json.dumps(info))
    with pytest.raises(InputError, match=r'has no gone\.tar \(1 of 1'):
        open_shards(config(shard.parent), 'train')


def test_fewer_samples_than_announced(shard):
    of = {'train_split': 'train-0000.tar|13'}
    with pytest.raises(InputError, match=r'train-0000\.tar\|13 announces 13 images, and the shards hold 12; fetch'):
        labels(config(shard.parent, **of))
    with pytest.raises(InputError, match=r'data\.num_samples announces 20 images, and the shards hold 12'):
        labels(config(shard.parent, num_samples=20))
    info = {'splits': {'train': {'filenames': [shard.name], 'shard_lengths': [13]}}}
    (shard.parent / '_info.json').write_text(json.dumps(info))
    with pytest.raises(DataError, match=r'train-0000\.tar holds 12 samples, not 13 as announced'):
        list(eval_loader(config(shard.parent), 'train', None, 0))


@pytest.mark.parametrize('workers', [0, 2])
def test_damage_that_a_worker_meets_is_one_line(tmp_path, workers):
    paths = write_shards(tmp_path, (LENGTH, LENGTH))
    lengths = [LENGTH, LENGTH]
    info = {'splits': {'train': {'filenames': [path.name for path in paths], 'shard_lengths': lengths}}}
    (tmp_path / '_info.json').write_text(json.dumps(info))
    paths[1].write_bytes(paths[1].read_bytes()[: end_of_members(paths[1]) // 2])
    of = config(tmp_path, num_workers=workers)
    one_line = rf'\Acannot read {re.escape(str(paths[1]))}.*fetch the shard again.*\Z'
    # Once nothing has the error, its workers have ended.
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match=one_line):
        labels(of)
    assert not set(multiprocessing.active_children()) - before
    with pytest.raises(DataError, match=one_line):
        list(eval_loader(of, 'train', None, 0))
    assert not set(multiprocessing.active_children()) - before


def test_tar_of_a_folder(tmp_path):
    """The source that is read by index."""
    path = tmp_path / 'images.tar'
    pngs = map(png_bytes, some_images('train', 8)[0])
    write_tar(path, [(f'class{i % 2}/{i}.png', png) for i, png in enumerate(pngs)])
    of = DataConfig(name='folder', root=str(path))
    assert [label for _, label in (make_dataset(of, 'train')[i] for i in range(8))].count(1) == 4
    path.write_bytes(path.read_bytes()[: end_of_members(path)])
    with pytest.raises(InputError, match=r'images\.tar.*fetch it again'):
        make_dataset(of, 'train')


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_parquet_file_that_is_cut(tmp_path, monkeypatch, kind):
    import datasets

    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    root = write_parquet(tmp_path / 'data', (8,))
    (path,) = root.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        TrainData(DataConfig(name=f'{kind}/{root}', batch_size=4), ViewConfig(size=8), seed=0)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith(f'data.name {kind}/{root}, split train: ')


def test_compressed_shard_is_refused(tmp_path):
    """A kilobyte would unpack to any size."""
    path = tmp_path / 'train-0.tar'
    with tarfile.open(path, 'w:gz') as tar:
        for i in range(LENGTH):
            (tmp_path / 'zeros').write_bytes(bytes(100_000))
            tar.add(tmp_path / 'zeros', f'{i}.png')
    with pytest.raises(InputError, match=r'train-0\.tar: .*at byte 0, where a member'):
        labels(config(tmp_path))


def test_pipe_is_no_shard(shard):
    """It would be waited for."""
    os.mkfifo(shard.with_name('train-9.tar'))
    assert len(labels(config(shard.parent))) == LENGTH
    with pytest.raises(InputError, match=r'train-9\.tar is not a file'):
        make_dataset(DataConfig(name='folder', root=str(shard.with_name('train-9.tar'))), 'train')
