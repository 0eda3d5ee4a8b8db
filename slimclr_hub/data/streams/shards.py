"""Sharded sources that are read in order: tar files in webdataset's layout, and streamed data sets of the Hub."""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torchvision.datasets.folder import IMG_EXTENSIONS

from slimclr_hub.data.columns import find_columns, is_text, outside_error
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.labels import as_text, class_names, class_number, number_texts
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.images import read_image, reason

T = TypeVar('T')
_IMAGES = tuple(ending.removeprefix('.') for ending in IMG_EXTENSIONS)
_INFO = ('_info.json', 'info.json')  # timm's names
_META = re.compile(r'__[^/]*__($|/)')  # members that webdataset skips
_LARGEST_MEMBER = 2**30
_ROWS = 32  # of a Hub data set, read at a time; they are encoded images
_THREADS = 16  # they wait for the network
_TRIED = 10  # samples, of which one has to be readable for training to begin


class Raw(NamedTuple):
    """A stored sample: its name in messages, what gives its image to `read_image`, and its class."""

    name: str
    load: Callable[[], Any]
    label: int


class Shards(Protocol):
    """A sharded source: the address of each shard, the samples of each and of all, if known, names of classes."""

    names: list[str]
    lengths: tuple[int, ...] | None
    total: int | None
    class_names: list[str] | None

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield encoded samples of a shard in stored order.

        Raises:
            DataError: It is damaged, or has another length than announced, so samples would be lost or repeated.
        """


def open_shards(config: DataConfig, split: str) -> Shards:
    """Open the shards of a split, and read an image.

    Raises:
        InputError: There are no such shards, or one is damaged, or the first samples have no image that can be read.
    """
    shards: Shards = TarShards(config, split) if config.name.startswith('wds/') else HubShards(config, split)
    problems = []
    try:
        for _, raw in zip(range(_TRIED), shards.read(0), strict=False):
            try:
                read_image(raw.load(), config.mode)
            except Exception as error:  # decoders raise whatever occurs to them
                problems.append(f'{raw.name} ({reason(error)})')
            else:
                return shards
    except DataError as error:
        raise InputError(str(error)) from error
    if not problems:
        raise InputError(f'{shards.names[0]} holds no samples')
    raise InputError(
        f'the first {len(problems)} images cannot be read, as {problems[0]}; data.image_key is {config.image_key}'
    )


class TarShards:
    """Tar files as webdataset writes them: members of one base name are one sample.

    A base name ends at the first dot of a name. Where none of the members of one is an image by its ending alone, as
    of `2021.01.jpg` and `2021.02.jpg`, it is taken to end at the last.

    Args:
        config: `root` is the folder or address of the shards.
        split: Their pattern with braces, a split of the root's `_info.json`, or, in a folder, a part of their names or
            a folder in it.

    Raises:
        InputError: There are no such shards, or one is damaged, or the first sample has no image or label.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        root = config.required_root()
        self.image_keys = tuple(config.image_key.split(';')) if config.image_key else None
        self.label_key = config.label_key
        files, self.lengths, total = _find_counted(root, split, self.image_keys)
        if not files:
            raise InputError(f'data.root {root} has no shard that matches split {split}')
        self.names = [f'{root.rstrip("/")}/{file}' for file in files]
        self.total = config.num_samples or total
        self._numbers: Mapping[str, int] | None = None
        self._number_classes(config, split, self._check_first(config))
        self.class_names = class_names(self._numbers)

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield samples of a tar file."""
        path = self.names[shard]
        found = 0
        for key, sample in self._samples(path):
            yield Raw(f'{path}/{key}', partial(self._image, sample), class_number(self._label(sample), self._numbers))
            found += 1
        check_length(path, self.lengths, shard, found, '_info.json')

    def _samples(self, path: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        try:
            yield from _grouped(_members(path, self._is_needed), self.image_keys)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f'cannot read {path}: {reason(error)}; fetch the shard again') from error

    def _is_needed(self, ending: str) -> bool:
        last = ending.rpartition('.')[2]
        return last in (*_IMAGES, 'cls', 'json') or ending in (self.image_keys or ())

    def _image(self, sample: Mapping[str, bytes | None]) -> bytes:
        keys = self.image_keys or _IMAGES
        image = next((sample[key] for key in keys if sample.get(key) is not None), None)
        if image is None:
            raise ValueError(f'no member {" or ".join(keys)}')
        return image

    def _label(self, sample: Mapping[str, bytes | None]) -> Any:
        if self.label_key is None:
            return sample.get('cls')
        with suppress(ValueError, TypeError, AttributeError):
            return json.loads(sample.get('json') or b'').get(self.label_key)
        return None

    def _check_first(self, config: DataConfig) -> Any:
        """Label of the first sample, which is to have an image, and the label that is asked for."""
        # Else every image of the epoch would turn out to be unreadable, in the middle of it.
        try:
            key, first = next(self._samples(self.names[0]), ('', {}))
        except DataError as error:
            raise InputError(str(error)) from error
        if not first:
            raise InputError(f'{self.names[0]} holds no samples')
        where = f'{self.names[0]}: the first sample, {key},'
        if not any(key in first for key in self.image_keys or _IMAGES):
            raise InputError(f'{where} has {", ".join(first)}; data.image_key is {config.image_key}')
        label = self._label(first)
        if label is None and self.label_key is not None:
            raise InputError(f'{where} has no {self.label_key} in its json; data.label_key names a field of it')
        return label

    def _number_classes(self, config: DataConfig, split: str, label: Any) -> None:
        """Number classes that are texts, as a first label is, by those of the training images."""
        text = as_text(label)
        if text is None or text.isdecimal():
            return
        # Of a remote shard every image would have to be fetched for it.
        remote = is_remote(config.required_root())

        def texts(of: str) -> Iterator[Any]:
            root = config.required_root()
            for file in [] if remote else _find(root, of, _read_info(Path(root)))[0]:
                path = f'{root.rstrip("/")}/{file}'
                members = _members(path, lambda ending: ending.endswith(('cls', 'json')), seek=True)
                with _damage_refused(path):
                    yield from (self._label(sample) for _, sample in _grouped(members, self.image_keys))

        where = f'data.name {config.name}, data.root {config.root}, split {split}'
        others = None if remote or split == config.train_split else texts(split)
        self._numbers = number_texts(texts(config.train_split), others, where)


class HubShards:
    """A data set of the Hub (`hfids/USER/NAME`) or a local folder in one of its formats (`hfids//FOLDER`), as a stream.

    Raises:
        InputError: There is no such data set, split or column, or a file of it is damaged.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        import datasets

        name = config.name.removeprefix('hfids/')
        where = f'data.name {config.name}, split {split}'
        try:
            builder = datasets.load_dataset_builder(name, cache_dir=config.root)
            self.stream = builder.as_streaming_dataset(split=split)
            columns = self.stream.column_names or list(next(iter(self.stream.take(1)), {}))
        except Exception as error:  # it comes from the network, files of any format, and the libraries that read them
            raise outside_error(where, error) from error
        features = self.stream.features or {}
        self.image_key, self.label_key = find_columns(columns, features, config, where)
        # Decoded by ourselves: what is skipped needs not be decoded, and what cannot be must not end the stream.
        self.image = datasets.Image()
        self.stream = self.stream.cast_column(self.image_key, datasets.Image(decode=False))
        files = {of: [str(file) for file in each] for of, each in (builder.config.data_files or {}).items()}
        count = self.stream.num_shards
        own = files.get(split, [])
        self.names = own if len(own) == count else [f'shard {shard}' for shard in range(count)]
        self.lengths = _parquet_lengths(self.names, where)
        info = (builder.info.splits or {}).get(split)
        self.total = config.num_samples or (info.num_examples if info else None)
        self._numbers: Mapping[str, int] | None = None
        if self.label_key is not None and is_text(features.get(self.label_key)):
            # Of other formats every image would have to be fetched for it.
            train = _parquet_column(files.get(config.train_split, []), self.label_key, where)
            others = _parquet_column(own, self.label_key, where) if split != config.train_split else None
            self._numbers = number_texts(train, others, where)
        kind = features.get(self.label_key) if self.label_key else None
        self.class_names = class_names(self._numbers) or list(getattr(kind, 'names', [])) or None

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield rows of a file."""
        rows = self.stream.shard(len(self.names), shard)
        name, i = self.names[shard], 0
        try:
            # By `iter`, since inside a worker of torch's loader the data set itself would divide the shard once more.
            for columns in rows.iter(batch_size=_ROWS):
                labels = columns[self.label_key] if self.label_key else [None] * len(columns[self.image_key])
                for image, label in zip(columns[self.image_key], labels, strict=True):
                    yield Raw(f'{name}, row {i}', partial(self._image, image), class_number(label, self._numbers))
                    i += 1
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f'cannot read {name} after row {i}: {reason(error)}; fetch it again') from error
        check_length(name, self.lengths, shard, i, 'footer')

    def _image(self, stored: Any) -> Any:
        if stored is None:
            raise ValueError('no image')
        return self.image.decode_example({'bytes': stored, 'path': None} if isinstance(stored, bytes) else stored)


def check_length(name: str, lengths: Sequence[int] | None, shard: int, found: int, by: str) -> None:
    """Raise a DataError unless a shard has as many samples as were announced, if they were."""
    if lengths is not None and lengths[shard] != found:
        raise DataError(
            f'{name} holds {found} samples, not {lengths[shard]} as announced; fetch the shard again or correct its '
            f'{by}'
        )


@contextmanager
def _parquet(path: str, where: str) -> Iterator[Any]:
    """A Parquet file; what goes wrong while it is read is an InputError."""
    import fsspec  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile

    try:
        with fsspec.open(path, 'rb') as file, ParquetFile(file) as parquet:
            yield parquet
    except (OSError, ValueError) as error:
        raise InputError(f'{where}: cannot read {path}: {reason(error)}; fetch it again') from error


def _parquet_lengths(files: Sequence[str], where: str) -> tuple[int, ...] | None:
    """Read the number of rows of each file from its footer; None unless all are Parquet files."""

    def rows(path: str) -> int:
        with _parquet(path, where) as parquet:
            return int(parquet.metadata.num_rows)

    if not files or not all(file.endswith('.parquet') for file in files):
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(rows, files))


def _parquet_column(files: Sequence[str], column: str, where: str) -> Iterator[Any]:
    """Values of a column; none unless all are Parquet files, which keep it apart."""
    for path in files if all(file.endswith('.parquet') for file in files) else ():
        with _parquet(path, where) as parquet:
            found = parquet.read(columns=[column])[column].unique().to_pylist()
        yield from found


# Tar files


class _Whole(tarfile.TarInfo):
    """Header of a member; what is neither one nor the mark of the end is damage, which `tarfile` takes for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> '_Whole':
        """Read the next header."""
        at = tarfile_.offset
        try:
            found = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise OSError(f'{error} at byte {at}, where a member or the mark of the end should be') from error
        if found.issparse():
            raise OSError(f'the member {found.name} is sparse, of {found.size} bytes')
        return found


def _members(path: str, needed: Callable[[str], bool], seek: bool = False) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield base name, ending and content, if needed by its ending, of the members of a tar file.

    What is not needed of a local file is passed over with `seek`.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import base_plus_ext

    with ExitStack() as stack:
        # A pipe would be waited for, were it closed.
        stream: Any = gopen(path) if is_remote(path) else stack.enter_context(open(path, 'rb'))
        mode: Any = 'r:' if seek else 'r|'  # not compressed, which may unpack to any size
        tar: Any = stack.enter_context(tarfile.open(fileobj=stream, mode=mode, tarinfo=_Whole))
        while (member := tar.next()) is not None:
            base, ending = base_plus_ext(member.name)
            if member.isreg() and base is not None and not _META.match(member.name):
                content = None
                if needed(ending.lower()):
                    if member.size > _LARGEST_MEMBER:
                        raise tarfile.ReadError(f'the member {member.name} has {member.size} bytes')
                    content = tar.extractfile(member).read()
                yield base, ending.lower(), content
            tar.members = []  # else it remembers all


def _grouped(
    members: Iterable[tuple[str, str, T]], image_keys: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, T]]]:
    """Group neighbouring members of one base name to samples, ending -> content."""
    last, sample = None, {}  # type: ignore[var-annotated]
    for base, ending, content in members:
        if base != last:
            if last is not None:
                yield from _apart(last, sample, image_keys)
            last, sample = base, {}
        if ending in sample:
            raise tarfile.ReadError(f'the member {base}.{ending} is there twice')
        sample[ending] = content
    if last is not None:
        yield from _apart(last, sample, image_keys)


def _apart(base: str, sample: dict[str, T], image_keys: Sequence[str] | None) -> Iterator[tuple[str, dict[str, T]]]:
    """The sample itself, or those in it whose base names have dots."""
    parts: dict[str, dict[str, T]] = {}
    if image_keys is None and not any(ending in _IMAGES for ending in sample):
        for ending, content in sample.items():
            middle, _, last = ending.rpartition('.')
            parts.setdefault(middle, {})[last] = content
    images = {middle: part for middle, part in parts.items() if any(ending in _IMAGES for ending in part)}
    if not images:
        yield base, sample
    for middle, part in images.items():
        yield f'{base}.{middle}', part


def is_remote(root: str) -> bool:
    """True if shards are fetched from an address or a command rather than a folder."""
    return '://' in root or root.startswith('pipe:')


def _find_counted(
    root: str, split: str, image_keys: Sequence[str] | None
) -> tuple[list[str], tuple[int, ...] | None, int | None]:
    """Find the shards of a split and their lengths; `root` and `split` are those of `TarShards`.

    A pattern may end in `|` and a number of samples.

    Returns:
        Their names in the root; the number of samples of each, counted where no file gives it; and the number of
        samples in the pattern. Unknown numbers are None.

    Raises:
        InputError: There is no such folder or shard, or one is damaged.
    """
    remote = is_remote(root)
    if not remote and not Path(root).is_dir():
        raise InputError(f'data.root {root} does not exist')
    splits = {} if remote else _read_info(Path(root))
    files, total = _find(root, split, splits)
    known = {file: length for each in splits.values() for file, length in each.items()}
    if all(file in known for file in files):
        return files, tuple(known[file] for file in files), total
    return files, None if remote else tuple(_count_samples(Path(root) / file, image_keys) for file in files), total


def shard_names(root: str, split: str) -> list[str]:
    """Names of the shards of a split in `root`."""
    return _find(root, split, {} if is_remote(root) else _read_info(Path(root)))[0]


def _find(root: str, split: str, splits: Mapping[str, Mapping[str, int]]) -> tuple[list[str], int | None]:
    """Find names of shards, and the number of samples where the pattern gives it."""
    from webdataset.shardlists import expand_urls

    files, total = [], ''
    if 'tar' in split or '..' in split:
        pattern, _, total = split.partition('|')
        if total and not total.isdecimal():
            raise InputError(f'split {split}: {total!r} after | is not a number of samples')
        files = expand_urls(pattern)
    elif split in splits:
        files = list(splits[split])
    elif is_remote(root):
        raise InputError(
            f'split {split} of data.root {root}: give the pattern of the shards, such as train-{{0000..0123}}.tar, or '
            'data.val_split null'
        )
    else:
        place = Path(root)
        found = [*place.glob(f'*{split}*.tar')] or [*(place / split).rglob('*.tar')]
        return sorted(path.relative_to(place).as_posix() for path in found if path.is_file()), None
    missing = [] if is_remote(root) else [file for file in files if not (Path(root) / file).is_file()]
    if missing:
        raise InputError(f'data.root {root} has no {missing[0]} ({len(missing)} of {len(files)} are missing)')
    return files, int(total) if total else None


def _read_info(root: Path) -> dict[str, dict[str, int]]:
    """Split -> name of a shard -> its number of samples, by the file that announces them, if there is one."""
    path = next((root / name for name in _INFO if (root / name).is_file()), None)
    if path is None:
        return {}
    try:
        splits = json.loads(path.read_text(encoding='utf-8')).get('splits', {})
        found = {
            str(name): dict(zip(each['filenames'], each['shard_lengths'], strict=True)) for name, each in splits.items()
        }
        numbers = [length for each in found.values() for length in each.values()]
        if not all(isinstance(length, int) and length >= 0 for length in numbers):
            raise ValueError('shard_lengths are not numbers of samples')
        if not all(isinstance(file, str) for each in found.values() for file in each):
            raise ValueError('filenames are not names')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f'{path} does not give splits with filenames and shard_lengths: {error!r}; correct or remove it'
        ) from error
    return found


def _count_samples(path: Path, image_keys: Sequence[str] | None) -> int:
    """Count the samples of a local tar file from its headers alone."""
    with _damage_refused(path):
        return sum(1 for _ in _grouped(_members(str(path), lambda _: False, seek=True), image_keys))


@contextmanager
def _damage_refused(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f'cannot read the shard {path}: {reason(error)}; fetch it again') from error


def check_tar(path: Path) -> None:
    """Raise an InputError if a tar file is damaged or no file."""
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f'{path} is not a file')
    _count_samples(path, None)
