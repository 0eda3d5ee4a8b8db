"""The authors' release by the real client: downloads that break off, files that are not what they should be."""

import hashlib
import io
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimclr_hub.weights.published import PUBLISHED
from tests.hub_server import sha256
from tests.reference import reference_name
from tests.weights.client import Client, digest
from tests.weights.conftest import is_refused, make, trapped

TAG = 'mocov2_200e_in1k'
NETWORK = PUBLISHED[TAG]
WRITTEN = 10 << 20  # what the client writes at once, and goes on from
ACCEPTED = {'SLIMCLR_ACCEPT_RELEASE': '1'}  # of another hash than in the name
NUMBERS = itertools.count()


def checkpoint(tensors):
    """As the authors save a network that was pre-trained."""
    encoder = {f'module.encoder_q.{name}': tensor for name, tensor in tensors.items()}
    file = io.BytesIO()
    torch.save({'epoch': 200, 'arch': 'resnet50', 'state_dict': encoder | {'module.queue': torch.zeros(128, 8)}}, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def network():
    """A small one, of 17 MB: more than the client writes at once. Converting keeps its names as they are."""
    return make('slimclr_resnet20x4', num_classes=0)


@pytest.fixture(scope='module')
def data(network):
    return checkpoint(network.state_dict())


@dataclass
class Release:
    file: str
    folder: str
    env: dict[str, str]

    @property
    def faulty(self) -> str:
        return f'/files/{self.folder}/*'


@pytest.fixture
def publish(hub):
    """A release of the test's own."""

    def publish(data, file=None):
        file = file or f'slimclr-mocov2-ep200-{sha256(data)[:8]}.pth.tar'
        folder = f'release-{next(NUMBERS)}'
        url = hub.add_file(f'{folder}/{file}', data)
        accepted = ACCEPTED if file == NETWORK.file else {}
        return Release(file, folder, {'SLIMCLR_RELEASE_URL': url.rpartition('/')[0], **accepted})

    return publish


def is_whole(answer, network):
    assert answer.error is None, answer.message
    assert digest(load_file(answer.value)) == digest(network.state_dict())
    assert [path.name for path in Path(answer.value).parent.iterdir() if path.name != '.lock'] == ['model.safetensors']
    return True


def left(cache):
    """Names of the files that are more than locks."""
    return [path.name for path in cache.rglob('*') if path.is_file() and path.name != '.lock']


def asked(hub, release):
    """Requests to the release: method, range and status."""
    return [
        (request.method, request.range, request.status)
        for request in hub.requests
        if request.path.startswith(f'/files/{release.folder}/')
    ]


def test_where_the_hub_has_none(hub, publish, client, other, offline, resnet50, home):
    """Two processes at once make one download, and none is needed after it."""
    release = publish(checkpoint({reference_name(name): t for name, t in resnet50.state_dict().items()}), NETWORK.file)
    hub.delay(release.faulty, seconds=1, method='GET')
    both = (client, other)
    for process in both:
        process.send('create', NETWORK.name, env={**release.env, 'HF_TOKEN': hub.token})
    answers = [process.receive() for process in both]
    for answer in answers:
        assert answer.value == digest(resnet50.state_dict()), answer.message
        assert len(answer.sources) == 1
        assert "from the authors' release" in answer.sources[0]
        assert f'the Hub has no slimclr-hub/{NETWORK.name}' in answer.sources[0]
    warned, silent = sorted((answer.told('WARNING') for answer in answers), reverse=True)
    assert release.env['SLIMCLR_RELEASE_URL'] in ' '.join(warned)
    assert silent == []
    assert asked(hub, release) == [('HEAD', None, 200), ('GET', None, 200)]
    tokens = {(request.path.split('/')[1], request.token) for request in hub.requests}
    assert tokens == {('slimclr-hub', f'Bearer {hub.token}'), ('files', None)}
    folder = home / 'huggingface' / 'assets' / 'slimclr_hub' / 'release-1.0.0' / TAG
    assert left(folder) == ['model.safetensors']

    hub.requests.clear()
    answer = client('create', f'slimclr_resnet50_050.{TAG}', env=release.env)
    assert answer.value == digest(resnet50.extract(0.5).state_dict())
    assert len(answer.sources) == 1
    assert asked(hub, release) == []
    hub.requests.clear()
    answer = offline('create', f'slimclr_resnet50_025.{TAG}')
    assert answer.value == digest(resnet50.extract(0.25).state_dict())
    assert len(answer.sources) == 1
    assert hub.requests == []


def test_where_the_hub_is_away(hub, publish, client, cache, network, data):
    hub.fail(f'/slimclr-hub/{NETWORK.name}/*', status=403, times=None)
    release = publish(data, NETWORK.file)
    assert is_whole(client('published', TAG, cache, env=release.env), network)


def test_neither_has_it(hub, client, cache):
    env = {'SLIMCLR_RELEASE_URL': f'{hub.cdn_url}/files/none'}
    answer = client('create', 'slimclr_resnet50', cache_dir=str(cache), env=env)
    name = 'slimclr_resnet50.mocov3_300e_lincls_in1k'
    assert is_refused(
        answer, f'files/none/{PUBLISHED["mocov3_300e_lincls_in1k"].file} answered 404', f'has no slimclr-hub/{name}'
    )
    assert left(cache) == []


def test_offline(hub, publish, offline, cache, data):
    release = publish(data)
    assert is_refused(offline('fetch', release.file, cache, env=release.env), NETWORK.name, 'HF_HUB_OFFLINE')
    assert hub.requests == []
    assert left(cache) == []


def test_a_cache_that_cannot_be(publish, client, tmp_path, data):
    (tmp_path / 'file').touch()
    release = publish(data, NETWORK.file)
    assert is_refused(client('published', TAG, tmp_path / 'file', env=release.env), NETWORK.name, 'cache', '/file')


# Downloads that break off


def test_a_download_that_is_cut_goes_on_when_tried_again(hub, publish, client, cache, network, data):
    release = publish(data)
    hub.cut(release.faulty, after=WRITTEN + 1000, times=None)
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_refused(answer, NETWORK.name, release.file)
    assert left(cache) == [f'{release.file}.incomplete']
    hub.faults.clear()
    hub.requests.clear()
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_whole(answer, network)
    assert asked(hub, release) == [('HEAD', None, 200), ('GET', f'bytes={WRITTEN}-', 206)]
    assert len(answer.told('WARNING')) == 1  # that it is the authors', and no other hash


def test_a_process_that_is_killed(hub, publish, client, home, cache, network, data):
    release = publish(data)
    hub.slow(release.faulty, seconds_per_chunk=2, chunk=WRITTEN + 1000)
    victim = Client(hub.environment(home))
    victim.send('fetch', release.file, cache, env=release.env)
    while not any(path.stat().st_size >= WRITTEN for path in cache.rglob('*.incomplete')):
        assert victim.process.poll() is None
        time.sleep(0.01)
    victim.kill()
    assert left(cache) == [f'{release.file}.incomplete']
    hub.faults.clear()
    hub.requests.clear()
    assert is_whole(client('fetch', release.file, cache, env=release.env), network)
    assert asked(hub, release) == [('HEAD', None, 200), ('GET', f'bytes={WRITTEN}-', 206)]


@pytest.mark.parametrize(('beyond', 'gets'), [(0, []), (1, [('GET', None, 200)])])
def test_a_download_that_was_whole_or_is_of_a_longer_file(hub, publish, client, cache, network, data, beyond, gets):
    release = publish(data)
    folder = cache / 'slimclr_hub' / 'release-1.0.0' / TAG
    folder.mkdir(parents=True)
    (folder / f'{release.file}.incomplete').write_bytes(data + bytes(beyond))
    assert is_whole(client('fetch', release.file, cache, env=release.env), network)
    assert asked(hub, release) == [('HEAD', None, 200), *gets]


def test_an_error_of_the_server_once(hub, publish, client, cache, network, data):
    release = publish(data)
    hub.fail(release.faulty, method='HEAD')
    hub.fail(release.faulty, method='GET')
    assert is_whole(client('fetch', release.file, cache, env=release.env), network)
    assert [status for _, _, status in asked(hub, release)] == [500, 200, 500, 200]


def test_a_server_that_hangs_up(hub, publish, client, cache, data):
    release = publish(data)
    hub.fail(release.faulty, status=0, times=None)
    assert is_refused(client('fetch', release.file, cache, env=release.env), release.file, 'cannot be reached')
    assert left(cache) == []


def test_a_wrong_size(hub, publish, client, cache, network, data):
    release = publish(data)
    for size, rest in ((len(data) + 1, [f'{release.file}.incomplete']), (1000, [])):
        hub.lie(release.faulty, size=size, times=1)
        answer = client('fetch', release.file, cache, env=release.env)
        assert is_refused(answer, release.file, str(size), str(len(data)))
        assert left(cache) == rest
        hub.faults.clear()
    assert is_whole(client('fetch', release.file, cache, env=release.env), network)


# Files that are not what they should be


@pytest.mark.parametrize(('kind', 'digits'), [('sha256', 10), ('sha1', 8), ('md5', 10)])
def test_the_hash_in_its_name(publish, client, cache, network, data, kind, digits):
    release = publish(data, f'slimclr-mocov3-ep300-{hashlib.new(kind, data).hexdigest()[:digits]}.pth.tar')
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_whole(answer, network)
    assert len(answer.told('WARNING')) == 1


def test_another_hash_than_in_its_name(publish, client, cache, network, data):
    release = publish(data, 'slimclr-mocov3-ep300-57e298e9cd.pth.tar')
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_refused(answer, release.file, sha256(data), 'SLIMCLR_ACCEPT_RELEASE=1 in the environment accepts it')
    assert left(cache) == []
    answer = client('fetch', release.file, cache, env={**release.env, **ACCEPTED})
    assert is_whole(answer, network)
    _, warning = answer.told('WARNING')
    assert release.file in warning
    assert 'none of its hashes (sha256, sha1, md5)' in warning


@pytest.mark.parametrize('zipped', [True, False])
def test_a_file_that_would_run_something(publish, client, cache, tmp_path, zipped):
    release = publish(trapped(tmp_path / 'sprung', _use_new_zipfile_serialization=zipped))
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_refused(answer, release.file, 'more than tensors', 'nothing of it was run')
    assert not (tmp_path / 'sprung').exists()
    assert left(cache) == []


def test_a_file_that_ends_early(hub, publish, client, cache, network, data):
    release = publish(data[:-1000])
    for kind in ('fetch', 'published'):
        hub.add_file(f'{release.folder}/{NETWORK.file}', data[: len(data) // 2])
        what = release.file if kind == 'fetch' else TAG
        assert is_refused(client(kind, what, cache, env={**release.env, **ACCEPTED}), 'damaged')
        assert left(cache) == []
    hub.add_file(f'{release.folder}/{release.file}', data)
    assert is_whole(client('fetch', release.file, cache, env={**release.env, **ACCEPTED}), network)


def test_a_file_that_lacks_a_tensor(publish, client, cache, network):
    tensors = dict(network.state_dict())
    del tensors['layer2.0.bn1.w050.weight']
    release = publish(checkpoint(tensors))
    answer = client('fetch', release.file, cache, env=release.env)
    assert is_refused(answer, release.file, 'layer2.0.bn1.w050.weight is missing')
    assert left(cache) == []
