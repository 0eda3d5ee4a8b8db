"""Exactness of streams: every sample once an epoch over processes and workers, and again after an interruption."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.batches import Batch
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError
from tests.data_room.files import png_bytes, some_images, write_parquet, write_shards, write_tar
from tests.scripts import Script, end_well

pytestmark = pytest.mark.usefixtures('hub_cache')

LENGTHS = (13, 40, 7, 22, 18)  # a hundred
TOTAL = sum(LENGTHS)
VIEWS = ViewConfig(size=8)


@pytest.fixture(scope='module')
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp('streams')
    write_shards(root / 'wds', LENGTHS)
    write_parquet(root / 'hfids', LENGTHS)
    return {'wds': root / 'wds', 'hfids': root / 'hfids'}


def config(kind: str, folder: Path, **values) -> DataConfig:
    named = {'wds': {'name': 'wds/', 'root': str(folder)}, 'hfids': {'name': f'hfids/{folder}'}}[kind]
    return DataConfig(**{**named, 'batch_size': 8, 'num_workers': 2, 'shuffle_buffer': 5, 'val_split': None, **values})


def train_data(of: DataConfig, rank: int = 0, processes: int = 1, microbatches: int = 1, **values) -> TrainData:
    return TrainData(of, VIEWS, seed=3, rank=rank, processes=processes, microbatches=microbatches, **values)


def labels(batches: Iterator[Batch]) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


def seen(of: DataConfig, epoch: int = 0, processes: int = 2, microbatches: int = 1) -> list[list[list[int]]]:
    return [labels(train_data(of, rank, processes, microbatches).epoch(epoch)) for rank in range(processes)]


# Every sample once


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_every_sample_once(sources, kind, workers):
    of = config(kind, sources[kind], num_workers=workers)
    batches = seen(of)
    # 12 steps of 8 images, in fours on each process; what is left are the four that fill no batch.
    assert train_data(of).steps_per_epoch == TOTAL // 8 == 12
    assert [[len(batch) for batch in each] for each in batches] == [[4] * 12] * 2
    counts = Counter(flat(flat(batches)))
    assert set(counts.values()) == {1}
    assert len(counts) == 96
    assert set(counts) <= set(range(TOTAL))


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_nothing_is_left_where_batches_divide_the_data(sources, kind):
    of = config(kind, sources[kind], batch_size=20)
    assert sorted(flat(flat(seen(of, microbatches=5)))) == list(range(TOTAL))


@pytest.mark.parametrize(('processes', 'workers'), [(1, 3), (4, 2), (5, 4), (10, 1)])
def test_more_readers_than_shards(sources, processes, workers):
    of = config('wds', sources['wds'], batch_size=20, num_workers=workers)
    assert sorted(flat(flat(seen(of, processes=processes)))) == list(range(TOTAL))


def test_one_shard_for_many_workers(tmp_path):
    write_shards(tmp_path, (12,))
    of = config('wds', tmp_path, batch_size=4, num_workers=4)
    assert sorted(flat(flat(seen(of)))) == list(range(12))


def test_unequal_turns(tmp_path):
    """One batch more than workers: one of them has two, the other none to wait for."""
    write_shards(tmp_path, (12,))
    of = config('wds', tmp_path, batch_size=4)
    assert sorted(flat(labels(train_data(of).epoch(0)))) == list(range(12))


def test_two_real_processes(sources, tmp_path):
    """Each reads its share without knowing more of the other than its number."""
    script = (
        'import json, sys\n'
        'from slimclr_hub.data import DataConfig, ViewConfig\n'
        'from slimclr_hub.data.training import TrainData\n'
        "config = DataConfig(name='wds/', root=sys.argv[2], batch_size=20, num_workers=2, shuffle_buffer=5)\n"
        'data = TrainData(config, ViewConfig(size=8), seed=3, processes=2, rank=int(sys.argv[1]))\n'
        'print(json.dumps([batch.labels.tolist() for batch in data.epoch(1)]))\n'
    )
    running = [Script(script, rank, sources['wds'], folder=tmp_path) for rank in range(2)]
    shares = [json.loads(end_well(process)) for process in running]
    assert sorted(flat(flat(shares))) == list(range(TOTAL))
    assert shares == seen(config('wds', sources['wds'], batch_size=20), epoch=1)


# Order


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_order_follows_from_seed_and_epoch(sources, kind):
    of = config(kind, sources[kind])
    data = train_data(of)
    orders = [flat(labels(data.epoch(epoch))) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert orders[1] == flat(labels(train_data(of).epoch(1)))
    assert orders[0] != flat(labels(TrainData(of, VIEWS, seed=4).epoch(0)))


def test_shuffle_buffer_mixes_shards(sources):
    def order(buffer):
        return flat(labels(train_data(config('wds', sources['wds'], num_workers=0, shuffle_buffer=buffer)).epoch(0)))

    def neighbours(order):
        return sum(b == a + 1 for a, b in pairwise(order))

    # Without a buffer shards are read through, with a large one nothing is left of their order.
    assert neighbours(order(0)) > 90
    assert order(0) == order(1)
    assert neighbours(order(1000)) < 10
    assert 10 < neighbours(order(3)) < 90


def test_views_follow_from_the_sample_and_not_from_who_reads_it(sources):
    def views(workers, processes):
        of = config('wds', sources['wds'], num_workers=workers, batch_size=20)
        return {
            int(label): tuple(view[i] for view in batch.views)
            for rank in range(processes)
            for batch in train_data(of, rank, processes).epoch(1)
            for i, label in enumerate(batch.labels)
        }

    alone, shared = views(0, 1), views(2, 2)
    assert alone.keys() == shared.keys()
    for label, (first, second) in alone.items():
        assert first.equal(shared[label][0])
        assert second.equal(shared[label][1])
        assert not first.equal(second)


def test_the_global_generator_is_left_alone(sources):
    for workers in 0, 2:
        before = torch.get_rng_state()
        labels(train_data(config('wds', sources['wds'], num_workers=workers)).epoch(0))
        assert torch.get_rng_state().equal(before)


# Resume


def same(batch: Batch, other: Batch) -> bool:
    pairs = zip((*batch.views, batch.labels), (*other.views, other.labels), strict=True)
    return all(a.equal(b) for a, b in pairs) and batch.position == other.position


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('workers', [0, 3])
def test_resume_goes_on_with_the_same_batches(sources, kind, workers):
    of = config(kind, sources[kind], num_workers=workers)
    for rank in range(2):
        whole = list(train_data(of, rank, 2, microbatches=2).epoch(2))
        assert len(whole) == 24
        for step in 1, 2, 5, 10, 11, 12:
            # Through a file, as a checkpoint does.
            position = json.loads(json.dumps(whole[2 * step - 1].position))
            rest = list(train_data(of, rank, 2, microbatches=2).epoch(2, start=step, position=position))
            assert len(rest) == 24 - 2 * step
            assert all(map(same, rest, whole[2 * step :]))


def test_resume_within_the_same_process(sources):
    """Workers that are at work on an epoch can be sent elsewhere."""
    data = train_data(config('wds', sources['wds']))
    whole = list(data.epoch(0))
    begun = data.epoch(1)
    next(begun)
    begun.close()
    rest = list(data.epoch(0, start=3, position=whole[2].position))
    assert all(map(same, rest, whole[3:]))
    assert len(rest) == len(whole) - 3


def test_position_of_another_layout(sources):
    of = config('wds', sources['wds'])
    position = next(train_data(of).epoch(0)).position
    other = train_data(config('wds', sources['wds'], num_workers=3))
    with pytest.raises(InputError, match=r'with workers 2; it cannot go on there with 3'):
        next(other.epoch(0, start=1, position=position))
    with pytest.raises(InputError, match='without a position'):
        next(other.epoch(0, start=1))


# Unknown lengths


@pytest.fixture(scope='module')
def piped(sources) -> DataConfig:
    """Shards that come out of a pipe, whose samples cannot be counted before they are read."""
    return DataConfig(
        name='wds/',
        root=f'pipe:cat {sources["wds"]}',
        train_split='train-{0000..0004}.tar',
        num_samples=TOTAL,
        batch_size=8,
        num_workers=2,
        shuffle_buffer=5,
    )


@pytest.mark.parametrize('processes', [1, 2])
def test_shards_of_unknown_length(piped, processes):
    data = [train_data(piped, rank, processes) for rank in range(processes)]
    batches = [labels(each.epoch(0)) for each in data]
    counts = Counter(flat(flat(batches)))
    assert set(counts.values()) == {1}
    # The remainders of the workers are joined, so no process loses more than a part of one batch.
    assert all(len(each) >= TOTAL // 8 - 1 for each in batches)
    assert len(counts) > TOTAL - 8 - 4 * processes
    notes = ' '.join(data[0].notes)
    assert ('lengths of the 5 shards are unknown' in notes) == (processes == 2)


@pytest.mark.parametrize('step', [1, 4, 8, 10, 11])
def test_resume_with_shards_of_unknown_length(piped, step):
    whole = list(train_data(piped, 1, 2).epoch(0))
    rest = list(train_data(piped, 1, 2).epoch(0, start=step, position=whole[step - 1].position))
    assert len(rest) == len(whole) - step
    assert all(map(same, rest, whole[step:]))


def test_shorter_epoch_than_announced_is_said(piped, caplog):
    list(train_data(piped).epoch(0))
    assert not caplog.records
    list(train_data(replace(piped, num_samples=2 * TOTAL)).epoch(0))
    (record,) = caplog.records
    assert 'epoch 1 ended after 12 of 25 batches: the shards hold fewer images' in record.getMessage()


def test_unknown_length_needs_num_samples(piped):
    with pytest.raises(InputError, match=r'data\.num_samples'):
        train_data(replace(piped, num_samples=None))


# Shards


def test_info_file_tells_lengths_and_splits(tmp_path):
    write_shards(tmp_path, LENGTHS)
    names = [f'train-{i:04d}.tar' for i in range(5)]
    info = {
        'splits': {'half': {'name': 'half', 'num_samples': 60, 'filenames': names[:3], 'shard_lengths': LENGTHS[:3]}}
    }
    (tmp_path / '_info.json').write_text(json.dumps(info))
    of = config('wds', tmp_path, train_split='half', batch_size=10)
    assert sorted(flat(flat(seen(of)))) == list(range(60))


def test_info_file_that_is_wrong(tmp_path):
    write_shards(tmp_path, (10, 10))
    for told in (10, 9), (10, 11):
        names = ['train-0000.tar', 'train-0001.tar']
        info = {'splits': {'all': {'name': 'all', 'num_samples': 19, 'filenames': names, 'shard_lengths': told}}}
        (tmp_path / '_info.json').write_text(json.dumps(info))
        of = config('wds', tmp_path, train_split='all', batch_size=sum(told), num_workers=0)
        with pytest.raises(DataError, match=rf'train-0001\.tar holds 10 samples, not {told[1]}.*_info\.json'):
            labels(train_data(of).epoch(0))


@pytest.mark.parametrize('split', ['train-{0000..0004}.tar', 'train-{0000..0004}.tar|100', 'train'])
def test_ways_to_name_shards(sources, split):
    assert train_data(config('wds', sources['wds'], train_split=split)).steps_per_epoch == 12


def test_evaluation_takes_the_same_names(sources):
    """timm reads for evaluation; a part of the shards' names is not among what it takes."""
    for split in 'train', 'train-{0000..0004}.tar|100':
        of = config('wds', sources['wds'], num_workers=0)
        seen = [label for _, batch in eval_loader(of, split, None, seed=0) for label in batch.tolist()]
        assert sorted(seen) == list(range(TOTAL))
    with pytest.raises(InputError, match='nosuch'):
        eval_loader(config('wds', sources['wds']), 'nosuch', None, seed=0)


def test_fewer_samples_than_there_are(sources):
    for split, samples in ('train-{0000..0004}.tar|40', None), ('train', 40):
        of = config('wds', sources['wds'], train_split=split, num_samples=samples)
        first, second = (Counter(flat(flat(seen(of, epoch)))) for epoch in range(2))
        assert sum(first.values()) == 40
        assert set(first.values()) == {1}
        # Others in another epoch.
        assert first != second


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'train_split': 'nosuch'}, 'no shard that matches'),
        ({'train_split': 'train-{0000..0009}.tar'}, r'train-0005\.tar \(5 of 10'),
        ({'train_split': 'train-0000.tar|many'}, 'not a number'),
        ({'root': None}, r'data\.root'),
        ({'root': '/nosuch'}, 'does not exist'),
        ({'image_key': 'seg'}, r'has png, cls; data\.image_key is seg'),
        ({'label_key': 'class'}, r'no class in its json'),
        ({'batch_size': 102}, 'larger than the data set of 100 images'),
    ],
)
def test_wrong_shards(sources, values, message):
    with pytest.raises(InputError, match=message):
        train_data(config('wds', sources['wds'], **values))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'train_split': 'nosuch'}, 'nosuch'),
        ({'image_key': 'picture'}, r'no column picture, data\.image_key; there are image, label'),
        ({'label_key': 'class'}, r'no column class, data\.label_key'),
    ],
)
def test_wrong_hub_data_set(sources, values, message):
    with pytest.raises(InputError, match=message):
        train_data(config('hfids', sources['hfids'], **values))


def test_truncated_shard_is_refused_at_the_start(tmp_path):
    path = write_shards(tmp_path, (10,))[0]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r'train-0000\.tar.*fetch it again'):
        train_data(config('wds', tmp_path))


def test_labels_in_json_and_none(tmp_path):
    images, _ = some_images('train', 8)
    for name, suffix in ('labelled', 'json'), ('bare', 'txt'):
        members = []
        for i, each in enumerate(images):
            members += [(f'{i}.png', png_bytes(each)), (f'{i}.{suffix}', json.dumps({'kind': i}).encode())]
        write_tar(tmp_path / name / 'train.tar', members)
    of = config('wds', tmp_path / 'labelled', label_key='kind')
    assert sorted(flat(labels(train_data(of).epoch(0)))) == list(range(8))
    assert flat(labels(train_data(config('wds', tmp_path / 'bare')).epoch(0))) == [-1] * 8


@pytest.mark.parametrize('processes', [1, 2])
def test_hub_data_set_of_another_format(sources, processes):
    """The Hub's tar files, which `datasets` reads; it tells no lengths."""
    of = config('hfids', sources['wds'], image_key='png', label_key='cls', num_samples=TOTAL)
    counts: Counter[int] = Counter()
    for rank in range(processes):
        data = train_data(of, rank, processes)
        whole = list(data.epoch(0))
        counts.update(flat([batch.labels.tolist() for batch in whole]))
        assert bool(data.notes) == (processes == 2)
        assert len(whole) >= TOTAL // 8 - 1
        rest = list(data.epoch(0, start=9, position=whole[8].position))
        assert len(rest) == len(whole) - 9
        assert all(map(same, rest, whole[9:]))
    assert set(counts.values()) == {1}
