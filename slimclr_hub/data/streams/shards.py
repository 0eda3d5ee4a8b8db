"""Sharded sources that are read in order: their interface, and tar files in webdataset's layout."""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from slimclr_hub.data.config import DataConfig
from slimclr_hub.errors import DataError, InputError

_IMAGES = 'jpg;jpeg;png;webp'
_INFO = ('_info.json', 'info.json')  # timm's names
_META = re.compile(r'__[^/]*__($|/)')  # members that webdataset skips


@dataclass(frozen=True)
class Raw:
    """A sample as it is stored.

    Args:
        name: Name in messages.
        payload: Encoded content, which the source decodes.
    """

    name: str
    payload: Any


class Shards(Protocol):
    """A sharded source.

    Args:
        count: Number of shards.
        lengths: Samples of each, if known.
        total: Samples an epoch, if known.
    """

    count: int
    lengths: tuple[int, ...] | None
    total: int | None

    def name(self, shard: int) -> str:
        """Return the name of a shard for messages."""

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield encoded samples of a shard in stored order."""

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Decode image and label, -1 where there is none; exceptions of the decoder pass through."""


class TarShards:
    """Tar files as webdataset writes them: members of one base name are one sample.

    Args:
        config: `root` is the folder or address of the shards; `train_split` is their pattern with braces, a split of
            the root's `_info.json`, or, in a folder, a part of their names.

    Raises:
        InputError: There are no such shards, or one cannot be read, or its first sample has no image.
    """

    def __init__(self, config: DataConfig) -> None:
        if config.root is None:
            raise InputError(f'data.name {config.name} needs data.root')
        self.image_keys = tuple((config.image_key or _IMAGES).split(';'))
        self.label_key = config.label_key
        files, lengths, total = find_shards(config.root, config.train_split)
        if not files:
            raise InputError(f'data.root {config.root} has no shard that matches data.train_split {config.train_split}')
        self.paths = [f'{config.root.rstrip("/")}/{file}' for file in files]
        self.count = len(files)
        self.lengths = lengths
        self.total = config.num_samples or total
        self._check_first(config)

    def name(self, shard: int) -> str:
        """Return the address of a shard."""
        return self.paths[shard]

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield samples of a tar file."""
        import webdataset

        path = self.paths[shard]
        try:
            for sample in webdataset.tariterators.tarfile_samples([{'url': path}]):
                yield Raw(f'{path}/{sample["__key__"]}', sample)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f'cannot read {path}: {error.args[0]}; fetch the shard again') from error

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Decode image and label of a sample."""
        image = next((raw.payload[key] for key in self.image_keys if key in raw.payload), None)
        if image is None:
            raise KeyError(f'no member {" or ".join(self.image_keys)}')
        if self.label_key is not None:
            return Image.open(BytesIO(image)), int(json.loads(raw.payload['json'])[self.label_key])
        return Image.open(BytesIO(image)), int(raw.payload.get('cls', -1))

    def _check_first(self, config: DataConfig) -> None:
        # Else every image of the epoch would turn out to be unreadable, in the middle of it.
        first = next((raw.payload for raw in self.read(0)), None)
        where = f'{self.paths[0]}: the first sample'
        if first is None:
            raise InputError(f'{self.paths[0]} holds no samples')
        members = [key for key in first if not key.startswith('__')]
        if not any(key in first for key in self.image_keys):
            raise InputError(f'{where} has {", ".join(members)}; data.image_key is {config.image_key}')
        if config.label_key is not None and config.label_key not in json.loads(first.get('json', '{}')):
            raise InputError(f'{where} has no {config.label_key} in its json; data.label_key names a field of it')


def count_samples(path: str) -> int:
    """Count the samples of a local tar file from its headers alone.

    Raises:
        InputError: It is not a complete tar file.
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
    """True if shards are fetched from an address or a command rather than a folder."""
    return '://' in root or root.startswith('pipe:')


def find_shards(root: str, split: str) -> tuple[list[str], tuple[int, ...] | None, int | None]:
    """Find the shards of a split and their lengths.

    Args:
        root: Folder or address of the shards.
        split: A pattern with braces, optionally followed by `|` and a number of samples; a split of the root's
            `_info.json`; or, in a folder, a part of the shards' names.

    Returns:
        Their names in the root; the number of samples of each, counted where no file gives it; and the number of
        samples in the pattern. Unknown numbers are None.

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
    """Find names of shards, and the number of samples where the pattern gives it."""
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
