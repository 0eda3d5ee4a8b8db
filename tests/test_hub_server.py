"""The loopback Hub against the real client, so that a fault of the server is not taken for one of the package."""

import http.client
import json
import os
import subprocess
import sys

import pytest

from tests.hub_server import HubServer, sha256

SMALL = bytes(range(256)) * 1000
BIG = os.urandom(11 << 20)  # the client writes 10 MiB at once, and resumes only after what it has written
FILES = {'config.json': '{"a": 1}', 'model.safetensors': SMALL, 'big.safetensors': BIG}
CLIENT = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

def get(repo, file, **kwargs):
    try:
        return hashlib.sha256(Path(hf_hub_download(repo, file, **kwargs)).read_bytes()).hexdigest()
    except Exception as error:
        return type(error).__name__
"""


@pytest.fixture
def server():
    with HubServer() as server:
        server.add_repo('org/net', FILES)
        yield server


@pytest.fixture
def client(server, tmp_path):
    """Runs code that prints JSON, with the same caches each time."""

    def run(code, **env):
        environment = server.environment(tmp_path, **env)
        done = subprocess.run([sys.executable, '-c', CLIENT + code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def get(file, repo='org/net'):
    return f'print(json.dumps(get({repo!r}, {file!r})))'


def blobs(tmp_path):
    return [path.name for path in tmp_path.glob('huggingface/hub/*/blobs/*')]


def test_revisions(server, client):
    commit = server.add_repo('org/net', {'config.json': 'tagged'}, revision='v1')
    code = f"""
print(json.dumps([get('org/net', 'config.json', revision=name) for name in (None, 'v1', {commit!r}, 'refs/none')]))
"""
    tagged = sha256(b'tagged')
    assert client(code) == [sha256(b'{"a": 1}'), tagged, tagged, 'RevisionNotFoundError']


def test_a_large_file_comes_from_another_host_which_sees_no_token(server, client):
    assert client(get('model.safetensors'), HF_TOKEN=server.token) == sha256(SMALL)
    head, get_ = server.requests
    assert (head.method, head.path, head.status) == ('HEAD', '/org/net/resolve/main/model.safetensors', 302)
    assert head.token == f'Bearer {server.token}'
    assert get_.path.startswith('/cdn/')
    assert (get_.method, get_.status, get_.token, get_.range) == ('GET', 200, None, None)


def test_who_may_see_what(server, client):
    server.add_repo('org/private', FILES, private=True)
    server.add_repo('org/gated', FILES, gated=True)
    code = """
repos = ['org/net', 'org/none', 'org/private', 'org/gated']
tokens = [False, 'hf_guest', 'hf_member', 'hf_wrong']
print(json.dumps([[get(repo, 'config.json', token=token) for repo in repos] for token in tokens]))
"""
    fine, missing, gated = sha256(b'{"a": 1}'), 'RepositoryNotFoundError', 'GatedRepoError'
    nobody, guest, member, wrong = client(code)
    assert nobody == guest == [fine, missing, missing, gated]
    assert member == [fine, missing, fine, fine]
    assert wrong == [fine, 'HfHubHTTPError', fine, fine]  # what is in the cache needs no permission
    assert {request.status for request in server.requests if request.path.startswith('/org/none')} == {401, 404}
    assert {request.status for request in server.requests if request.path.startswith('/org/gated')} == {200, 401, 403}


def test_questions_about_a_repository(server, client):
    code = """
api = HfApi()
about = api.model_info('org/net', files_metadata=True)
files = {file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in about.siblings}
exist = [api.repo_exists('org/net'), api.repo_exists('org/none'), api.file_exists('org/net', 'none')]
print(json.dumps([about.sha, files, sorted(api.list_repo_files('org/net')), exist, get('org/net', 'none')]))
"""
    sha, files, names, exist, missing = client(code)
    assert sha == server.repos['org/net'].refs['main']
    assert names == sorted(FILES)
    assert files['config.json'] == [8, None]
    assert files['model.safetensors'] == [len(SMALL), sha256(SMALL)]
    assert exist == [True, False, False]
    assert missing == 'RemoteEntryNotFoundError'


def test_what_is_pushed_can_be_downloaded(server, client, tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n# Card\n')
    (folder / 'model.safetensors').write_bytes(SMALL)
    code = f"""
api = HfApi(token='hf_member')
api.create_repo('org/new', private=True)
url = api.create_repo('org/new', exist_ok=True)
oids = [api.upload_folder(repo_id='org/new', folder_path={str(folder)!r}).oid for _ in range(2)]
api.create_tag('org/new', tag='v1')
request = api.upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='org/new', create_pr=True)
refused = []
for token in (False, 'hf_guest'):
    try:
        HfApi(token=token).upload_folder(repo_id='org/net', folder_path={str(folder)!r})
    except HfHubHTTPError as error:
        refused.append(error.response.status_code)
got = get('org/new', 'model.safetensors', revision='v1', token='hf_member')
print(json.dumps([url, oids, request.pr_revision, refused, got]))
"""
    url, oids, request, refused, got = client(code)
    repo = server.repos['org/new']
    assert url == f'{server.url}/org/new'
    assert repo.private
    assert oids == [repo.refs['v1']] * 2  # the second push changed nothing
    assert sorted(repo.commits[oids[0]]) == ['.gitattributes', 'README.md', 'model.safetensors']
    assert request == 'refs/pr/1'
    assert refused == [401, 403]
    assert got == sha256(SMALL)
    assert [request.token for request in server.requests if request.method == 'PUT'] == [None]


def test_errors(server, client, tmp_path):
    server.fail('*/config.json', times=1, method='HEAD')
    server.fail('/cdn/*', status=503, times=None)
    code = "print(json.dumps([get('org/net', 'config.json'), get('org/net', 'model.safetensors')]))"
    assert client(code) == [sha256(b'{"a": 1}'), 'HfHubHTTPError']
    assert [request.status for request in server.requests] == [500, 200, 200, 302, 503]
    assert len(blobs(tmp_path)) == 1


def test_a_download_goes_on_where_it_was_cut(server, client):
    server.cut('*/big.safetensors', after=len(BIG) - 1)
    assert client(get('big.safetensors')) == sha256(BIG)
    assert [(request.status, request.range) for request in server.requests[1:]] == [
        (200, None),
        (206, f'bytes={10 << 20}-'),
    ]


def test_a_download_that_is_always_cut(server, client, tmp_path):
    server.cut('*/model.safetensors', after=1000, times=None)
    assert client(get('model.safetensors')) == 'RemoteProtocolError'
    assert blobs(tmp_path) == []


def test_lies(server, client, tmp_path):
    server.lie('*/config.json', size=9)
    server.lie('*/model.safetensors', etag='0' * 64)
    code = "print(json.dumps([get('org/net', 'config.json'), get('org/net', 'model.safetensors')]))"
    assert client(code) == ['OSError', sha256(SMALL)]  # the client looks at sizes, but not at hashes
    assert blobs(tmp_path) == ['0' * 64]


def test_a_pause_is_a_timeout(server, client):
    server.slow('*/model.safetensors', seconds_per_chunk=5, times=1)
    assert client(get('model.safetensors'), HF_HUB_DOWNLOAD_TIMEOUT='1') == sha256(SMALL)
    assert [request.method for request in server.requests] == ['HEAD', 'GET', 'GET']


def test_offline_and_down(server, client):
    assert client(get('config.json'), HF_HUB_OFFLINE='1') == 'LocalEntryNotFoundError'
    assert server.requests == []
    assert client(get('config.json')) == sha256(b'{"a": 1}')
    server.requests.clear()
    assert client(get('config.json'), HF_HUB_OFFLINE='1') == sha256(b'{"a": 1}')
    assert server.requests == []
    server.stop()
    assert client(get('config.json')) == sha256(b'{"a": 1}')


def ask(url, method='GET', **headers):
    """Status, headers and as much of the body as came."""
    _, _, host, path = url.split('/', 3)
    connection = http.client.HTTPConnection(host)
    connection.request(method, '/' + path, headers=headers)
    answer = connection.getresponse()
    try:
        return answer.status, answer.headers, answer.read()
    except http.client.IncompleteRead as error:
        return answer.status, answer.headers, error.partial
    finally:
        connection.close()


def test_plain_files(server):
    url = server.add_file('v1/a file.bin', SMALL)
    status, headers, body = ask(url)
    assert (status, headers['Content-Length'], body) == (200, str(len(SMALL)), SMALL)
    status, headers, body = ask(url, 'HEAD')
    assert (status, headers['Content-Length'], body) == (200, str(len(SMALL)), b'')
    for asked, part in (('5-9', SMALL[5:10]), ('255990-', SMALL[255990:]), ('-7', SMALL[-7:])):
        status, headers, body = ask(url, Range=f'bytes={asked}')
        assert (status, headers['Content-Length'], body) == (206, str(len(part)), part)
    assert headers['Content-Range'] == f'bytes {len(SMALL) - 7}-{len(SMALL) - 1}/{len(SMALL)}'
    assert ask(url, Range=f'bytes={len(SMALL)}-')[0] == 416
    assert ask(url + 'x')[0] == 404
    server.cut('/files/*', after=1000)
    status, headers, body = ask(url)
    assert (status, headers['Content-Length'], body) == (200, str(len(SMALL)), SMALL[:1000])
    server.fail('/files/*', status=0)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(url)
    assert ask(url)[2] == SMALL


def test_a_fault_in_the_server_itself_is_raised():
    def use():
        with HubServer() as server, pytest.raises(http.client.RemoteDisconnected):
            ask(server.add_file('a', b''), Range='bytes=-')

    with pytest.raises(RuntimeError, match='the server itself failed'):
        use()
