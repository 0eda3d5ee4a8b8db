"""Servers that hold whoever asks them, and answers that unpack to more than was announced, by the real client."""

import itertools
import os

import pytest

from tests.hub_server import sha256
from tests.weights.conftest import is_refused

NUMBERS = itertools.count()
IN_TIME = {'SLIMCLR_DOWNLOAD_SECONDS': '2'}
ANNOUNCED = 100_000


DATA = os.urandom(ANNOUNCED)
CDN = f'/cdn/{sha256(DATA)}/*'


@pytest.fixture
def name(hub):
    name = f'slow/net-{next(NUMBERS)}'
    hub.add_repo(name, {'model.safetensors': DATA})
    return name


@pytest.mark.parametrize('kind', ['silent', 'dripping', 'come back tomorrow'])
def test_a_hub_that_hangs_is_one_line(hub, client, cache, name, kind):
    if kind == 'silent':
        hub.delay(f'/{name}/resolve/*', seconds=99, method='HEAD')
    elif kind == 'dripping':  # each byte within the timeout of the client
        hub.slow(CDN, seconds_per_chunk=0.1, chunk=1)
    else:
        hub.fail(CDN, status=429, times=None, Retry_After='86400')
    answer = client('from_hub', name, cache, env=IN_TIME)
    assert is_refused(answer, name, 'no end after 2 s; set SLIMCLR_DOWNLOAD_SECONDS to allow more')


def test_a_release_that_drips_is_one_line(hub, client, cache):
    url = hub.add_file('dripping/x-48213217.pth.tar', DATA)
    hub.slow('/files/dripping/*', seconds_per_chunk=0.1, chunk=1)
    env = {**IN_TIME, 'SLIMCLR_RELEASE_URL': url.rpartition('/')[0]}
    assert is_refused(client('fetch', 'x-48213217.pth.tar', cache, env=env), 'no end after 2 s')


@pytest.mark.parametrize('seconds', ['x', 'inf', 'nan', '-1', '0'])
def test_a_time_that_is_none(client, cache, name, seconds):
    answer = client('from_hub', name, cache, env={'SLIMCLR_DOWNLOAD_SECONDS': seconds})
    assert is_refused(answer, f"is '{seconds}', not a number of seconds up to")


@pytest.mark.parametrize('source', ['hub', 'release'])
def test_a_bomb_is_stopped_at_the_announced_size(hub, client, cache, name, source):
    if source == 'hub':
        hub.bomb(CDN, size=40 << 20)
        answer = client('from_hub', name, cache)
    else:
        url = hub.add_file(f'{name}/x-48213217.pth.tar', DATA)
        hub.bomb(f'/files/{name}/*', size=40 << 20)
        answer = client('fetch', 'x-48213217.pth.tar', cache, env={'SLIMCLR_RELEASE_URL': url.rpartition('/')[0]})
    assert is_refused(answer, f'more came than the {ANNOUNCED} bytes that were announced')
    assert sum(path.stat().st_size for path in cache.rglob('*') if path.is_file()) <= ANNOUNCED


def test_names_of_nothing_inside_of_timm(client, tmp_path):
    assert is_refused(client('create', 'hf-hub:me/none'), 'the Hub has no me/none')
    assert is_refused(client('create', f'local-dir:{tmp_path}/none'), f'{tmp_path}/none does not exist')
    assert is_refused(client('create', f'local-dir:{tmp_path}'), 'has no config.json')
