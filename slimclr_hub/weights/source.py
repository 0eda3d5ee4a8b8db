"""Sources of a network's weights: the package, a file, the Hub, or the authors' release.

A file of the release is converted once and kept as safetensors. Of a repository with weights in parts, the path is that
of their index, and `open_weights` reads it like a file.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from huggingface_hub import (
    cached_assets_path,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash, git_hash
from slimclr_hub.text import first_line
from slimclr_hub.version import __version__
from slimclr_hub.weights.bounded import (
    LARGEST_CONFIG,
    SECONDS,
    SECONDS_FOR_CONFIG,
    BoundedProgress,
    TooLateError,
    in_time,
)
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.progressive import FOLDER, INDEX, Index, Part, PartFiles, read_index
from slimclr_hub.weights.published import (
    AUTHORS_REPOSITORY,
    ORGANISATION,
    PUBLISHED,
    RELEASE,
    RELEASE_URL,
    Published,
    Shipped,
    hub_name,
)
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

WEIGHTS = 'model.safetensors'
_SMALL = ('config.json', INDEX)
PICKLED_WEIGHTS = 'pytorch_model.bin'
"""Name of the weights that timm's `save_for_hf` writes by default."""

Answer = TypeVar('Answer')
Convert = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]

_OWN_FILE = (
    'A file of your own is loaded by pretrained_cfg_overlay=dict(file=PATH); `slimclr-hub convert` makes one out of '
    "the authors' checkpoint"
)
_ATTEMPTS = 3
_SECONDS_TO_CONNECT = 3
_ACCEPT = 'SLIMCLR_ACCEPT_RELEASE'
_HASHES = ('sha256', 'sha1', 'md5')
_HASH_OF_THE_HUB = re.compile(r'[0-9a-f]{64}|[0-9a-f]{40}')
_logger = logging.getLogger(__name__)


class NotOnHubError(InputError):
    """The Hub has no such repository, or cannot be reached."""


class NoFileError(InputError):
    """A repository has no such file."""


def open_weights(path: Path, width: float) -> TensorFile | PartFiles:
    """Open a safetensors file, or an index with its parts up to `width`, which are downloaded if need be.

    Raises:
        InputError: It cannot be read, or a part cannot be had; see `_fetch_parts`.
    """
    if path.name == Path(INDEX).name:
        index = _index(path)
        return PartFiles(path, index.widths, _fetch_parts(path, index, width))
    return TensorFile(path)


def from_file(path: Path) -> Path:
    """Find a weights file by its own name or by that of its folder, as timm writes one.

    Raises:
        InputError: It does not exist.
    """
    candidates = [path / WEIGHTS, path / PICKLED_WEIGHTS] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise InputError(f'{candidates[0]} does not exist' + (f'; {path} has no {WEIGHTS}' if path.is_dir() else ''))
    _logger.info('Weights from the file %s', file)
    return file


def from_package(network: Shipped) -> Path:
    """Find the weights of a network that the package ships.

    Raises:
        InputError: The file is missing or is another.
    """
    if not network.weights.is_file() or file_hash(network.weights) != network.sha256:
        raise InputError(f'{network.weights} is missing or damaged; install slimclr-hub again')
    _logger.info('Weights from the package: %s', network.weights)
    return network.weights


# The Hub


def from_hub(repo: str, filename: str = WEIGHTS, cache_dir: Path | None = None) -> Path:
    """Download a file of a repository on the Hub, unless it is in huggingface_hub's cache, or `cache_dir` if given.

    Endpoint, token, cache and offline mode are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`,
    `HF_HUB_OFFLINE`). `repo` is `account/name`, or `account/name@revision`. Weights are checked against the hash that
    the Hub names, once, and nothing outside the cache is ever removed. It ends in the time of `weights.bounded`.

    Raises:
        NotOnHubError: There is no such repository, or the Hub cannot be reached and the cache lacks the file.
        InputError: Access is refused, there is no such file or revision, the weights are not safetensors, or they are
            not what the Hub announced.
    """
    if filename not in _SMALL and not filename.endswith('.safetensors'):
        raise InputError(f'{filename} of {repo} is not loaded; only safetensors are, from the Hub')
    name, _, revision = repo.partition('@')
    with _in_our_words(repo, filename):
        path = _download(name, filename, revision or None, cache_dir)
    _check_place(path, repo, filename)
    if filename == 'config.json':
        if path.stat().st_size > LARGEST_CONFIG:
            raise InputError(f'{filename} of {repo} has {path.stat().st_size} bytes, more than {LARGEST_CONFIG}')
        return path
    _check_hash(path, repo, cache_dir or Path(constants.HF_HUB_CACHE))
    if not filename.startswith(FOLDER):
        _logger.info('Weights from the Hub: %s, %s', repo, path)
    return path


@contextmanager
def _in_our_words(repo: str, filename: str) -> Iterator[None]:
    """Turn errors of huggingface_hub about a file into those of `from_hub`."""
    name, _, revision = repo.partition('@')
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f'{repo} on the Hub is gated: accept its conditions there, then `hf auth login`') from None
    except errors.RevisionNotFoundError:
        raise InputError(f'{name} on the Hub has no revision {revision or "main"}') from None
    except errors.RepositoryNotFoundError:
        raise NotOnHubError(
            f'the Hub has no {name}, or does not show it to you: check the name, and for a private one `hf auth login`'
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise NotOnHubError(f'offline (HF_HUB_OFFLINE), and the cache has no {filename} of {repo}') from None
        raise NotOnHubError(
            f'the Hub cannot be reached for {repo}, and the cache has no {filename}: {first_line(error.__cause__)}'
        ) from None
    except errors.EntryNotFoundError:
        raise NoFileError(f'{repo} on the Hub has no {filename}; only safetensors are loaded') from None
    except errors.HFValidationError as error:
        raise InputError(f'{repo!r} is not the name of a repository on the Hub, account/name: {error}') from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = '; check your token, or `hf auth login`' if status == 401 else ''
        raise InputError(f'{repo}: the Hub answered {status} ({error.server_message}){remedy}') from None
    except (OSError, RuntimeError) as error:  # hf_xet has no classes of its own for most errors
        raise InputError(f'the download of {filename} of {repo} failed: {first_line(error)}') from None
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise NotOnHubError(f'the Hub cannot be reached for {repo}: {first_line(error)}') from None


def _download(repo: str, filename: str, revision: str | None, cache_dir: Path | None) -> Path:
    library: dict[str, Any] = {'library_name': 'slimclr_hub', 'library_version': __version__}
    download = partial(
        hf_hub_download, repo, filename, revision=revision, cache_dir=cache_dir, tqdm_class=BoundedProgress, **library
    )
    cached = isinstance(try_to_load_from_cache(repo, filename, cache_dir, revision), str)

    def fetch() -> str:
        if not constants.HF_HUB_OFFLINE and not cached:
            _check_connection(constants.ENDPOINT)
        return with_retries(download)

    try:
        return Path(in_time(fetch, SECONDS_FOR_CONFIG if filename in _SMALL else SECONDS))
    except Exception as error:
        if not is_transport_error(error):
            raise
        # The client looks into the cache when the Hub is away, but not when it hangs up.
        with suppress(errors.LocalEntryNotFoundError):
            return Path(download(local_files_only=True))
        raise


def _check_connection(url: str) -> None:
    # The client would try again for half a minute where there is no network at all, and print each attempt.
    try:
        get_session().head('/'.join(url.split('/')[:3]), timeout=_SECONDS_TO_CONNECT)
    except Exception as error:
        if is_transport_error(error) and type(error).__name__ in ('ConnectError', 'ConnectTimeout'):
            raise


def _check_place(path: Path, repo: str, filename: str) -> None:
    # The client names a file by the hash that the Hub tells, which may be a path of any kind.
    blobs = path.parents[1 + len(Path(filename).parts)] / 'blobs'  # beside snapshots/COMMIT/FILE
    if path.is_symlink() and os.path.normpath(path.parent / path.readlink().parent) != os.path.normpath(blobs):
        file = os.path.normpath(path.parent / path.readlink())
        raise InputError(f'{path.name} of {repo}: by its hash the Hub has put it in {file}, outside of the cache')


def _check_hash(path: Path, repo: str, root: Path, known: str | None = None) -> None:
    # The client compares sizes only. A file is a link to one named by its hash: its sha256, or git's where git has the
    # file itself. That is hashed once; behind it there may be another link, to where repositories share files.
    blob, announced = path, known
    if path.is_symlink():
        blob = path.parent / path.readlink()
        announced = blob.name.lower()
        if not _HASH_OF_THE_HUB.fullmatch(announced):
            raise InputError(f'{path.name} of {repo}: the Hub names no hash of it but {blob.name!r}; nothing is loaded')
        if known not in (None, announced):
            problem = f'{path.name} of {repo} has the hash {announced}, not {known} as the index says'
            raise InputError(f'{problem}; {_whole_instead(repo)}')
    if announced is None:
        return  # a file system without links, where the client keeps no hash
    checked = None
    with suppress(OSError):  # a cache that is only readable
        checked = cached_assets_path('slimclr_hub', 'checked') / announced
    # A file that was downloaded again since is another one.
    if checked and checked.is_file() and checked.stat().st_mtime_ns >= blob.stat().st_mtime_ns:
        return
    kind = 'sha256' if len(announced) == 64 else 'sha1'
    found = file_hash(blob) if kind == 'sha256' else git_hash(blob)
    if found != announced:
        files = {path: None, blob: None, blob.resolve(): None}
        inside = [file for file in files if file.parent.resolve().is_relative_to(root.resolve())]
        for file in inside:
            file.unlink(missing_ok=True)
        done = 'it was deleted' if len(inside) == len(files) else f'{blob.resolve()} is outside of the cache and stays'
        raise InputError(f'{path.name} of {repo} has the {kind} {found}, not {announced} as the Hub says; {done}')
    if checked:
        with suppress(OSError):
            checked.touch()


# Weights in parts


def weights_from_hub(repo: str, width: float, cache_dir: Path | None = None) -> Path:
    """Find the weights of a repository on the Hub for a network that needs none wider than `width`.

    It is the whole file if the cache has it or all of it is needed; else the index of its parts, if it has parts, of
    which those up to `width` are in the cache then; else the whole file. Arguments and errors are those of `from_hub`.
    """
    name, _, revision = repo.partition('@')
    with _in_our_words(repo, WEIGHTS):
        whole = try_to_load_from_cache(name, WEIGHTS, cache_dir, revision or None)
    if width < 1.0 and not isinstance(whole, str):
        path = None
        with suppress(NoFileError, NotOnHubError):  # looking for the whole file says more
            path = from_hub(repo, INDEX, cache_dir)
        if path is not None and _serves(path, index := _index(path), width):
            _fetch_parts(path, index, width)
            _logger.info('Weights from the Hub: %s, the parts up to width %g of %s', repo, width, path)
            return path
    return from_hub(repo, cache_dir=cache_dir)


def _fetch_parts(path: Path, index: Index, width: float) -> list[Path]:
    """Find the parts up to `width` of the index at `path` in huggingface_hub's cache, downloaded if need be.

    They are those of the index's own commit. Sizes and hashes are compared with the index's: before a download as the
    Hub announces them, and after it those of the files.

    Raises:
        NotOnHubError: The cache lacks a part, and the Hub cannot be reached.
        InputError: A part is missing, not what the index says, or cannot be downloaded.
    """
    repo, cache = _place_in_cache(path)
    return [_part(repo, part, path.parent / part.file, cache) for part in index.up_to(width)]


def _index(path: Path) -> Index:
    try:
        return read_index(path)
    except InputError as error:
        raise InputError(f'{error}; {_whole_instead(_place_in_cache(path)[0])}') from None


def _serves(path: Path, index: Index, width: float) -> bool:
    """True if an index has the width, and its parts are those of the weights beside it, which others may replace."""
    repo, _ = _place_in_cache(path)
    parts = index.up_to(width)
    if not parts or parts[-1].width != width:
        return False
    if constants.HF_HUB_OFFLINE or all((path.parent / part.file).is_file() for part in parts):
        return True  # this was asked when the first was downloaded
    if _announced_file(repo, WEIGHTS)[1] == index.sha256:
        return True
    _logger.warning('%s: the parts in %s/ are of other weights than %s, which is read instead', repo, FOLDER, WEIGHTS)
    return False


def _part(repo: str, part: Part, path: Path, cache: Path) -> Path:
    filename = f'{FOLDER}/{part.file}'
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            remedy = f'`slimclr-hub fetch hf-hub:{repo} --width {part.width:g}` fetches it while online'
            raise NotOnHubError(f'offline (HF_HUB_OFFLINE), and the cache has no {filename} of {repo}; {remedy}')
        try:
            size, digest = _announced_file(repo, filename)
        except NoFileError:
            raise InputError(f'{repo} on the Hub has no {filename}; {_whole_instead(repo)}') from None
        if (size, digest) != (part.size, part.sha256):
            text = f'{filename} of {repo} has {size} bytes and the hash {digest}'
            wrong = f'not {part.size} and {part.sha256} as the index says'
            raise InputError(f'{text}, {wrong}; {_whole_instead(repo)}')
        from_hub(repo, filename, cache)
    _check_place(path, repo, filename)
    _check_hash(path, repo, cache, part.sha256)
    return path


def _whole_instead(repo: str) -> str:
    return f'`slimclr-hub fetch hf-hub:{repo}` takes the whole file instead'


def _place_in_cache(index: Path) -> tuple[str, Path]:
    """The repository and commit that an index is of, and the cache that it is in."""
    try:
        snapshots, folder = index.parents[2], index.parents[3]
    except IndexError:
        snapshots = folder = index
    kind, _, name = folder.name.partition('--')
    if snapshots.name != 'snapshots' or kind != 'models':
        raise InputError(f"{index} is not in huggingface_hub's cache, where weights in parts are read from")
    return f'{name.replace("--", "/")}@{index.parents[1].name}', folder.parent


def _announced_file(repo: str, filename: str) -> tuple[int | None, str | None]:
    name, _, revision = repo.partition('@')
    url = hf_hub_url(name, filename, revision=revision)

    def ask() -> tuple[int | None, str | None]:
        _check_connection(constants.ENDPOINT)
        about = with_retries(partial(get_hf_file_metadata, url))
        return about.size, about.etag

    with _in_our_words(repo, filename):
        return in_time(ask, SECONDS_FOR_CONFIG)


# Published networks, and the authors' release


def published(tag: str, convert: Convert, cache_dir: Path | None = None, width: float = 1.0) -> Path:
    """Find the weights of the published network `tag`: on the Hub, or where it has none, in the authors' release.

    `convert` gives the authors' tensors this package's names, and checks them; `cache_dir` is another cache. Wider
    tensors than those of `width` are not needed.

    Raises:
        InputError: Neither has it; the message says why.
    """
    network = PUBLISHED[tag]
    repo = hub_name(tag, os.environ.get('SLIMCLR_HUB_ORG', ORGANISATION))
    try:
        return weights_from_hub(repo, width, cache_dir)
    except NotOnHubError as error:
        reason = str(error)
    path = _release_folder(network, cache_dir) / WEIGHTS
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise InputError(f'{reason}. {_OWN_FILE}')
        try:
            path = from_release(network, convert, cache_dir)
        except InputError as error:
            raise InputError(f'{error}; before that, {reason}. {_OWN_FILE}') from None
    _logger.info("Weights from the authors' release, converted: %s (%s)", path, reason)
    return path


def from_release(network: Published, convert: Convert, cache_dir: Path | None = None) -> Path:
    """Download and convert a file of the authors' release, unless the result is in the cache.

    An interrupted download is resumed. Processes that start at once wait for the one that downloads. Arguments are as
    in `published`; the cache is huggingface_hub's of assets.

    Raises:
        InputError: Offline, not found, or the file is not what it should be.
    """
    folder = _release_folder(network, cache_dir)
    target = folder / WEIGHTS
    with WeakFileLock(folder / '.lock'):
        if not target.is_file():
            source = folder / f'{network.file}.incomplete'
            resumed = source.is_file()
            _download_release(network, source)
            if resumed and not _hash_fits(network.file, source):
                # The beginning that was there may have been another file's.
                source.unlink()
                _download_release(network, source)
            if not _hash_fits(network.file, source):
                if os.environ.get(_ACCEPT) != '1':
                    found = file_hash(source)
                    source.unlink()
                    raise InputError(
                        f'{network.file}: its name ends in the beginning of none of its hashes ({", ".join(_HASHES)}; '
                        f'the sha256 is {found}); it was deleted, and {_ACCEPT}=1 in the environment accepts it'
                    )
                _logger.warning('%s: its name ends in none of its hashes (%s)', network.file, ', '.join(_HASHES))
            try:
                tensors = convert(read_checkpoint(source))
            except InputError as error:
                source.unlink()  # resuming would not help
                raise InputError(f'{network.file} of {AUTHORS_REPOSITORY}: {error}') from None
            save_tensors(tensors, target)
            source.unlink()
    return target


def _release_folder(network: Published, cache_dir: Path | None) -> Path:
    try:
        return cached_assets_path('slimclr_hub', f'release-{RELEASE}', network.tag, assets_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise InputError(f'{network.name}: its folder in the cache cannot be made ({error})') from None


def _download_release(network: Published, path: Path) -> None:
    url = f'{os.environ.get("SLIMCLR_RELEASE_URL", RELEASE_URL).rstrip("/")}/{network.file}'
    if constants.HF_HUB_OFFLINE:
        raise InputError(f'{network.name}: offline (HF_HUB_OFFLINE) and not in the cache; load it once while online')
    size = None
    try:
        size = in_time(partial(_announced, url), SECONDS_FOR_CONFIG)
        text = '%s: from the release of the authors, %s. It is converted once and kept in %s'
        _logger.warning(text, network.name, url, path.parent)
        if path.is_symlink() or (size is not None and path.is_file() and path.stat().st_size > size):
            path.unlink()  # never written through a link of that name
        with path.open('ab') as file:
            in_time(partial(with_retries, partial(_append, url, file, size, network.file)))
    except errors.HfHubHTTPError as error:
        raise InputError(f'{network.name}: {url} answered {error.response.status_code}') from None
    except errors.OfflineModeIsEnabled:
        raise InputError(f'{network.name}: offline and not in the cache') from None
    except OSError as error:
        if size is not None and path.is_file() and path.stat().st_size > size:
            path.unlink()
        raise InputError(
            f'{network.name}: the download of {url} stopped early; try again to go on ({first_line(error)})'
        ) from None
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise InputError(f'{network.name}: {url} cannot be reached ({first_line(error)})') from None


def _append(url: str, file: BinaryIO, size: int | None, name: str) -> None:
    start = file.seek(0, os.SEEK_END)
    http_get(url, file, resume_size=start, expected_size=size, displayed_filename=name, tqdm_class=BoundedProgress)


def _announced(url: str) -> int | None:
    _check_connection(url)
    return with_retries(partial(_size, url))


def _size(url: str) -> int | None:
    response = get_session().head(url, follow_redirects=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    hf_raise_for_status(response)
    length = response.headers.get('Content-Length')
    return int(length) if length else None


def _hash_fits(name: str, path: Path) -> bool:
    # The authors end a file's name in the beginning of a hash, and do not say of which kind.
    match = re.search(r'[-_]([0-9a-f]{8,10})\.pth', name)
    assert match, name
    return any(file_hash(path, kind).startswith(match[1]) for kind in _HASHES)


# Failures of the network


def is_transport_error(error: Exception) -> bool:
    """True if no answer came, or not all of it: refused, cut off, timed out or too late."""
    # huggingface_hub uses httpx or httpx2, depending on its version; their classes share no base.
    library = type(error).__module__.partition('.')[0]
    return isinstance(error, TooLateError) or library in ('requests', 'httpx', 'httpx2', 'httpcore')


def with_retries(call: Callable[[], Answer]) -> Answer:
    """Call again, after a second and after two, if the server has a problem of its own (5xx)."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            _logger.info('%s; trying again', first_line(error))
            time.sleep(attempt)
    return call()
