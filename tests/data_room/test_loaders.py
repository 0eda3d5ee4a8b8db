import multiprocessing
import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.runs.job import StopSignals
from tests.data_room.files import some_images, write_idx_set


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_idx_set(tmp_path_factory.mktemp('idx'), 50, 20)


def config(root, **values) -> DataConfig:
    return DataConfig(**{'name': 'fashion-mnist', 'root': str(root), 'batch_size': 16, 'num_workers': 0, **values})


def test_evaluation_sees_every_image_once_in_order(root):
    loader = eval_loader(config(root), 'validation', at_most=None, seed=0)
    batches = list(loader)
    assert [len(label) for _, label in batches] == [16, 4]
    images, labels = some_images('test', 20)
    assert torch.cat([label for _, label in batches]).tolist() == labels.tolist()
    # At its own size an image is only normalised.
    expected = (torch.from_numpy(images).float()[:, None] / 255 - 0.286) / 0.353
    assert torch.allclose(torch.cat([image for image, _ in batches]), expected, atol=1e-5)


def test_evaluation_resizes_and_crops_the_centre(root):
    images, _ = next(iter(eval_loader(config(root, size=20, crop_pct=0.8), 'validation', at_most=None, seed=0)))
    assert images.shape == (16, 1, 20, 20)
    whole, _ = next(iter(eval_loader(config(root, size=20), 'validation', at_most=None, seed=0)))
    # A narrower crop shows less of the dark margin.
    assert images.mean() > whole.mean()


def test_bank_is_a_fixed_choice(root):
    def chosen(at_most, seed):
        loader = eval_loader(config(root), 'train', at_most, seed)
        pixels = [image for images, _ in loader for image in images]
        every = [image for images, _ in eval_loader(config(root), 'train', None, seed) for image in images]
        assert loader.total == len(pixels)
        return [next(i for i, other in enumerate(every) if other.equal(image)) for image in pixels]

    first = chosen(20, seed=0)
    assert len(set(first)) == len(first) == 20
    assert first == sorted(first)
    assert chosen(20, seed=0) == first
    assert chosen(20, seed=1) != first
    # Spread over the set rather than its first images, which may be of one class.
    assert first != list(range(20))
    assert chosen(50, seed=0) == chosen(None, seed=0) == list(range(50))
    labels = some_images('train', 50)[1]
    batches = list(eval_loader(config(root), 'train', 20, 0))
    assert torch.cat([label for _, label in batches]).tolist() == labels[first].tolist()


def test_workers_end_with_their_pass(root):
    before = set(multiprocessing.active_children())
    loader = eval_loader(config(root, num_workers=2), 'train', None, 0)
    for _ in range(2):
        assert sum(len(labels) for _, labels in loader) == 50
        assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize('prepared', [False, True])
def test_signal_in_the_start_of_workers(root, monkeypatch, prepared):
    """Each worker is known by the time it is answered, and ends; loaders of accelerate start them late."""
    loader, fork, started = eval_loader(config(root, num_workers=2), 'train', None, 0), os.fork, []
    loader = loader.prepared(Accelerator(cpu=True)) if prepared else loader
    before = set(multiprocessing.active_children())

    def fork_and_signal() -> int:
        if process := fork():
            started.append(process)
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    def evaluate() -> None:
        for _ in loader:
            time.sleep(60)
        pytest.fail('nothing has broken it off')

    monkeypatch.setattr(os, 'fork', fork_and_signal)
    with StopSignals() as signals:
        signals.wait(evaluate, 0)
    for worker in set(multiprocessing.active_children()) - before:
        worker.kill()
        worker.join()
    assert signals.received is signal.SIGTERM
    assert len(started) == 2
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
