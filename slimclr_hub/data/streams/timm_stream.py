"""Training on a stream of timm's that cannot be entered in its middle."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from slimclr_hub.data.batches import Chunk
from slimclr_hub.data.streams.shards import Raw
from slimclr_hub.data.streams.stream import StreamFeed


class TimmSource:
    """A stream that timm divides over workers and processes itself.

    Args:
        dataset: timm's `IterableImageDataset`, without a transform.
        rank: This process.
    """

    def __init__(self, dataset: Any, rank: int) -> None:
        self.dataset = dataset
        self.rank = rank

    def order(self, epoch: int, role: int) -> Iterator[tuple[tuple[int, ...], Raw]]:
        """Samples of the worker that asks."""
        self.dataset.set_epoch(epoch)
        for i, sample in enumerate(self.dataset):
            yield (self.rank, role, i), Raw(f'sample {i}', sample)

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Image and label, which timm has decoded already."""
        image, label = raw.payload
        return image, int(label)


class OneWayFeed:
    """A feed that begins its epoch anew wherever it is entered.

    Args:
        feed: The feed.
        name: What to call the source.
    """

    def __init__(self, feed: StreamFeed, name: str) -> None:
        self.feed = feed
        self.notes = (
            f'data.name {name} cannot be entered in the middle of an epoch nor divided exactly: a resumed run begins '
            "the epoch's images anew, and some may be seen twice or not at all.",
        )

    def chunks(self, epoch: int, start: int, position: Any) -> Iterator[tuple[Chunk, None]]:
        """Micro-batches from the beginning of the epoch's stream."""
        for chunk, _ in self.feed.chunks(epoch, 0, None):
            yield chunk, None
