"""What several modules share because making it takes long: a Hub, its clients, and the authors' files converted."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from slimclr_hub.hub.folder import convert_file
from slimclr_hub.weights.published import PUBLISHED
from tests.hub.files import Client, checkpoint, save_small
from tests.hub_server import HubServer

# Files that run for minutes; begun first, so that no core waits for another one's at the end.
_LONG = (
    'train/test_survival.py',
    'train/test_pretrain.py',
    'detection/test_mim.py',
    'finetune/test_finetune.py',
    'hub/test_push.py',
    'test_timm_suite.py',
)
_KINDS = {'mocov2_200e_in1k': 'mocov2', 'mocov3_300e_in1k': 'mocov3', 'mocov2_200e_lincls_in1k': 'probe'}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONG))


def pytest_collection_finish() -> None:
    """Take what is imported, millions of objects, out of collections of garbage, each of which looks through it."""
    gc.freeze()


@pytest.fixture
def nothing_allowed() -> Iterator[None]:
    """`torch.load` allows no class, whatever other tests of this process have it allow; that comes back afterwards."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ACCELERATE_USE_CPU', 'true')
        AcceleratorState._reset_state(True)
        yield
        AcceleratorState._reset_state(True)


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Accelerate on the CPU, as if it had not been asked before."""
    with _on_the_cpu():
        yield


@pytest.fixture(scope='module')
def module_on_the_cpu() -> Iterator[None]:
    """The same for all tests of a module together, and for what they share."""
    with _on_the_cpu():
        yield


@pytest.fixture
def accelerator(on_the_cpu) -> Accelerator:
    return Accelerator()


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch) -> None:
    """What `datasets` converts on the way goes to a folder of the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='session')
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope='session')
def publisher(hub, tmp_path_factory) -> Iterator[Client]:
    """Whoever pushes; tests give it a token, or none."""
    home = tmp_path_factory.mktemp('publisher')
    with Client(hub.environment(home), home / 'work') as client:
        yield client


@pytest.fixture(scope='session')
def reader(hub, tmp_path_factory) -> Iterator[Client]:
    """Whoever downloads, with caches that were empty at first."""
    home = tmp_path_factory.mktemp('reader')
    with Client(hub.environment(home), home / 'work') as client:
        yield client
    shutil.rmtree(home)  # a gigabyte of networks


@pytest.fixture(scope='session')
def small(tmp_path_factory) -> Path:
    """Folder of a ResNet-20 with ten classes."""
    folder = tmp_path_factory.mktemp('small') / 'network'
    save_small(folder)
    return folder


@pytest.fixture(scope='session')
def published(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Tag -> folder of what `convert` made of a file like the authors', with weights by the formula."""
    home = tmp_path_factory.mktemp('published')
    folders = {}
    for tag, kind in _KINDS.items():
        file = home / PUBLISHED[tag].file
        torch.save(checkpoint(kind), file)
        folders[tag] = home / tag
        convert_file(file, folders[tag])
        file.unlink()
    yield folders
    shutil.rmtree(home)
