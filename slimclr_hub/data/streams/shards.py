"""Sharded sources that are read in order: what they have in common, and tar files of webdataset's layout."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

from PIL import Image

from slimclr_hub.data.sources import DataConfig
from slimclr_hub.data.streams.shard_names import find_shards
from slimclr_hub.errors import DataError, InputError

_IMAGES = 'jpg;jpeg;png;webp'


@dataclass(frozen=True)
class Raw:
    """A sample as it is stored.

    Args:
        name: What to call it.
        payload: What the source decodes.
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
        """What to call a shard."""

    def read(self, shard: int) -> Iterator[Raw]:
        """Samples of a shard in the order in which they are stored, not decoded."""

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Image and label, -1 where there is none; raises whatever is wrong with the sample."""


class TarShards:
    """Tar files whose members of one base name are one sample, as webdataset writes them.

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
        """Address of a shard."""
        return self.paths[shard]

    def read(self, shard: int) -> Iterator[Raw]:
        """Samples of a tar file, one after another."""
        import webdataset

        path = self.paths[shard]
        try:
            for sample in webdataset.tariterators.tarfile_samples([{'url': path}]):
                yield Raw(f'{path}/{sample["__key__"]}', sample)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f'cannot read {path}: {error.args[0]}; fetch the shard again') from error

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Image and label of a sample."""
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
