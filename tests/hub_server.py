"""A Hugging Face Hub on loopback, for the real client: repositories, pushes, plain files, and faults on demand.

Two ports of 127.0.0.1 answer: `url` is the Hub, `cdn_url` is the other host to which the Hub sends for large files, and
which holds plain files as a release page would. It has to be another origin: the client follows a redirect within one
origin with its token, and to another one without.

Where this differs from the Hub: a missing repository is a 401 *with* an error code, since the client tells it from
other 401s by an https address; no xet; no `resolve-cache` redirect for small files; commits know no authors or dates.
"""

import base64
import contextlib
import fnmatch
import gzip
import hashlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

LFS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.ckpt', '*.npz', '*.onnx')  # as the Hub's first .gitattributes
CHUNK = 1 << 16
ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = '/(?P<repo>[^/]+/[^/]+)'
MODEL = f'/api/models{REPO}'
Content = Path | str | Mapping[str, bytes | str]


@dataclass
class Request:
    """One request as it came: `path` is unquoted and without its query, `headers` know no case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes = field(default=b'', repr=False)
    status: int = 0  # of the answer

    @property
    def range(self) -> str | None:
        return self.headers.get('Range')

    @property
    def token(self) -> str | None:
        return self.headers.get('Authorization')


@dataclass
class Fault:
    kind: str
    pattern: str
    method: str | None
    times: int | None
    value: dict[str, Any]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        text = json.dumps([len(self.commits), sorted((path, sha1(data)) for path, data in files.items())])
        self.refs[ref] = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.refs[ref]] = files
        return self.refs[ref]


class RefusalError(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        self.status, self.message = status, message
        self.headers = {'X-Error-Message': message, **headers} | ({'X-Error-Code': code} if code else {})


def sha1(data: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_lfs(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS)


def name_of(path: str, data: bytes) -> str:
    return sha256(data) if is_lfs(path) else sha1(data)


def read_files(content: Content) -> dict[str, bytes]:
    if isinstance(content, Mapping):
        return {path: data.encode() if isinstance(data, str) else data for path, data in content.items()}
    folder = Path(content)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


class HubServer:
    """The server; `with HubServer() as server` starts and stops it, and raises what went wrong inside of it.

    Faults are for paths that match a shell pattern ('*' crosses slashes), for one `method` or any, and are used up
    after `times` (None: never). The newest that matches comes first.
    """

    token = 'hf_member'  # may read and write everything
    guest_token = 'hf_guest'  # a valid login that may only read what is public

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[str] = []
        self.sent = 0  # bytes of all answers, headers included
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.listeners = [Listener(self), Listener(self)]
        self.url, self.cdn_url = (f'http://127.0.0.1:{listener.server_port}' for listener in self.listeners)

    def __enter__(self) -> 'HubServer':
        for listener in self.listeners:
            threading.Thread(target=listener.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop()
        if self.errors and error is None:
            raise RuntimeError('the server itself failed:\n' + '\n'.join(self.errors))

    def stop(self) -> None:
        """Goes down as a machine does: open connections end, new ones are refused."""
        if not self.stopped.is_set():
            self.stopped.set()
            for listener in self.listeners:
                listener.stop()

    def add_repo(
        self, name: str, content: Content, revision: str = 'main', private: bool = False, gated: bool = False
    ) -> str:
        """A commit of exactly these files on the branch or tag; returns its hash. The repository is made if need be."""
        repo = self.repos.setdefault(name, Repo())
        repo.private, repo.gated = private, gated
        return repo.commit(revision, read_files(content))

    def add_file(self, name: str, data: bytes) -> str:
        """A plain file, which is in no repository; returns its address."""
        self.files[name] = data
        return f'{self.cdn_url}/files/{quote(name)}'

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """For a subprocess whose Hub this is, with caches below `home` only, without a token, proxies and xet."""
        drop = ('HF_', 'HUGGING', 'TRANSFORMERS_', 'TORCH_HOME', 'TORCH_MODEL_ZOO')
        kept = {k: v for k, v in os.environ.items() if not k.startswith(drop) and not k.lower().endswith('_proxy')}
        return {
            **kept,
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(home / 'huggingface'),
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_UPDATE_CHECK': '1',
            'HF_HUB_DISABLE_XET': '1',  # an upload takes xet wherever hf_xet is installed, whatever the server says
            'NO_PROXY': '127.0.0.1',
            'TORCH_HOME': str(home / 'torch'),
            'XDG_CACHE_HOME': str(home / 'cache'),
            **extra,
        }

    def fail(
        self, pattern: str, status: int = 500, times: int | None = 1, method: str | None = None, **headers: str
    ) -> None:
        """An error instead of the answer, for status 0 a closed connection; `Retry_After='0'` goes as a header."""
        headers = {key.replace('_', '-'): value for key, value in headers.items()}
        self._add('fail', pattern, method, times, status=status, headers=headers)

    def cut(self, pattern: str, after: int, times: int | None = 1) -> None:
        """The full length promised, but no byte of the file from `after` on: the connection is closed there."""
        self._add('cut', pattern, 'GET', times, after=after)

    def lie(self, pattern: str, size: int | None = None, etag: str | None = None, times: int | None = None) -> None:
        """Another size or hash in headers, `model_info` and the tree; the file itself is sent whole, as it is.

        The pattern is for addresses of files (/ORG/NAME/resolve/REVISION/FILE), also where the answer is a list.
        """
        told = {'size': size, 'etag': etag}
        self._add('lie', pattern, None, times, **{key: value for key, value in told.items() if value is not None})

    def slow(self, pattern: str, seconds_per_chunk: float, chunk: int = CHUNK, times: int | None = None) -> None:
        """A pause before each `chunk` bytes of a file."""
        self._add('slow', pattern, 'GET', times, seconds=seconds_per_chunk, chunk=chunk)

    def bomb(self, pattern: str, size: int) -> None:
        """So many zeros instead of the file, compressed to a thousandth."""
        self._add('bomb', pattern, 'GET', None, packed=gzip.compress(bytes(size), 1))

    def delay(self, pattern: str, seconds: float, times: int | None = None, method: str | None = None) -> None:
        """A pause before an answer begins."""
        self._add('delay', pattern, method, times, seconds=seconds)

    def _add(self, kind: str, pattern: str, method: str | None, times: int | None, **value: Any) -> None:
        self.faults.insert(0, Fault(kind, pattern, method, times, value))

    def take(self, kind: str, method: str, path: str) -> dict[str, Any]:
        """What the fault of this kind says that holds for the request, which uses it up once; {} for none."""
        with self.lock:
            for fault in self.faults:
                matches = fault.kind == kind and fault.method in (None, method) and fault.times != 0
                if matches and fnmatch.fnmatchcase(path, fault.pattern):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.value
        return {}

    def describe(self, repo: str, revision: str, path: str, data: bytes) -> tuple[str, int]:
        """Etag and size as announced."""
        lie = self.take('lie', 'HEAD', f'/{repo}/resolve/{revision}/{path}')
        return lie.get('etag') or name_of(path, data), lie.get('size', len(data))


def route(methods: str, pattern: str) -> Callable:
    def add(function: Callable) -> Callable:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return add


class Listener(ThreadingHTTPServer):
    def __init__(self, hub: HubServer):
        super().__init__(('127.0.0.1', 0), Handler)
        self.hub = hub
        self.open: set[socket.socket] = set()

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away
            self.hub.errors.append(traceback.format_exc())

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.open):  # kept alive, they would be served on
            with contextlib.suppress(OSError):  # its thread was faster
                connection.shutdown(socket.SHUT_RDWR)


class CountingWriter:
    """The way to a client; the server knows the bytes that went there."""

    def __init__(self, file: Any, hub: HubServer) -> None:
        self.file, self.hub = file, hub

    def write(self, data: Any) -> None:
        self.file.write(data)
        with self.hub.lock:
            self.hub.sent += len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # header and body are two packets: 40 ms otherwise
    server: Listener
    asked: Request

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def setup(self) -> None:
        super().setup()
        self.wfile: Any = CountingWriter(self.wfile, self.hub)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        raw, _, query = self.path.partition('?')
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.asked = Request(self.command, unquote(raw), parse_qs(query), self.headers, body)
        if (self.command, raw) != ('HEAD', '/'):  # which only tries whether there is a connection
            self.hub.requests.append(self.asked)
        where = (self.command, self.asked.path)
        try:
            self.hub.stopped.wait(self.hub.take('delay', *where).get('seconds', 0))
            if failure := self.hub.take('fail', *where):
                if failure['status'] == 0:
                    return self._hang_up()
                raise RefusalError(failure['status'], None, 'a fault on demand', **failure['headers'])
            for methods, pattern, function in ROUTES:
                if self.command in methods.split() and (match := pattern.fullmatch(raw)):
                    function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
                    return
            raise RefusalError(404, None, f'hub_server.py has no {self.command} {raw}')
        except RefusalError as refusal:
            self.send(refusal.status, {'error': refusal.message}, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, content: Any = b'', **headers: str) -> None:
        """A whole answer; anything but bytes goes as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._head(status, {'Content-Length': str(len(body)), 'Content-Type': 'application/json', **headers})
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.asked.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send_file(self, data: bytes, size: int | None = None, **headers: str) -> None:
        """A file or the range asked for; `size` is what HEAD announces."""
        headers = {'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream', **headers}
        start, stop, status = 0, len(data), 200
        if match := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
            first, last = match.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                raise RefusalError(416, None, 'Range Not Satisfiable', **{'Content-Range': f'bytes */{len(data)}'})
            status, headers['Content-Range'] = 206, f'bytes {start}-{stop - 1}/{len(data)}'
        if self.command == 'HEAD':
            return self._head(200, headers | {'Content-Length': str(len(data) if size is None else size)})
        if bomb := self.hub.take('bomb', 'GET', self.asked.path):
            self._head(200, headers | {'Content-Length': str(len(bomb['packed'])), 'Content-Encoding': 'gzip'})
            self.wfile.write(bomb['packed'])
            return
        self._head(status, headers | {'Content-Length': str(stop - start)})
        slow = self.hub.take('slow', 'GET', self.asked.path)
        end = min(stop, self.hub.take('cut', 'GET', self.asked.path).get('after', stop))
        step = slow.get('chunk', CHUNK)
        for at in range(start, end, step):
            if slow:
                self.hub.stopped.wait(slow['seconds'])
            self.wfile.write(data[at : min(at + step, end)])
        if end < stop:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def json(self) -> Any:
        return json.loads(self.asked.body)

    def member(self) -> bool | None:
        """Whether the login may do everything (True) or is a guest's (False); None for no login."""
        if self.asked.token is None:
            return None
        tokens = {f'Bearer {self.hub.token}': True, f'Bearer {self.hub.guest_token}': False}
        if self.asked.token not in tokens:
            raise RefusalError(401, None, 'Invalid credentials in Authorization header')
        return tokens[self.asked.token]

    def find(self, name: str, revision: str = 'main', content: bool = False, write: bool = False) -> tuple[Repo, str]:
        """The repository and the commit, if the login may see it, may see what is in it, or may write to it."""
        member, repo = self.member(), self.hub.repos.get(name)
        if repo is None or (repo.private and not member):
            if member is None:
                raise RefusalError(401, 'RepoNotFound', 'Invalid username or password.')
            raise RefusalError(404, 'RepoNotFound', 'Repository not found')
        status = 401 if member is None else 403
        if content and repo.gated and not member:
            raise RefusalError(status, 'GatedRepo', f'Access to model {name} is restricted')
        if write and not member:
            raise RefusalError(status, None, 'You have no right to write here')
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise RefusalError(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repo, commit

    @route('GET HEAD', f'{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, commit = self.find(repo, revision, content=True)
        if path not in found.commits[commit]:
            raise RefusalError(404, 'EntryNotFound', 'Entry not found', **{'X-Repo-Commit': commit})
        data = found.commits[commit][path]
        etag, size = self.hub.describe(repo, revision, path, data)
        headers = {'X-Repo-Commit': commit, 'ETag': f'"{etag}"'}
        if not is_lfs(path):
            return self.send_file(data, size, **headers)
        self.hub.objects[sha256(data)] = data
        linked = {'X-Linked-Etag': f'"{etag}"', 'X-Linked-Size': str(size)}
        location = f'{self.hub.cdn_url}/cdn/{sha256(data)}/{quote(path)}?Signature=1'
        self.send(302, b'Found', **headers, **linked, Location=location)

    @route('GET HEAD', '/cdn/(?P<oid>[0-9a-f]{64})/.+')
    def cdn(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise RefusalError(404, None, 'NoSuchKey')
        self.send_file(self.hub.objects[oid], ETag=f'"{oid[:32]}"')

    @route('GET HEAD', '/files/(?P<name>.+)')
    def plain(self, name: str) -> None:
        if name not in self.hub.files:
            raise RefusalError(404, None, 'Not Found')
        lie = self.hub.take('lie', self.command, self.asked.path)
        data = self.hub.files[name]
        self.send_file(data, lie.get('size'), ETag=f'"{lie.get("etag") or sha256(data)}"')

    @route('GET', f'{MODEL}(?:/revision/(?P<revision>[^/]+))?')
    def model_info(self, repo: str, revision: str = 'main') -> None:
        found, commit = self.find(repo, revision)
        siblings = []
        for path, data in found.commits[commit].items():
            etag, size = self.hub.describe(repo, revision, path, data)
            lfs = {'size': size, 'sha256': etag, 'pointerSize': 134} if is_lfs(path) else None
            siblings.append({'rfilename': path, 'size': size, 'blobId': sha1(data), 'lfs': lfs})
        gated = 'auto' if found.gated else False
        about = {'id': repo, 'modelId': repo, 'sha': commit, 'private': found.private, 'gated': gated, 'tags': []}
        self.send(200, about | {'siblings': siblings})

    @route('GET', f'{MODEL}/tree/(?P<revision>[^/]+)')
    def tree(self, repo: str, revision: str) -> None:
        """All files, whether asked recursively or not; no folders."""
        found, commit = self.find(repo, revision, content=True)
        entries = []
        for path, data in found.commits[commit].items():
            etag, size = self.hub.describe(repo, revision, path, data)
            lfs = {'lfs': {'oid': etag, 'size': size, 'pointerSize': 134}} if is_lfs(path) else {}
            entries.append({'type': 'file', 'path': path, 'size': size, 'oid': sha1(data), **lfs})
        self.send(200, entries)

    @route('POST', '/api/repos/create')
    def create(self) -> None:
        about, member = self.json(), self.member()
        name = f'{about.get("organization") or "member"}/{about["name"]}'
        if not member:
            raise RefusalError(401 if member is None else 403, None, 'You have no right to create a model here')
        if name in self.hub.repos:
            return self.send(409, {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{name}'})
        private = about.get('private') is True or about.get('visibility') == 'private'
        attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in LFS)
        self.hub.add_repo(name, {'.gitattributes': attributes}, private=private)
        self.send(200, {'url': f'{self.hub.url}/{name}', 'name': name, 'id': name})

    @route('POST', f'{MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)')
    def new_ref(self, repo: str, kind: str, name: str) -> None:
        about = self.json()
        ref, start = (about['tag'], name) if kind == 'tag' else (name, about.get('startingPoint', 'main'))
        found, commit = self.find(repo, start, write=True)
        if ref in found.refs:
            raise RefusalError(409, None, f'Reference already exists: {ref}')
        found.refs[ref] = commit
        self.send(200, {})

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> None:
        match = re.match(r'---\n(.*?)^---$', self.json()['content'], re.DOTALL | re.MULTILINE)
        try:
            valid = match is None or isinstance(yaml.safe_load(match[1]), dict)
        except yaml.YAMLError:
            valid = False
        warnings = [{'message': 'empty or missing yaml metadata in repo card'}] if match is None else []
        errors = [] if valid else [{'message': 'the metadata is no YAML mapping'}]
        self.send(200 if valid else 400, {'errors': errors, 'warnings': warnings})

    @route('POST', f'{MODEL}/preupload/(?P<revision>[^/]+)')
    def preupload(self, repo: str, revision: str) -> None:
        found, commit = self.find(repo, revision, write=True)
        files = []
        for path in (file['path'] for file in self.json()['files']):
            data, mode = found.commits[commit].get(path), 'lfs' if is_lfs(path) else 'regular'
            oid = None if data is None else name_of(path, data)  # the client leaves out what is there already
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        self.send(200, {'files': files})

    @route('POST', rf'{REPO}\.git/info/lfs/objects/batch')
    def batch(self, repo: str) -> None:
        self.find(repo, write=True)
        objects = self.json()['objects']
        for about in objects:
            if about['oid'] not in self.hub.objects:
                about['actions'] = {'upload': {'href': f'{self.hub.cdn_url}/upload/{about["oid"]}?Signature=1'}}
        self.send(200, {'transfer': 'basic', 'objects': objects})

    @route('PUT', '/upload/(?P<oid>[0-9a-f]{64})')
    def upload(self, oid: str) -> None:
        if sha256(self.asked.body) != oid:
            raise RefusalError(400, None, 'The content is not what was announced')
        self.hub.objects[oid] = self.asked.body
        self.send(200)

    @route('POST', f'{MODEL}/commit/(?P<revision>[^/]+)')
    def commit(self, repo: str, revision: str) -> None:
        found, parent = self.find(repo, revision, write=True)
        files = dict(found.commits[parent])
        for key, value in (json.loads(line).values() for line in self.asked.body.splitlines()):
            if key == 'header' and value.get('parentCommit', parent) != parent:
                raise RefusalError(412, None, 'A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.objects:
                    raise RefusalError(400, None, f'LFS pointer to a file that was not uploaded: {value["path"]}')
                files[value['path']] = self.hub.objects[value['oid']]
            elif key == 'deletedFile':
                del files[value['path']]
            elif key == 'deletedFolder':
                prefix = value['path'].rstrip('/') + '/'
                files = {path: data for path, data in files.items() if not path.startswith(prefix)}
        number = sum(ref.startswith('refs/pr/') for ref in found.refs) + 1
        wanted = 'create_pr' in self.asked.query
        oid = found.commit(f'refs/pr/{number}' if wanted else revision, files)
        request = f'{self.hub.url}/{repo}/discussions/{number}' if wanted else None
        url = f'{self.hub.url}/{repo}/commit/{oid}'
        self.send(200, {'success': True, 'commitOid': oid, 'commitUrl': url, 'pullRequestUrl': request})
