"""Sources of weights and their failures, by the real client, the real factory and a Hub on loopback."""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from slimclr_hub.hub.folder import save_folder
from slimclr_hub.weights.published import PUBLISHED
from tests.hub_server import HubServer, sha256
from tests.weights.client import digest
from tests.weights.conftest import is_refused, make, trapped

TAG = 'mocov2_200e_in1k'
SMALL = 'slimclr_resnet20'
CHECKED = 'huggingface/assets/slimclr_hub/checked'  # where it is noted that a file has the right hash
NUMBERS = itertools.count()


@dataclass
class Repo:
    name: str
    data: bytes

    @property
    def faulty(self) -> str:
        """Pattern of the Hub's address of the file."""
        return f'/{self.name}/resolve/*'

    @property
    def cdn(self) -> str:
        """Pattern of the address that it sends to."""
        return f'/cdn/{sha256(self.data)}/*'


@pytest.fixture
def repo(hub):
    """A repository like no other; what is in it matters only where a network is made of it."""
    repo = Repo(f'org/net-{next(NUMBERS)}', os.urandom(5000))
    hub.add_repo(repo.name, {'model.safetensors': repo.data})
    return repo


@pytest.fixture(scope='module')
def resnet20():
    return make(SMALL)


def is_whole(answer, repo):
    assert answer.error is None, answer.message
    assert Path(answer.value).read_bytes() == repo.data
    assert len(answer.sources) == 1
    assert repo.name in answer.sources[0]
    return True


def left(cache):
    """Of a download: what a later one would take for the file, and parts of it."""
    ends = ('.safetensors', '.incomplete')
    found = [path for path in cache.rglob('*') if path.suffix in ends or path.parent.name == 'blobs']
    return [path for path in found if '.no_exist' not in path.parts]  # the client's note on what the Hub has not


# In which order


def test_a_file_of_ones_own_asks_nobody(hub, client, resnet50, resnet50_file):
    name = f'slimclr_resnet50.{TAG}'
    answer = client('create', name, pretrained_cfg_overlay={'file': str(resnet50_file)})
    assert answer.value == digest(resnet50.state_dict())
    assert answer.sources == [f'Weights from the file {resnet50_file}']
    answer = client('create', f'slimclr_resnet50_025.{TAG}', pretrained_cfg_overlay={'file': str(resnet50_file.parent)})
    assert answer.value == digest(resnet50.extract(0.25).state_dict())
    assert answer.sources == [f'Weights from the file {resnet50_file}']
    assert hub.requests == []


def test_a_file_of_ones_own_that_is_not_there(hub, client, tmp_path):
    for path in (tmp_path / 'none.safetensors', tmp_path):
        answer = client('create', SMALL, pretrained_cfg_overlay={'file': str(path)})
        assert is_refused(answer, str(path), 'does not exist')
    assert hub.requests == []


def test_one_file_on_the_hub_serves_every_width(hub, client, offline, cache, resnet50, resnet50_file):
    name = f'slimclr-hub/slimclr_resnet50.{TAG}'
    hub.add_repo(name, resnet50_file.parent)
    answer = client('create', f'slimclr_resnet50.{TAG}', cache_dir=str(cache))
    assert answer.value == digest(resnet50.state_dict())
    assert len(answer.sources) == 1
    assert f'from the Hub: {name}' in answer.sources[0]
    assert answer.told('WARNING') == []
    answer = client('create', f'slimclr_resnet50_050.{TAG}', cache_dir=str(cache))
    assert answer.value == digest(resnet50.extract(0.5).state_dict())
    assert len(answer.sources) == 1
    assert [request.path for request in hub.requests if request.method == 'HEAD'] == [
        f'/{name}/resolve/main/model.safetensors'
    ] * 2
    assert len([request for request in hub.requests if request.method == 'GET']) == 1

    hub.requests.clear()
    answer = offline('create', f'slimclr_resnet50_075.{TAG}', cache_dir=str(cache))
    assert answer.value == digest(resnet50.extract(0.75).state_dict())
    assert len(answer.sources) == 1
    assert hub.requests == []
    del hub.repos[name]


def test_another_organisation(hub, client, cache):
    repo = Repo(f'mirror/{PUBLISHED[TAG].name}', b'mirrored')
    hub.add_repo(repo.name, {'model.safetensors': repo.data})
    assert is_whole(client('published', TAG, cache, env={'SLIMCLR_HUB_ORG': 'mirror'}), repo)
    assert {request.path.split('/')[1] for request in hub.requests} == {'mirror', 'cdn'}


def test_a_revision_of_a_repository(hub, repo, client, offline, cache, resnet20, tmp_path):
    about = {'size': 32, 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop_pct': 1.0, 'card': '# A card\n'}
    save_folder(make(SMALL, num_classes=3), tmp_path / 'main', **about)
    save_folder(resnet20, tmp_path / 'v1', **about)
    for revision in ('main', 'v1'):
        hub.add_repo(repo.name, tmp_path / revision, revision)
    name = f'hf-hub:{repo.name}@v1'
    answer = client('create', name, cache_dir=str(cache))
    assert answer.value == digest(resnet20.state_dict())
    assert len(answer.sources) == 1
    assert f'{repo.name}@v1' in answer.sources[0]
    hub.requests.clear()
    assert offline('create', name, cache_dir=str(cache)).value == answer.value
    assert hub.requests == []


def test_a_repository_by_overlay(hub, repo, client, cache, resnet20):
    hub.add_repo(repo.name, {'other.safetensors': save(resnet20.state_dict())})
    overlay = {'hf_hub_id': repo.name, 'hf_hub_filename': 'other.safetensors'}
    assert client('create', SMALL, pretrained_cfg_overlay=overlay, cache_dir=str(cache)).value == digest(
        resnet20.state_dict()
    )


# The cache


def test_offline(hub, repo, client, offline, cache):
    answer = offline('from_hub', repo.name, cache)
    assert is_refused(answer, repo.name, 'offline', 'HF_HUB_OFFLINE', 'model.safetensors')
    answer = offline('published', TAG, cache)
    assert is_refused(answer, PUBLISHED[TAG].name, 'offline')
    assert answer.message.count('offline') == 1  # the release is as far away
    assert hub.requests == []
    assert is_whole(client('from_hub', repo.name, cache), repo)
    hub.requests.clear()
    assert is_whole(offline('from_hub', repo.name, cache), repo)
    assert hub.requests == []


def test_the_hub_away_with_the_file_in_the_cache(hub, repo, client, cache):
    client('from_hub', repo.name, cache)
    for status in (0, 403, 503):
        hub.fail(repo.faulty, status=status, times=None)
        assert is_whole(client('from_hub', repo.name, cache), repo)


def test_the_hub_away_without_the_file(hub, repo, client, cache):
    hub.fail(repo.faulty, status=403, times=None)  # what a firewall says
    assert is_refused(client('from_hub', repo.name, cache), repo.name, 'cannot be reached', '403')
    assert left(cache) == []


def test_a_file_in_the_store_that_repositories_share(hub, repo, client, home, cache):
    """A file from xet is stored under xet's hash, and the cache's own entry is a link."""
    shared = pytest.importorskip('huggingface_hub.utils._shared_blobs')
    client('from_hub', repo.name, cache)
    shutil.rmtree(home / CHECKED)
    (blob,) = cache.glob('*/blobs/*')
    xet = sha256(b'as xet has it')
    assert shared.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash=xet, cache_dir=cache, expected_size=len(repo.data)
    )
    assert blob.resolve().name == xet
    assert is_whole(client('from_hub', repo.name, cache), repo)

    shutil.rmtree(home / CHECKED)
    blob.resolve().chmod(0o600)
    blob.resolve().write_bytes(b'damaged')
    assert is_refused(client('from_hub', repo.name, cache), repo.name, sha256(b'damaged'))
    assert not blob.is_symlink()
    assert not list(cache.rglob(xet))
    assert is_whole(client('from_hub', repo.name, cache), repo)


def test_a_cache_that_cannot_be(repo, client, tmp_path):
    (tmp_path / 'file').touch()
    assert is_refused(client('from_hub', repo.name, tmp_path / 'file'), repo.name, f'{tmp_path}/file')


NO_NETWORK = """
import sys
import time
import timm, slimclr_hub
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        timm.create_model(name, pretrained=True)
    except ValueError as error:
        assert time.monotonic() - start < 5
        assert error.__cause__ is None and error.__suppress_context__
        print(error)
"""


def test_no_network_is_one_line_in_seconds(tmp_path):
    """Without retries; the line tells how to load a file of one's own."""
    with HubServer() as server:
        environment = server.environment(tmp_path, SLIMCLR_RELEASE_URL=f'{server.url}/files')
    command = [sys.executable, '-c', NO_NETWORK, f'slimclr_resnet50.{TAG}', f'slimclr_resnet50_050.{TAG}']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ''
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.count('cannot be reached') == 2
        assert 'pretrained_cfg_overlay=dict(file=PATH)' in line
        assert 'slimclr-hub convert' in line


# Refused by the Hub


def test_no_such_repository(client, cache):
    assert is_refused(client('from_hub', 'org/none', cache), 'org/none', 'hf auth login')
    assert is_refused(client('from_hub', 'no name', cache), "'no name'", 'account/name')
    assert left(cache) == []


@pytest.mark.parametrize(('kind', 'words'), [('private', 'does not show it'), ('gated', 'accept its conditions')])
def test_private_and_gated(hub, repo, client, cache, kind, words):
    hub.add_repo(repo.name, {'model.safetensors': repo.data}, **{kind: True})
    for env in ({}, {'HF_TOKEN': hub.guest_token}):
        assert is_refused(client('from_hub', repo.name, cache, env=env), repo.name, 'hf auth login', words)
    assert left(cache) == []
    assert is_whole(client('from_hub', repo.name, cache, env={'HF_TOKEN': hub.token}), repo)


def test_a_wrong_token(repo, client, cache):
    answer = client('from_hub', repo.name, cache, env={'HF_TOKEN': 'hf_wrong'})
    assert is_refused(answer, repo.name, '401', 'Invalid credentials')


def test_no_such_file_or_revision(hub, repo, client, cache):
    hub.add_repo(repo.name, {'pytorch_model.bin': b''})
    assert is_refused(client('from_hub', repo.name, cache), repo.name, 'no model.safetensors', 'only safetensors')
    assert is_refused(client('from_hub', f'{repo.name}@v9', cache), repo.name, 'no revision v9')
    assert left(cache) == []


# Faults of the network


def test_an_error_of_the_server_once(hub, repo, client, cache):
    hub.fail(repo.faulty)
    hub.fail(repo.cdn)
    assert is_whole(client('from_hub', repo.name, cache), repo)
    assert [request.status for request in hub.requests if request.method == 'GET'] == [500, 200]


def test_an_error_of_the_server_always(hub, repo, client, cache):
    hub.fail(repo.cdn, times=None)
    assert is_refused(client('from_hub', repo.name, cache), repo.name, '500')
    assert left(cache) == []


def test_a_connection_that_is_cut(hub, repo, client, cache):
    hub.cut(repo.cdn, after=4000)
    assert is_whole(client('from_hub', repo.name, cache), repo)
    shutil.rmtree(cache)
    hub.cut(repo.cdn, after=4000, times=None)
    assert is_refused(client('from_hub', repo.name, cache), repo.name, 'cannot be reached')
    assert left(cache) == []


def test_a_hub_that_hangs_up(hub, repo, client, cache):
    hub.fail(repo.faulty, status=0, times=None)
    assert is_refused(client('from_hub', repo.name, cache), repo.name, 'cannot be reached')
    assert left(cache) == []


def test_a_slow_server(hub, repo, client, cache):
    hub.delay(repo.faulty, seconds=0.2)
    hub.slow(repo.cdn, seconds_per_chunk=0.1, chunk=1000)
    assert is_whole(client('from_hub', repo.name, cache), repo)


def test_a_wrong_size(hub, repo, client, cache):
    hub.lie(repo.faulty, size=6000)
    assert is_refused(client('from_hub', repo.name, cache), repo.name, 'model.safetensors', '6000', '5000')
    assert left(cache) == []


def test_xet_fails(hub, repo, other, cache):
    """It raises errors of its own."""
    about = {'ETag': f'"{sha256(repo.data)}"', 'X_Linked_Size': '5000', 'X_Repo_Commit': '0' * 40}
    xet = {'X_Xet_Hash': sha256(b'as xet has it'), 'X_Xet_Refresh_Route': f'{hub.url}/xet-token'}
    hub.fail(repo.faulty, status=200, **about, **xet)
    store = {'X_Xet_Cas_Url': hub.cdn_url, 'X_Xet_Access_Token': 'a', 'X_Xet_Token_Expiration': str(1 << 33)}
    hub.fail('/xet-token', status=200, times=None, **store)
    assert is_refused(other('from_hub', repo.name, cache), repo.name, 'download', '404')
    assert left(cache) == []


# Files that are not what they should be


def test_a_wrong_hash(hub, repo, client, cache):
    bad = os.urandom(len(repo.data))
    hub.add_repo(repo.name, {'model.safetensors': bad})
    hub.lie(repo.faulty, etag=sha256(repo.data))
    assert is_refused(client('from_hub', repo.name, cache), repo.name, sha256(repo.data), sha256(bad))
    assert left(cache) == []
    hub.add_repo(repo.name, {'model.safetensors': repo.data})
    assert is_whole(client('from_hub', repo.name, cache), repo)


def test_a_wrong_hash_after_a_right_one(hub, repo, client, cache):
    """A file is hashed once; it is another one when it was downloaded again."""
    assert is_whole(client('from_hub', repo.name, cache), repo)
    shutil.rmtree(cache)
    hub.add_repo(repo.name, {'model.safetensors': os.urandom(len(repo.data))})
    hub.lie(repo.faulty, etag=sha256(repo.data))
    assert is_refused(client('from_hub', repo.name, cache), repo.name, sha256(repo.data))
    assert left(cache) == []


def test_a_pickle_by_the_name_of_safetensors(hub, repo, client, cache, tmp_path):
    hub.add_repo(repo.name, {'model.safetensors': trapped(tmp_path / 'sprung')})
    answer = client('create', SMALL, pretrained_cfg_overlay={'hf_hub_id': repo.name}, cache_dir=str(cache))
    assert is_refused(answer, repo.name.replace('/', '--'), 'PyTorch checkpoint', loaded=True)
    assert not (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('size', [0, 5, 100, 200_000])
def test_a_file_that_ends_early(hub, repo, client, cache, resnet20, size):
    hub.add_repo(repo.name, {'model.safetensors': save(resnet20.state_dict())[:size]})
    answer = client('create', SMALL, pretrained_cfg_overlay={'hf_hub_id': repo.name}, cache_dir=str(cache))
    assert is_refused(answer, repo.name.replace('/', '--'), 'truncated', loaded=True)


def without_a_width(tensors):
    for name in [name for name in tensors if '.w025.' in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (without_a_width, ['missing bn1.w025.weight', 'the widths 1.0, 0.75, 0.5, not 0.25']),
        (lambda tensors: tensors.pop('layer2.0.conv2.weight'), ['missing layer2.0.conv2.weight']),
        (lambda tensors: tensors.update({'layer9.x': torch.zeros(1)}), ['unexpected layer9.x']),
        (lambda tensors: tensors.update({'bn1.w050.bias': torch.zeros(7)}), ['bn1.w050.bias', '[7]', '[8]']),
    ],
    ids=['width', 'missing', 'unexpected', 'misshapen'],
)
def test_a_file_that_does_not_fit(hub, repo, client, cache, resnet20, change, words):
    tensors = dict(resnet20.state_dict())
    change(tensors)
    hub.add_repo(repo.name, {'model.safetensors': save(tensors)})
    answer = client('create', SMALL, pretrained_cfg_overlay={'hf_hub_id': repo.name}, cache_dir=str(cache))
    assert is_refused(answer, *words, loaded=True)


def test_another_architecture_under_the_tag(hub, client, cache, resnet20):
    hub.add_repo(f'wrong/{PUBLISHED[TAG].name}', {'model.safetensors': save(resnet20.state_dict())})
    env = {'SLIMCLR_HUB_ORG': 'wrong'}
    for name in ('slimclr_resnet50', 'slimclr_resnet50_050'):
        answer = client('create', f'{name}.{TAG}', cache_dir=str(cache), env=env)
        words = ['basic blocks (3, 3, 3) with 16 channels', 'bottleneck blocks (3, 4, 6, 3)']
        assert is_refused(answer, *words, loaded=True)
