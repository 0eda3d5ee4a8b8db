"""The authors' own files: downloaded from their release, checked, converted once and kept as safetensors."""

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.text import first_line
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.convert import convert
from slimclr_hub.weights.network import is_transport_error, with_retries
from slimclr_hub.weights.published import AUTHORS_REPOSITORY, RELEASE, RELEASE_URL, Published
from slimclr_hub.weights.tensor_file import save_tensors

_logger = logging.getLogger(__name__)
_HASHES = ('sha256', 'sha1', 'md5')


def cached(published: Published, cache_dir: Path | None = None) -> Path | None:
    """The converted file, if it is in the cache."""
    path = _folder(published, cache_dir) / 'model.safetensors'
    return path if path.is_file() else None


def fetch(published: Published, cache_dir: Path | None = None) -> Path:
    """The converted file, downloaded and converted if it is not in the cache.

    An interrupted download goes on where it stopped. Processes that start at once wait for the one that downloads.

    Args:
        published: The network.
        cache_dir: Where to keep it instead of huggingface_hub's cache of assets.

    Raises:
        InputError: Offline, not found, or the file is not what it should be.
    """
    folder = _folder(published, cache_dir)
    target = folder / 'model.safetensors'
    with WeakFileLock(folder / '.lock'):
        if not target.is_file():
            source = folder / f'{published.file}.incomplete'
            resumed = source.is_file()
            _download(published, source)
            if resumed and not _hash_fits(published.file, source):
                # What it went on from may not have been its own beginning.
                source.unlink()
                _download(published, source)
            if not _hash_fits(published.file, source):
                _logger.warning('%s: its name ends in none of its hashes (%s)', published.file, ', '.join(_HASHES))
            try:
                tensors = convert(read_checkpoint(source))
            except InputError as error:
                source.unlink()  # going on with it would not help
                raise InputError(f'{published.file} of {AUTHORS_REPOSITORY}: {error}') from error
            save_tensors(tensors, target)
            source.unlink()
    return target


def _folder(published: Published, cache_dir: Path | None) -> Path:
    try:
        return cached_assets_path('slimclr_hub', f'release-{RELEASE}', published.tag, assets_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise InputError(f'{published.name}: its folder in the cache cannot be made ({error})') from error


def _url(published: Published) -> str:
    return f'{os.environ.get("SLIMCLR_RELEASE_URL", RELEASE_URL).rstrip("/")}/{published.file}'


def _download(published: Published, path: Path) -> None:
    url = _url(published)
    if constants.HF_HUB_OFFLINE:
        raise InputError(f'{published.name}: offline (HF_HUB_OFFLINE) and not in the cache; load it once while online')
    _logger.warning(
        '%s: from the release of the authors, %s. It is converted once and kept in %s', published.name, url, path.parent
    )
    size = None
    try:
        size = with_retries(partial(_size, url))
        if size is not None and path.is_file() and path.stat().st_size > size:
            path.unlink()
        with path.open('ab') as file:
            with_retries(partial(_append, url, file, size, published.file))
    except HfHubHTTPError as error:
        raise InputError(f'{published.name}: {url} answered {error.response.status_code}') from error
    except OfflineModeIsEnabled as error:
        raise InputError(f'{published.name}: offline and not in the cache') from error
    except OSError as error:
        if size is not None and path.is_file() and path.stat().st_size > size:
            path.unlink()
        raise InputError(
            f'{published.name}: the download of {url} stopped early; try again to go on ({first_line(error)})'
        ) from error
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise InputError(f'{published.name}: {url} cannot be reached ({first_line(error)})') from error


def _append(url: str, file: BinaryIO, size: int | None, name: str) -> None:
    # What an earlier download left is there already.
    http_get(url, file, resume_size=file.seek(0, os.SEEK_END), expected_size=size, displayed_filename=name)


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
