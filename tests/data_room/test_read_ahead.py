"""Workers that go on into the next epoch: the same batches, wherever one asks for them."""

import multiprocessing
import os
from functools import partial
from itertools import islice

import pytest
import torch
from PIL import Image

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.indexed import EpochBatches, IndexedFeed, IndexedImages
from slimclr_hub.data.sources import ArrayImages
from slimclr_hub.data.streams.stream import StreamedChunks
from slimclr_hub.data.training import TrainData
from tests.data_room.files import some_images, write_idx_set, write_shards
from tests.data_room.plain import plain_data
from tests.scripts import Script, end_well

VIEWS = ViewConfig(size=8)
STEPS = 5


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Forty-four images each, of which five steps take forty."""
    root = tmp_path_factory.mktemp('read_ahead')
    write_idx_set(root / 'indexed', 44, 4)
    write_shards(root / 'stream', (13, 31))
    return {kind: root / kind for kind in ('indexed', 'stream')}


def train_data(roots, kind, workers, make=TrainData) -> TrainData:
    name = {'indexed': 'fashion-mnist', 'stream': 'wds/'}[kind]
    of = DataConfig(name=name, root=str(roots[kind]), batch_size=8, num_workers=workers, shuffle_buffer=5)
    return make(of, VIEWS, seed=6)


@pytest.fixture(scope='module')
def plain(roots):
    """(kind, workers) -> epochs, each of them by a feed of its own."""
    made: dict[tuple[str, int], list[list]] = {}

    def epochs(kind, workers):
        # By index batches are the same with any number of workers; a stream is divided by them.
        key = (kind, workers if kind == 'stream' else 0)
        if key not in made:
            made[key] = [list(train_data(roots, *key, make=plain_data).epoch(epoch)) for epoch in range(4)]
        return made[key]

    return epochs


def assert_same(batches, expected) -> None:
    batches = list(batches)
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.labels.equal(other.labels)
        assert all(a.equal(b) for a, b in zip(batch.views, other.views, strict=True))
        assert batch.position == other.position


@pytest.fixture
def begun(monkeypatch) -> list[int]:
    """Epochs in which workers of a set by index begin, or into which those of a stream are sent."""
    epochs = []
    iterate, enter = EpochBatches.__iter__, StreamedChunks.enter

    def begin(self):
        epochs.append(self.epoch)  # with the first batch, as torch's loader asks for iterators that it does not use
        yield from iterate(self)

    def go(self, epoch, *arguments):
        epochs.append(epoch)
        enter(self, epoch, *arguments)

    monkeypatch.setattr(EpochBatches, '__iter__', begin)
    monkeypatch.setattr(StreamedChunks, 'enter', go)
    return epochs


# The same batches


@pytest.mark.parametrize('kind', ['indexed', 'stream'])
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_epochs_one_after_another_and_in_any_order(roots, plain, kind, workers):
    expected = plain(kind, workers)
    data = train_data(roots, kind, workers)
    for epoch in 0, 1, 2, 2, 0, 3:
        assert_same(data.epoch(epoch), expected[epoch])


@pytest.mark.parametrize('kind', ['indexed', 'stream'])
@pytest.mark.parametrize('workers', [0, 2])
def test_epoch_that_is_left_in_its_middle(roots, plain, kind, workers):
    expected = plain(kind, workers)
    data = train_data(roots, kind, workers)
    position = expected[0][1].position
    assert_same(islice(data.epoch(0), 2), expected[0][:2])
    assert_same(data.epoch(0, 2, position), expected[0][2:])  # where it was left
    assert_same(data.epoch(1), expected[1])
    assert_same(islice(data.epoch(2), 3), expected[2][:3])
    assert_same(data.epoch(3), expected[3])  # what would have been next but for the rest
    assert_same(islice(data.epoch(0), 1), expected[0][:1])
    assert_same(data.epoch(0, 2, position), expected[0][2:])
    assert_same(data.epoch(0, 2, position), expected[0][2:])  # although epoch 1 has begun
    assert_same(data.epoch(1, 1, expected[1][0].position), expected[1][1:])
    assert_same(data.epoch(2), expected[2])  # as a resumed run goes on


@pytest.mark.parametrize('workers', [0, 2])
def test_two_consumers_in_turns(roots, plain, workers):
    expected = plain('indexed', workers)
    data = train_data(roots, 'indexed', workers)
    pairs = list(zip(data.epoch(0), data.epoch(1), strict=True))
    assert_same([one for one, _ in pairs], expected[0])
    assert_same([other for _, other in pairs], expected[1])


# Going on


def test_workers_by_index_begin_once(roots, begun):
    data = train_data(roots, 'indexed', 2)
    for epoch in range(3):
        list(data.epoch(epoch))
    assert begun == [0]
    list(data.epoch(1))
    list(data.epoch(2))
    assert begun == [0, 1]
    list(data.epoch(3, start=1))
    assert begun == [0, 1, 3]


def test_workers_of_a_stream_begin_the_next_epoch_with_the_last_batch(roots, begun):
    data = train_data(roots, 'stream', 2)
    for batch, entered in zip(data.epoch(0), [[0]] * (STEPS - 1) + [[0, 1]], strict=True):
        assert len(batch.labels) == 8
        assert begun == entered
    list(data.epoch(1))
    assert begun == [0, 1, 2]
    list(data.epoch(0))
    assert begun == [0, 1, 2, 0, 1]


def test_without_workers_nothing_is_computed_ahead(roots, begun, monkeypatch):
    opened = []
    original = ArrayImages.__getitem__
    monkeypatch.setattr(ArrayImages, '__getitem__', lambda self, i: opened.append(i) or original(self, i))
    data = train_data(roots, 'indexed', 0)
    list(data.epoch(0))
    assert len(opened) == STEPS * 8
    list(data.epoch(1))
    assert len(opened) == 2 * STEPS * 8
    stream = train_data(roots, 'stream', 0)
    begun.clear()
    list(stream.epoch(0))
    assert begun == [0]


def test_workers_get_no_further_than_they_prefetch(roots, monkeypatch):
    handed = []
    original = EpochBatches.__iter__

    def count(self):
        for keys in original(self):
            handed.append(keys[0][0])
            yield keys

    monkeypatch.setattr(EpochBatches, '__iter__', count)
    list(train_data(roots, 'indexed', 2).epoch(0))
    assert handed == [0] * STEPS + [1] * (2 * 2)  # torch's loader has two batches under way for each worker


# Failures


def fails_on(bright: int, image: Image.Image) -> tuple[torch.Tensor, ...]:
    value = image.getpixel((0, 0))
    if value == bright:
        raise ZeroDivisionError('as if by a transform')
    return (torch.tensor([[[value]]], dtype=torch.uint8),)


@pytest.mark.parametrize('workers', [0, 2])
def test_after_a_failure_batches_are_the_right_ones(workers):
    images, labels = some_images('train', 20)
    images[:, 0, 0] = range(20)  # what tells them apart
    batches = EpochBatches(20, 0, 4, 1, 0, count=5)
    order = [[index for _, index in keys] for keys in islice(batches, 10)]
    before = set(multiprocessing.active_children())
    dataset = IndexedImages(ArrayImages(images, labels, 'L'), partial(fails_on, order[1][2]), 0, 0)
    feed = IndexedFeed(dataset, batches, {'num_workers': workers, 'persistent_workers': workers > 0})
    for _ in range(2):
        epoch = feed.chunks(0, 0, None)
        assert next(epoch)[0]['views'][0].flatten().tolist() == order[0]
        with pytest.raises(ZeroDivisionError, match='as if by a transform'):
            next(epoch)
        with pytest.raises(ZeroDivisionError, match='as if by a transform'):
            next(feed.chunks(0, 1, None))
    assert [chunk['views'][0].flatten().tolist() for chunk, _ in feed.chunks(0, 2, None)] == order[2:5]
    assert next(feed.chunks(1, 0, None))[0]['views'][0].flatten().tolist() == order[5]
    del feed, epoch
    assert not set(multiprocessing.active_children()) - before  # no error has kept them


@pytest.mark.parametrize('kind', ['indexed', 'stream'])
def test_workers_end_with_their_process(roots, tmp_path, kind):
    script = (
        'import sys\n'
        'from slimclr_hub.data import DataConfig, ViewConfig\n'
        'from slimclr_hub.data.training import TrainData\n'
        'config = DataConfig(name=sys.argv[1], root=sys.argv[2], batch_size=8)\n'
        'data = TrainData(config, ViewConfig(size=8), seed=0)\n'
        'list(data.epoch(0))\n'
        'print(*[worker.pid for worker in data.feed.loader._iterator._workers])\n'
    )
    name = {'indexed': 'fashion-mnist', 'stream': 'wds/'}[kind]
    pids = [int(pid) for pid in end_well(Script(script, name, roots[kind], folder=tmp_path)).split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
