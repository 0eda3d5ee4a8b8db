"""Where a network's weights come from: a file, the Hub, or the authors' release."""

import logging
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import cached_assets_path, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.text import first_line
from slimclr_hub.version import __version__
from slimclr_hub.weights import release
from slimclr_hub.weights.network import is_transport_error, with_retries
from slimclr_hub.weights.published import ORGANISATION, PUBLISHED, hub_name

WEIGHTS = 'model.safetensors'
_logger = logging.getLogger(__name__)
_SHA256 = re.compile(r'[0-9a-f]{64}')


class NotOnHubError(InputError):
    """The Hub has no such repository, or cannot be reached."""


def from_file(path: Path) -> Path:
    """A weights file by its name, or the one in a folder that timm opens.

    Raises:
        InputError: It does not exist.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f'{file} does not exist' + (f'; {path} has no {WEIGHTS}' if path.is_dir() else ''))
    _logger.info('Weights from the file %s', file)
    return file


def from_hub(repo: str, filename: str = WEIGHTS, cache_dir: Path | None = None) -> Path:
    """A file of a repository on the Hub, downloaded unless it is in huggingface_hub's cache.

    Endpoint, token, cache and offline mode are those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`,
    `HF_HUB_OFFLINE`). What was downloaded is held against the Hub's sha256.

    Args:
        repo: `account/name`, or `account/name@revision`.
        filename: The file in it.
        cache_dir: Another cache.

    Raises:
        NotOnHubError: There is no such repository, or neither the Hub can be reached nor has the cache the file.
        InputError: Access is refused, there is no such file or revision, or the file is not what the Hub announced.
    """
    name, _, revision = repo.partition('@')
    try:
        path = _download(name, filename, revision or None, cache_dir)
    except GatedRepoError as error:
        raise InputError(f'{repo} on the Hub is gated: accept its conditions there, then `hf auth login`') from error
    except RevisionNotFoundError as error:
        raise InputError(f'{name} on the Hub has no revision {revision or "main"}') from error
    except RepositoryNotFoundError as error:
        raise NotOnHubError(
            f'the Hub has no {name}, or does not show it to you: check the name, and for a private one `hf auth login`'
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise NotOnHubError(f'offline (HF_HUB_OFFLINE), and the cache has no {filename} of {repo}') from error
        raise NotOnHubError(
            f'the Hub cannot be reached for {repo}, and the cache has no {filename}: {first_line(error.__cause__)}'
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f'{repo} on the Hub has no {filename}; only safetensors are loaded') from error
    except HFValidationError as error:
        raise InputError(f'{repo!r} is not the name of a repository on the Hub, account/name: {error}') from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = '; check your token, or `hf auth login`' if status == 401 else ''
        raise InputError(f'{repo}: the Hub answered {status} ({error.server_message}){remedy}') from error
    except (OSError, RuntimeError) as error:  # hf_xet has no classes of its own for most errors
        raise InputError(f'the download of {filename} of {repo} failed: {first_line(error)}') from error
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise NotOnHubError(f'the Hub cannot be reached for {repo}: {first_line(error)}') from error
    _check_hash(path, repo)
    if filename != 'config.json':
        _logger.info('Weights from the Hub: %s, %s', repo, path)
    return path


def published(tag: str, cache_dir: Path | None = None) -> Path:
    """The weights of a published network: from the Hub, or where it has none, from the authors' release.

    Args:
        tag: Its tag, a key of `PUBLISHED`.
        cache_dir: Another cache.

    Raises:
        InputError: Neither has it; the message says why.
    """
    repo = hub_name(tag, os.environ.get('SLIMCLR_HUB_ORG', ORGANISATION))
    try:
        return from_hub(repo, cache_dir=cache_dir)
    except NotOnHubError as error:
        path = release.cached(PUBLISHED[tag], cache_dir)
        if path is None:
            if constants.HF_HUB_OFFLINE:
                raise
            _logger.info('%s', error)
            try:
                path = release.fetch(PUBLISHED[tag], cache_dir)
            except InputError as second:
                raise InputError(f'{second}; before that, {error}') from second
        _logger.info("Weights from the authors' release, converted: %s (%s)", path, error)
        return path


def _download(repo: str, filename: str, revision: str | None, cache_dir: Path | None) -> Path:
    download = partial(
        hf_hub_download,
        repo,
        filename,
        revision=revision,
        cache_dir=cache_dir,
        library_name='slimclr_hub',
        library_version=__version__,
    )
    try:
        return Path(with_retries(download))
    except Exception as error:
        if not is_transport_error(error):
            raise
        # The client looks into the cache when the Hub is away, but not when it hangs up.
        with suppress(LocalEntryNotFoundError):
            return Path(download(local_files_only=True))
        raise


def _check_hash(path: Path, repo: str) -> None:
    # The client compares sizes only. A large file is a link to one named by its sha256, which is hashed once; behind
    # that there may be another link, to where repositories share files by another hash.
    if not path.is_symlink():
        return
    blob = path.parent / path.readlink()
    if not _SHA256.fullmatch(blob.name):
        return
    checked = None
    with suppress(OSError):  # a cache that is only readable
        checked = cached_assets_path('slimclr_hub', 'checked') / blob.name
    # What was downloaded again since is another file.
    if checked and checked.is_file() and checked.stat().st_mtime_ns >= blob.stat().st_mtime_ns:
        return
    found = file_hash(blob)
    if found != blob.name:
        for file in (path, blob, blob.resolve()):
            file.unlink(missing_ok=True)
        raise InputError(
            f'{path.name} of {repo} has the sha256 {found}, not {blob.name} as the Hub says; it was deleted'
        )
    if checked:
        with suppress(OSError):
            checked.touch()
