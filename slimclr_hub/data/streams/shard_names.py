"""Which tar files a split of webdataset shards consists of, and how many samples each holds."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError

_INFO = ('_info.json', 'info.json')  # timm's names
_META = re.compile(r'__[^/]*__($|/)')  # members that webdataset passes over


def count_samples(path: str) -> int:
    """Samples of a local tar file, from its headers alone.

    Raises:
        InputError: It is not a whole tar file.
    """
    from webdataset.tariterators import base_plus_ext

    count, last = 0, None
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                base, _ = base_plus_ext(member.name)
                if member.isreg() and base is not None and not _META.match(member.name) and base != last:
                    count, last = count + 1, base
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f'cannot read the shard {path}: {error}; fetch it again') from error
    return count


def is_remote(root: str) -> bool:
    """Whether shards are fetched from an address or a command rather than a folder."""
    return '://' in root or root.startswith('pipe:')


def find_shards(root: str, split: str) -> tuple[list[str], tuple[int, ...] | None, int | None]:
    """Shards of a split.

    Args:
        root: Folder or address of the shards.
        split: A pattern with braces, behind which `|` and a number of samples may stand; a split of the root's
            `_info.json`; or, in a folder, a part of the shards' names.

    Returns:
        Their names in the root, the samples of each, which are counted where no file tells them, and the number of
        samples that the pattern tells; null where unknown.

    Raises:
        InputError: There is no such folder or shard, or one cannot be read.
    """
    remote = is_remote(root)
    if not remote and not Path(root).is_dir():
        raise InputError(f'data.root {root} does not exist')
    info = {} if remote else _read_info(Path(root))
    files, total = _find(root, split, info)
    known = _known_lengths(info)
    if all(file in known for file in files):
        return files, tuple(known[file] for file in files), total
    return files, None if remote else tuple(count_samples(f'{root.rstrip("/")}/{file}') for file in files), total


def _find(root: str, split: str, info: dict[str, Any]) -> tuple[list[str], int | None]:
    """Names of the shards and the number of samples, where the pattern tells it."""
    from webdataset.shardlists import expand_urls

    if 'tar' in split or '..' in split:
        pattern, _, total = split.partition('|')
        if total and not total.isdigit():
            raise InputError(f'data.train_split {split}: {total!r} after | is not a number of samples')
        files = expand_urls(pattern)
        missing = [] if is_remote(root) else [file for file in files if not (Path(root) / file).exists()]
        if missing:
            raise InputError(f'data.root {root} has no {missing[0]} ({len(missing)} of {len(files)} are missing)')
        return files, int(total) if total else None
    if split in info.get('splits', {}):
        return list(info['splits'][split]['filenames']), None
    if is_remote(root):
        raise InputError(f'data.train_split {split}: give the pattern of the shards, such as train-{{0000..0123}}.tar')
    return sorted(path.name for path in Path(root).glob(f'*{split}*.tar')), None


def _read_info(root: Path) -> dict[str, Any]:
    for name in _INFO:
        if (root / name).is_file():
            try:
                return dict(json.loads((root / name).read_text()))
            except ValueError as error:
                raise InputError(f'{root / name} is not JSON: {error}') from error
    return {}


def _known_lengths(info: dict[str, Any]) -> dict[str, int]:
    return {
        file: int(length)
        for split in info.get('splits', {}).values()
        for file, length in zip(split['filenames'], split['shard_lengths'], strict=True)
    }
