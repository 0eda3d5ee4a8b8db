"""Streamed Hub data sets, in which every file of the split is a shard."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.streams.shards import Raw
from slimclr_hub.errors import InputError

_ROWS = 32  # read at a time; they are encoded images
_THREADS = 16  # they wait for the network


class HubShards:
    """A data set of the Hub, or a local folder in one of its formats, read as a stream.

    Args:
        config: The source; `name` is `hfids/USER/NAME` or `hfids//FOLDER`.

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
        self.count = self.stream.num_shards
        self.files = [str(file) for file in (builder.config.data_files or {}).get(config.train_split, ())]
        self.lengths = _parquet_lengths(self.files) if len(self.files) == self.count else None
        info = (builder.info.splits or {}).get(config.train_split)
        self.total = config.num_samples or (info.num_examples if info else None)

    def name(self, shard: int) -> str:
        """Return the address of a file."""
        return self.files[shard] if len(self.files) == self.count else f'shard {shard}'

    def read(self, shard: int) -> Iterator[Raw]:
        """Yield rows of a file."""
        rows = self.stream.shard(self.count, shard)
        name, i = self.name(shard), 0
        # By `iter`, since inside a worker of torch's loader the data set itself would divide the shard once more.
        for columns in rows.iter(batch_size=_ROWS):
            labels = columns[self.label_key] if self.label_key else [None] * len(columns[self.image_key])
            for image, label in zip(columns[self.image_key], labels, strict=True):
                yield Raw(f'{name}, row {i}', (image, label))
                i += 1

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Decode image and label of a row."""
        image, label = raw.payload
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
