"""Sharded sources that are read in order: tar files in webdataset's layout, and streamed data sets of the Hub."""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from slimclr_hub.data.config import DataConfig
from slimclr_hub.errors import DataError, InputError

_IMAGES = 'jpg;jpeg;png;webp'
_INFO = ('_info.json', 'info.json')  # timm's names
_META = re.compile(r'__[^/]*__($|/)')  # members that webdataset skips
_ROWS = 32  # of a Hub data set, read at a time; they are encoded images
_THREADS = 16  # they wait for the network


class Raw(NamedTuple):
    """A stored sample: its name in messages, and the decoder of its image and label, -1 where there is none."""

    name: str
    decode: Callable[[], tuple[Image.Image, int]]


class Shards(Protocol):
    """A sharded source: the address of each shard, the samples of each and those of an epoch, if known."""

    names: list[str]
    lengths: tuple[int, ...] | None
    total: int | None

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield encoded samples of a shard in stored order."""


class TarShards:
    """Tar files as webdataset writes them: members of one base name are one sample.

    Args:
        config: `root` is the folder or address of the shards; `train_split` is their pattern with braces, a split of
            the root's `_info.json`, or, in a folder, a part of their names.

    Raises:
        InputError: There are no such shards, or one cannot be read, or its first sample has no image.
    """

    def __init__(self, config: DataConfig) -> None:
        root = config.required_root()
        self.image_keys = tuple((config.image_key or _IMAGES).split(';'))
        self.label_key = config.label_key
        files, self.lengths, total = find_shards(root, config.train_split)
        if not files:
            raise InputError(f'data.root {root} has no shard that matches data.train_split {config.train_split}')
        self.names = [f'{root.rstrip("/")}/{file}' for file in files]
        self.total = config.num_samples or total
        self._check_first(config)

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield samples of a tar file."""
        for sample in self._samples(self.names[shard]):
            yield Raw(f'{self.names[shard]}/{sample["__key__"]}', partial(self._decode, sample))

    def _samples(self, path: str) -> Iterator[dict[str, Any]]:
        import webdataset

        try:
            yield from webdataset.tariterators.tarfile_samples([{'url': path}])
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f'cannot read {path}: {error.args[0]}; fetch the shard again') from error

    def _decode(self, sample: dict[str, Any]) -> tuple[Image.Image, int]:
        image = next((sample[key] for key in self.image_keys if key in sample), None)
        if image is None:
            raise KeyError(f'no member {" or ".join(self.image_keys)}')
        label = sample.get('cls', -1) if self.label_key is None else json.loads(sample['json'])[self.label_key]
        return Image.open(BytesIO(image)), int(label)

    def _check_first(self, config: DataConfig) -> None:
        # Else every image of the epoch would turn out to be unreadable, in the middle of it.
        first = next(self._samples(self.names[0]), None)
        if first is None:
            raise InputError(f'{self.names[0]} holds no samples')
        where = f'{self.names[0]}: the first sample'
        if not any(key in first for key in self.image_keys):
            members = ', '.join(key for key in first if not key.startswith('__'))
            raise InputError(f'{where} has {members}; data.image_key is {config.image_key}')
        if config.label_key is not None and config.label_key not in json.loads(first.get('json', '{}')):
            raise InputError(f'{where} has no {config.label_key} in its json; data.label_key names a field of it')


class HubShards:
    """A data set of the Hub (`hfids/USER/NAME`) or a local folder in one of its formats (`hfids//FOLDER`), as a stream.

    Raises:
        InputError: There is no such data set, split or column.
    """

    def __init__(self, config: DataConfig) -> None:
        import datasets

        name = config.name.removeprefix('hfids/')
        where = f'data.name {config.name}, split {config.train_split}'
        try:
            builder = datasets.load_dataset_builder(name, cache_dir=config.root)
            self.stream = builder.as_streaming_dataset(split=config.train_split)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f'{where}: {str(error) or "not found"}') from error
        columns = self.stream.column_names or list(next(iter(self.stream.take(1)), {}))
        self.image_key = config.image_key or 'image'
        self.label_key = config.label_key or ('label' if 'label' in columns else None)
        for key, column in ('image_key', self.image_key), ('label_key', self.label_key):
            if column is not None and column not in columns:
                raise InputError(f'{where}: no column {column}, data.{key}; there are {", ".join(columns)}')
        # Decoded by ourselves: what is skipped needs not be decoded, and what cannot be must not end the stream.
        self.image = datasets.Image()
        self.stream = self.stream.cast_column(self.image_key, datasets.Image(decode=False))
        files = [str(file) for file in (builder.config.data_files or {}).get(config.train_split, ())]
        count = self.stream.num_shards
        self.names = files if len(files) == count else [f'shard {shard}' for shard in range(count)]
        self.lengths = _parquet_lengths(self.names)
        info = (builder.info.splits or {}).get(config.train_split)
        self.total = config.num_samples or (info.num_examples if info else None)

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield rows of a file."""
        rows = self.stream.shard(len(self.names), shard)
        i = 0
        # By `iter`, since inside a worker of torch's loader the data set itself would divide the shard once more.
        for columns in rows.iter(batch_size=_ROWS):
            labels = columns[self.label_key] if self.label_key else [None] * len(columns[self.image_key])
            for image, label in zip(columns[self.image_key], labels, strict=True):
                yield Raw(f'{self.names[shard]}, row {i}', partial(self._decode, image, label))
                i += 1

    def _decode(self, image: Any, label: Any) -> tuple[Image.Image, int]:
        return self.image.decode_example(image), -1 if label is None else int(label)


def _parquet_lengths(files: Sequence[str]) -> tuple[int, ...] | None:
    """Read the number of rows of each file from its footer; None unless all are Parquet files."""
    import fsspec  # type: ignore[import-untyped]
    from pyarrow import parquet

    def rows(path: str) -> int:
        with fsspec.open(path, 'rb') as file:
            return int(parquet.read_metadata(file).num_rows)

    if not files or not all(file.endswith('.parquet') for file in files):
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(rows, files))


def is_remote(root: str) -> bool:
    """True if shards are fetched from an address or a command rather than a folder."""
    return '://' in root or root.startswith('pipe:')


def find_shards(root: str, split: str) -> tuple[list[str], tuple[int, ...] | None, int | None]:
    """Find the shards of a split and their lengths; `root` and `split` are those of `TarShards`.

    A pattern may end in `|` and a number of samples.

    Returns:
        Their names in the root; the number of samples of each, counted where no file gives it; and the number of
        samples in the pattern. Unknown numbers are None.

    Raises:
        InputError: There is no such folder or shard, or one cannot be read.
    """
    remote = is_remote(root)
    if not remote and not Path(root).is_dir():
        raise InputError(f'data.root {root} does not exist')
    splits = {} if remote else _read_info(Path(root)).get('splits', {})
    files, total = _find(root, split, splits)
    known = {
        file: int(length)
        for each in splits.values()
        for file, length in zip(each['filenames'], each['shard_lengths'], strict=True)
    }
    if all(file in known for file in files):
        return files, tuple(known[file] for file in files), total
    return files, None if remote else tuple(_count_samples(Path(root) / file) for file in files), total


def _find(root: str, split: str, splits: dict[str, Any]) -> tuple[list[str], int | None]:
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
    if split in splits:
        return list(splits[split]['filenames']), None
    if is_remote(root):
        raise InputError(f'data.train_split {split}: give the pattern of the shards, such as train-{{0000..0123}}.tar')
    return sorted(path.name for path in Path(root).glob(f'*{split}*.tar')), None


def _read_info(root: Path) -> dict[str, Any]:
    for name in _INFO:
        if (root / name).is_file():
            try:
                return dict(json.loads((root / name).read_text(encoding='utf-8')))
            except ValueError as error:
                raise InputError(f'{root / name} is not JSON: {error}') from error
    return {}


def _count_samples(path: Path) -> int:
    """Count the samples of a local tar file from its headers alone."""
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
