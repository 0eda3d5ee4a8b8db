"""Data sets of the Hub that are downloaded, and read by index."""

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from slimclr_hub.data.columns import find_columns, is_text, outside_error
from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.labels import UNLABELLED, class_names, class_number, number_texts
from slimclr_hub.images import read_image


class TableImages(Dataset[tuple[Image.Image, int]]):
    """One split of a Hub data set (`hfds/USER/NAME`), or of a local folder in one of its formats (`hfds//FOLDER`).

    Classes that are texts are numbered by those of the training images.

    Raises:
        InputError: There is no such data set, split or column, or a class that the training images do not have.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        import datasets

        where = f'data.name {config.name}, split {split}'
        table = _load(config, split, where)
        features = table.features
        image_key, self.label_key = find_columns(table.column_names, features, config, where)
        kind = features[self.label_key] if self.label_key is not None else None
        self.numbers = None
        if self.label_key is not None and is_text(kind):
            train, others = table.unique(self.label_key), None
            if split != config.train_split:
                train, others = _load(config, config.train_split, where).unique(self.label_key), train
            self.numbers = number_texts(train, others, where)
        self.class_names = class_names(self.numbers) or list(getattr(kind, 'names', [])) or None
        self.mode = config.mode
        self.image_key = image_key
        # Decoded by ourselves, as all images are.
        self.table = table.cast_column(image_key, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.table[index]
        label = row[self.label_key] if self.label_key is not None else None
        return read_image(row[self.image_key], self.mode), class_number(label, self.numbers)

    def labels(self) -> np.ndarray:
        """Classes [N] of all images."""
        if self.label_key is None:
            return np.full(len(self), UNLABELLED)
        return np.array([class_number(label, self.numbers) for label in self.table[self.label_key]])

    def name(self, index: int) -> str:
        """Row of an image, and its path if there is one."""
        try:
            path = self.table[index][self.image_key]['path']
        except Exception:  # what cannot be read may not be named either
            path = None
        return f'row {index}' + (f' ({path})' if path else '')

    def fingerprint(self) -> list[Any]:
        """Number of images, and the table's own fingerprint."""
        return [len(self), self.table._fingerprint]


def _load(config: DataConfig, split: str, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.name.removeprefix('hfds/'), split=split, cache_dir=config.root)
    except Exception as error:  # it comes from the network, files of any format, and the libraries that read them
        raise outside_error(where, error) from error
