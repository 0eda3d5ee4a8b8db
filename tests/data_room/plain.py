"""The plain path of training data: torchvision's own transforms, normalisation in the workers, nothing ahead."""

from typing import Any

import torch
from torchvision.transforms import v2

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.indexed import IndexedFeed
from slimclr_hub.data.streams.stream import StreamFeed
from slimclr_hub.data.training import TrainData
from slimclr_hub.data.views import Views, make_crop, make_view


def normalised_view(config: ViewConfig, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    """PIL image -> normalised float tensor [C, size, size], by torchvision alone."""
    pixels = make_view(config, size, len(mean))
    return v2.Compose([*pixels.transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def plain_data(of: DataConfig, *views: ViewConfig, **values) -> TrainData:
    """As TrainData, by the plain path."""
    data = TrainData(of, *views, **values)
    feed = data.feed
    assert isinstance(feed, IndexedFeed | StreamFeed)
    images: Any = feed.loader.dataset
    configs = (views * 2)[: len(images.transform.transforms)]
    if data.augment is None:
        data.normalize = lambda view: view  # type: ignore[assignment]
        each = [normalised_view(config, config.size or of.size, of.mean, of.std) for config in configs]
    else:
        each = [make_crop(config, config.size or of.size) for config in configs]
    images.transform = Views(*each)
    if isinstance(feed, StreamFeed):
        feed.ahead = False
    else:
        feed.batches.ahead = False
    return data
