"""The training images of one process, by index."""

import json
import multiprocessing
import os
import resource

import numpy as np
import pytest
import torch

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.seeding import drawing
from slimclr_hub.data.sources import make_dataset, open_by_timm
from slimclr_hub.data.streams.stream import Layout, OneWayFeed, StreamedChunks, StreamFeed, TimmOrder
from slimclr_hub.data.training import TrainData
from slimclr_hub.data.views import Views
from slimclr_hub.errors import DataError, InputError
from tests.data_room.files import some_images, write_classes, write_idx_set, write_pngs, write_shards
from tests.data_room.plain import normalised_view

VIEWS = ViewConfig(size=12)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_idx_set(tmp_path_factory.mktemp('idx'), 50, 20)


def config(root, **values) -> DataConfig:
    return DataConfig(**{'name': 'fashion-mnist', 'root': str(root), 'batch_size': 16, 'num_workers': 0, **values})


def train_data(root, *, workers=0, batch_size=16, seed=5, views=VIEWS, second_views=None, **values) -> TrainData:
    of = config(root, num_workers=workers, batch_size=batch_size)
    return TrainData(of, views, second_views, seed=seed, **values)


def order(epoch: int, seed: int = 5) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(50).tolist()


# Which images


@pytest.mark.parametrize(('processes', 'microbatches'), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_contiguous_parts_of_the_order(root, processes, microbatches):
    images = some_images('train', 50)[1][order(3)]
    micro, size = 16 // microbatches, 16 // microbatches // processes
    for rank in range(processes):
        data = train_data(root, processes=processes, rank=rank, microbatches=microbatches)
        assert data.steps_per_epoch == 3
        batches = list(data.epoch(3))
        assert len(batches) == 3 * microbatches
        for k, batch in enumerate(batches):
            first = k * micro + rank * size
            assert batch.labels.tolist() == images[first : first + size].tolist()
            assert [tuple(view.shape) for view in batch.views] == [(size, 1, 12, 12)] * 2
            assert batch.position is None
            assert batch.corrupt == ()


@pytest.mark.parametrize('workers', [0, 2])
def test_views_are_those_of_the_image_in_its_epoch(root, workers):
    view, images = normalised_view(VIEWS, 12, (0.286,), (0.353,)), make_dataset(config(root), 'train')
    batch = next(train_data(root, workers=workers).epoch(2))
    for i, index in enumerate(order(2)[:16]):
        image, label = images[index]
        with drawing(5, 2, index):
            assert batch.views[0][i].equal(view(image))
            assert batch.views[1][i].equal(view(image))
        assert batch.labels[i] == label


def test_the_same_images_and_views_however_they_are_divided(root):
    def epoch(processes, microbatches, workers):
        shares = [
            list(train_data(root, processes=processes, rank=rank, microbatches=microbatches, workers=workers).epoch(1))
            for rank in range(processes)
        ]
        return torch.cat([share[k].views[0] for k in range(3 * microbatches) for share in shares])

    whole = epoch(1, 1, 0)
    assert len(whole) == 48
    for divided in (2, 1, 0), (1, 4, 2), (2, 2, 1):
        assert epoch(*divided).equal(whole)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_can_be_entered_at_any_step(root, workers):
    data = train_data(root, microbatches=2, workers=workers)
    whole = list(data.epoch(1))
    other = list(data.epoch(2))
    for start in range(4):
        rest = list(data.epoch(1, start))
        assert len(rest) == 2 * (3 - start)
        for batch, expected in zip(rest, whole[2 * start :], strict=True):
            assert batch.labels.equal(expected.labels)
            assert all(a.equal(b) for a, b in zip(batch.views, expected.views, strict=True))
    assert not torch.cat([batch.labels for batch in whole]).equal(torch.cat([batch.labels for batch in other]))


def test_starting_late_loads_nothing_of_what_is_skipped(root, monkeypatch):
    data = train_data(root)
    opened = []
    dataset = data.feed.loader.dataset.dataset
    original = type(dataset).__getitem__
    monkeypatch.setattr(type(dataset), '__getitem__', lambda self, i: opened.append(i) or original(self, i))
    list(data.epoch(0, start=2))
    assert opened == order(0)[32:48]


def test_workers_stay_alive_between_epochs(root):
    data = train_data(root, workers=2)

    def pids():
        list(data.epoch(0))
        return [worker.pid for worker in data.feed.loader._iterator._workers]

    assert pids() == pids()


@pytest.mark.parametrize('workers', [0, 2])
def test_the_global_generator_is_left_alone(root, workers):
    before = torch.get_rng_state()
    list(train_data(root, workers=workers).epoch(0))
    assert torch.get_rng_state().equal(before)


# Views


def test_one_view(root):
    two, one = (next(train_data(root, view_count=count).epoch(0)) for count in (2, 1))
    assert len(two.views) == 2
    assert len(one.views) == 1
    assert one.views[0].equal(two.views[0])


def test_second_view_of_its_own_distribution(root):
    plain = {'crop_min': 1.0, 'jitter_prob': 0.0, 'blur_prob': 0.0, 'flip_prob': 0.0}
    inverted = ViewConfig(size=28, solarize_prob=1.0, **plain)
    batch = next(train_data(root, views=ViewConfig(size=14), second_views=inverted).epoch(0))
    assert batch.views[0].shape == (16, 1, 14, 14)
    values = (batch.views[1] * 0.353 + 0.286) * 255
    assert values.shape == (16, 1, 28, 28)
    # What was bright is inverted, so nothing is brighter than half.
    assert values.max() < 127.5
    # The corners of garments are dark and stay so.
    assert values[:, 0, 0, 0].abs().max() < 1e-3


# Wrong arguments


@pytest.mark.parametrize(
    ('batch_size', 'processes', 'microbatches', 'message'),
    [
        (16, 3, 1, 'data.batch_size 16 does not divide over 3 processes x 1 microbatches; the nearest that fits is 15'),
        (16, 2, 3, 'data.batch_size 16 does not divide over 2 processes x 3 microbatches; the nearest that fits is 18'),
        (4, 4, 1, 'data.batch_size 4 leaves fewer than 2 images to each of 4 processes x 1 microbatches; the nearest'),
        (4, 8, 1, 'data.batch_size 4 does not divide over 8 processes x 1 microbatches; the nearest that fits is 16'),
        (52, 1, 1, 'data.batch_size 52 is larger than the data set of 50 images'),
        (16, 1, 0, 'there are 1 processes and 0 microbatches; give 1 or more of both'),
    ],
)
def test_batch_that_does_not_fit(root, batch_size, processes, microbatches, message):
    with pytest.raises(InputError) as error:
        train_data(root, batch_size=batch_size, processes=processes, microbatches=microbatches)
    assert str(error.value).startswith(message)


def test_largest_batch(root):
    assert train_data(root, batch_size=50).steps_per_epoch == 1
    assert train_data(root, batch_size=48, processes=4, microbatches=6).steps_per_epoch == 1


def test_other_numbers_of_views(root):
    with pytest.raises(InputError, match='view_count is 3'):
        train_data(root, view_count=3)


# Labels


def test_fewer_classes_than_the_images_have(root, tmp_path):
    with pytest.raises(InputError, match=r'10 classes, and method\.num_classes is 9; give --method\.num_classes 10'):
        train_data(root, num_classes=9)
    folder = write_classes(tmp_path / 'train', *some_images('train', 20)).parent
    of = DataConfig(name='folder', root=str(folder), batch_size=4, num_workers=0)
    with pytest.raises(InputError, match=r'classes, and probe\.num_classes is 2'):
        TrainData(of, VIEWS, seed=0, num_classes=2, classes_key='probe.num_classes')
    write_pngs(tmp_path / 'plain', some_images('train', 8)[0])
    of = DataConfig(name='folder', root=str(tmp_path / 'plain'), batch_size=4, num_workers=0)
    with pytest.raises(InputError, match='images have no labels; let each class have a folder'):
        TrainData(of, VIEWS, seed=0, num_classes=2)


def test_class_that_comes_to_light_in_a_stream(tmp_path):
    write_shards(tmp_path, (20,))  # whose labels number the images
    of = DataConfig(name='wds/', root=str(tmp_path), batch_size=4, num_workers=0, shuffle_buffer=1)
    batches = TrainData(of, VIEWS, seed=0, num_classes=6).epoch(0)
    next(batches)
    with pytest.raises(DataError, match=r'an image has class 7, and there are 6; give --method\.num_classes 8 or more'):
        next(batches)


# Workers


def test_worker_that_cannot_hand_over_a_batch_ends(root):
    """A limit on the size of its files stands for shared memory that is full."""
    before = set(multiprocessing.active_children())
    batches = train_data(root, workers=1).epoch(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100, 100))
    with pytest.raises(RuntimeError, match=rf'DataLoader worker .*{worker.pid}'):
        for _ in batches:
            pass
    assert worker.exitcode == os.EX_IOERR


# Streams that cannot be entered in the middle


@pytest.mark.parametrize('workers', [0, 2])
def test_stream_that_cannot_be_entered_in_its_middle(tmp_path, workers):
    """timm's streams, of which only `tfds/` is left to timm; here its reader of shards stands for it."""
    write_shards(tmp_path, (20, 20))
    of = DataConfig(name='wds/', root=str(tmp_path), train_split='train-{0000..0001}.tar|40', batch_size=4)
    dataset = open_by_timm(of, of.train_split, 'here')
    dataset.set_loader_cfg(num_workers=workers)
    layout = Layout(processes=1, workers=max(1, workers), images=4, batches=10)
    view = normalised_view(VIEWS, 12, of.mean, of.std)
    chunks = StreamedChunks(TimmOrder(dataset, 0), Views(view, view), layout, 0, 'L', 0)
    feed = OneWayFeed(StreamFeed(chunks, {'num_workers': workers}, (), {}), 'tfds/some')
    assert 'tfds/some cannot be entered within an epoch' in feed.notes[0]
    for start in 0, 3:
        batches = list(feed.chunks(0, start, None))
        assert len(batches) >= 10
        assert all(chunk['views'][0].shape == (4, 1, 12, 12) and position is None for chunk, position in batches)


def test_position_is_json(tmp_path):
    write_shards(tmp_path, (20,))
    data = TrainData(DataConfig(name='wds/', root=str(tmp_path), batch_size=4), VIEWS, seed=0)
    for batch in data.epoch(0):
        assert json.loads(json.dumps(batch.position)) == batch.position
    assert data.notes == ()
