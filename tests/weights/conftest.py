"""A Hub on loopback and processes that load from it, shared by the tests of where weights come from."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import slimclr_hub  # noqa: F401
from tests.hub_server import HubServer
from tests.networks import randomise_batchnorm
from tests.weights.client import Answer, Client


@pytest.fixture(scope='session')
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server):
    """The server without what earlier tests asked of it; repositories stay, so that every test takes its own names."""
    server.requests.clear()
    server.faults.clear()
    return server


@pytest.fixture(scope='session')
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('home')


def client_of(environment: dict[str, str]) -> Iterator[Client]:
    client = Client(environment)
    yield client
    client.kill()


@pytest.fixture(scope='session')
def client(server, home):
    """Of an ordinary user."""
    yield from client_of(server.environment(home))


@pytest.fixture(scope='session')
def offline(server, home):
    """With the caches of `client`, and told to stay offline."""
    yield from client_of(server.environment(home, HF_HUB_OFFLINE='1'))


@pytest.fixture(scope='session')
def other(server, home):
    """With the caches of `client`, and able to use xet as a client is by default."""
    yield from client_of(server.environment(home, HF_HUB_DISABLE_XET='0', HF_XET_CACHE=str(home / 'xet')))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / 'cache'


def make(name, **kwargs):
    """A network each width of which differs from the others."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    randomise_batchnorm(model)
    return model


@pytest.fixture(scope='session')
def resnet50() -> nn.Module:
    """A backbone as published, 94 MB."""
    return make('slimclr_resnet50', num_classes=0)


@pytest.fixture(scope='session')
def resnet50_file(resnet50, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(resnet50.state_dict(), path)
    return path


def is_refused(answer: Answer, *words: str, loaded: bool = False) -> bool:
    """Assert that it is one readable error with all the words; `loaded` if it is about a file that was found."""
    assert answer.error == 'InputError', answer
    assert '\n' not in answer.message
    for word in words:
        assert word in answer.message, answer.message
    assert len(answer.sources) == loaded
    return True


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def trapped(path: Path, **kwargs) -> bytes:
    """A checkpoint that makes a file when it is unpickled."""
    file = io.BytesIO()
    torch.save({'state_dict': {'conv1.weight': Trap(path)}}, file, **kwargs)
    file.seek(0)
    torch.load(file, weights_only=False)
    path.unlink()  # the trap works
    return file.getvalue()
