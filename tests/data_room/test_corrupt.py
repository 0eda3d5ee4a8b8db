"""Images that cannot be read: replaced the same way each time, named once, and at some point too many."""

import io
import logging
import re
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.batches import CorruptImages
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError
from tests.data_room.files import png_bytes, some_images, write_classes, write_parquet, write_shards, write_tar

pytestmark = pytest.mark.usefixtures('hub_cache')

VIEWS = ViewConfig(size=8)


def jpeg_bytes() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(file, 'jpeg')
    return file.getvalue()


DAMAGED = {'truncated JPEG': jpeg_bytes()[:900], 'empty': b'', 'text': b'this is no image', 'half a PNG': b''}
DAMAGED['half a PNG'] = png_bytes(some_images('train', 1)[0][0])[:60]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Forty images of ten classes, four of which cannot be read."""
    root = tmp_path_factory.mktemp('folder')
    write_classes(root, *some_images('train', 36))
    paths = []
    for i, (kind, data) in enumerate(DAMAGED.items()):
        paths.append(root / f'class{i}' / f'damaged {kind}.{"jpg" if "JPEG" in kind else "png"}')
        paths[-1].write_bytes(data)
    return root, sorted(map(str, paths))


@pytest.fixture(scope='module')
def streams(tmp_path_factory):
    """Forty samples, labelled by their numbers, of which those in `DAMAGED`'s places cannot be read."""
    root = tmp_path_factory.mktemp('streams')
    damaged = dict(zip((3, 17, 18, 39), DAMAGED.values(), strict=True))
    write_shards(root / 'wds', (15, 25), damaged)
    write_parquet(root / 'hfids', (15, 25), damaged)
    return root, set(damaged)


def by_index(folder, workers=0, **values) -> TrainData:
    of = DataConfig(name='folder', root=str(folder), batch_size=8, num_workers=workers, **values)
    return TrainData(of, VIEWS, seed=1)


def stream(root, kind, workers=0, **values) -> TrainData:
    named = {'wds': {'name': 'wds/', 'root': str(root / 'wds')}, 'hfids': {'name': f'hfids/{root / "hfids"}'}}[kind]
    of = DataConfig(**{**named, 'batch_size': 6, 'num_workers': workers, 'shuffle_buffer': 5, **values})
    return TrainData(of, VIEWS, seed=1)


# By index


@pytest.mark.parametrize('workers', [0, 2])
def test_images_by_index_are_replaced_and_named(folder, workers):
    root, damaged = folder
    data = by_index(root, workers)
    for epoch in range(2):
        batches = list(data.epoch(epoch))
        assert [len(batch.labels) for batch in batches] == [8] * 5
        # Each came up where it stood in the order; a replacement may be damaged, too, and is named then.
        assert sorted({name for batch in batches for name in batch.corrupt}) == damaged


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_replacement_after_a_resume(folder, workers):
    root, _ = folder
    whole = list(by_index(root).epoch(0))
    rest = list(by_index(root, workers).epoch(0, start=2))
    assert any(batch.corrupt for batch in rest)
    for batch, expected in zip(rest, whole[2:], strict=True):
        assert batch.views[0].equal(expected.views[0])
        assert batch.views[1].equal(expected.views[1])
        assert batch.labels.equal(expected.labels)
        assert batch.corrupt == expected.corrupt


def test_replacements_are_not_always_the_same_image(folder):
    root, damaged = folder
    data = by_index(root)
    images = data.feed.loader.dataset
    index = next(i for i in range(40) if images.dataset.name(i) == damaged[0])
    chosen = {images[epoch, index][0].label for epoch in range(20)}
    assert len(chosen) > 3


@pytest.mark.parametrize('workers', [0, 2])
def test_each_is_logged_once(folder, workers, caplog):
    root, damaged = folder
    data = by_index(root, workers)
    with caplog.at_level(logging.WARNING, 'slimclr_hub'):
        for epoch in range(3):
            list(data.epoch(epoch))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith('slimclr_hub')]
    assert len(messages) == 4
    for path in damaged:
        assert sum(path in message for message in messages) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_by_index(folder, workers):
    root, damaged = folder
    assert list(by_index(root, workers, max_corrupt=4).epoch(0))
    every = ''.join(f'(?=.*{re.escape(path)})' for path in damaged)
    with pytest.raises(DataError, match=rf'{every}4 images cannot be read.*damaged.*data\.max_corrupt 3'):
        list(by_index(root, workers, max_corrupt=3).epoch(0))
    # Over epochs, and for the first one already where none is allowed.
    with pytest.raises(DataError, match=r'(1 image|2 images) cannot be read'):
        list(by_index(root, workers, max_corrupt=0).epoch(0))


@pytest.mark.parametrize(('most', 'message'), [(5, r'images cannot be read.*data\.max_corrupt 5'), (100, 'no image')])
def test_nothing_but_damaged_images(tmp_path, most, message):
    # The first can be read when the run begins, since something must be there for a run to begin at all.
    root = write_classes(tmp_path, *some_images('train', 12))
    data = by_index(root, max_corrupt=most)
    for path in root.rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(DataError, match=message):
        list(data.epoch(0))


def test_image_that_is_gone(tmp_path):
    root = write_classes(tmp_path, *some_images('train', 16))
    data = by_index(root)
    gone = min(root.rglob('*.png'))
    gone.unlink()
    batches = list(data.epoch(0))
    assert [name for batch in batches for name in batch.corrupt] == [str(gone)]


# Streams


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('workers', [0, 2])
def test_samples_of_a_stream_are_passed_over_and_named(streams, kind, workers):
    root, damaged = streams
    batches = list(stream(root, kind, workers).epoch(0))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    # 36 of the 40 can be read. The stream is of 6 x 6, of which up to four are damaged: what is left of both workers is
    # joined, so that less than one batch is lost.
    assert all(len(batch.labels) == 6 for batch in batches)
    assert len(batches) == 5
    assert len(set(labels)) == len(labels)
    assert not set(labels) & damaged
    names = [name for batch in batches for name in batch.corrupt]
    assert len(names) == len(set(names)) <= 4
    for name in names:
        place = 'row' if kind == 'hfids' else '.tar/'
        assert place in name


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('workers', [0, 2])
def test_resume_of_a_stream_with_damaged_samples(streams, kind, workers):
    root, _ = streams
    whole = list(stream(root, kind, workers).epoch(0))
    for step in range(1, 6):
        rest = list(stream(root, kind, workers).epoch(0, start=step, position=whole[step - 1].position))
        assert [batch.labels.tolist() for batch in rest] == [batch.labels.tolist() for batch in whole[step:]]
        for batch, expected in zip(rest, whole[step:], strict=True):
            assert batch.views[1].equal(expected.views[1])


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_of_a_stream(streams, kind, workers):
    root, _ = streams
    data = stream(root, kind, workers, max_corrupt=1)
    with pytest.raises(DataError, match=r'images cannot be read.*data\.max_corrupt 1'):
        list(chain(data.epoch(0), data.epoch(1)))


@pytest.mark.parametrize('workers', [0, 2])
def test_all_are_told_of_in_the_end(tmp_path, workers, caplog):
    """Those after the last whole batch, too."""
    write_shards(tmp_path / 'wds', (14,), dict.fromkeys(range(2, 14), b''))
    data = stream(tmp_path, 'wds', workers, batch_size=4)
    with caplog.at_level(logging.WARNING, 'slimclr_hub'):
        assert list(data.epoch(0)) == []
    assert len(data.corrupt.reasons) == len(caplog.records) > 9


def test_sample_without_its_image(tmp_path):
    images, _ = some_images('train', 8)
    members = [(f'{i}.{"txt" if i == 5 else "png"}', png_bytes(image)) for i, image in enumerate(images)]
    write_tar(tmp_path / 'wds' / 'train.tar', members)
    data = stream(tmp_path, 'wds', batch_size=7, shuffle_buffer=0)
    list(data.epoch(0))
    assert [name.endswith('train.tar/5') for name in data.corrupt.reasons] == [True]
    assert 'no member jpg or jpeg or png or ' in next(iter(data.corrupt.reasons.values()))


# Counting


def test_distinct_images_are_counted():
    corrupt = CorruptImages(2)
    for _ in range(3):
        corrupt.add([('a', 'empty'), ('b', 'text')])
    with pytest.raises(DataError, match=r'3 images cannot be read: a \(empty\); b \(text\); c \(cut\); restore'):
        corrupt.add([('c', 'cut')])
    with pytest.raises(DataError, match='and 4 more'):
        corrupt.add([(str(i), 'cut') for i in range(6)])


@pytest.mark.parametrize('name', ['max_corrupt', 'shuffle_buffer'])
def test_wrong_value(name):
    assert getattr(DataConfig(**{name: 0}), name) == 0
    with pytest.raises(InputError, match=rf'data\.{name} is -1; give 0 or more'):
        DataConfig(**{name: -1})
