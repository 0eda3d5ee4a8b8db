"""Features of whole splits, computed once and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Subset

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import ArrayImages
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.linear_eval.classes import class_names
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import width_key
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

_LABELS = 'labels'


@dataclass(frozen=True)
class SplitFeatures:
    """Features of the centre crops of one split.

    Args:
        by_width: Width -> pooled features, float32 [N, C * width], in descending order of width.
        labels: Classes [N].
        class_names: Names of the classes, where the data set knows them.
    """

    by_width: dict[float, torch.Tensor]
    labels: torch.Tensor
    class_names: list[str] | None = None


def state_hash(model: nn.Module) -> str:
    """Hash of all tensors of a network, buffers too; equal if and only if none of them has moved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Features of the splits of a data set by one frozen network, read from disk where they have been computed before.

    A file belongs to the weights of the network, its widths, the precision, the images (their number and, where that is
    quick to tell, which they are), their size, crop and normalisation. Any of these changed, features are computed
    anew, into another file. All of a split is held in memory, by each process.

    Args:
        folder: Folder of the files.
        accelerator: The processes; all of them ask together.
        backbone: The network in eval mode, without a classifier, on the accelerator's device.
        config: The source.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, backbone: SlimmableResNet, config: DataConfig) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._backbone = backbone
        self._config = config
        self._weights = state_hash(backbone)

    def features(self, split: str, at_most: int | None = None) -> SplitFeatures:
        """Features of a split, on the accelerator's device.

        Args:
            split: Which.
            at_most: Take a fixed random choice of this many images where there are more.

        Raises:
            InputError: There is no such split, or the source is a stream and there are several processes.
        """
        accelerator = self._accelerator
        if self._config.streams and accelerator.num_processes > 1:
            raise InputError(
                f'data.name {self._config.name}: a stream does not come in equal parts for several processes, and '
                'evaluation has to see each image once; run one process'
            )
        loader = eval_loader(self._config, split, at_most, 0, accelerator.num_processes)
        whole = loader.dataset.dataset if isinstance(loader.dataset, Subset) else loader.dataset
        path = self.path(split, whole, len(loader.dataset))  # type: ignore[arg-type]
        # The main process decides for all: it may be writing the file while another one looks.
        there: list[Any] = [path.is_file() and self._is_whole(path)] if accelerator.is_main_process else [None]
        if not broadcast_object_list(there)[0]:
            self._compute(loader, split, path)
        return self._read(path, class_names(self._config.name, whole))

    def path(self, split: str, dataset: Any, count: int) -> Path:
        """The file of `count` images of a split, of which `dataset` has all."""
        data = self._config.fingerprint()
        del data['train_split'], data['val_split']
        facts = {
            'weights': self._weights,
            'widths': self._backbone.widths,
            'precision': self._accelerator.mixed_precision,
            'split': split,
            'images': _fingerprint(dataset),
            'count': count,
            **data,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        name = ''.join(letter if letter.isalnum() else '-' for letter in split)[:40]
        return self._folder / f'{name}-{key}.safetensors'

    def _compute(self, loader: DataLoader, split: str, path: Path) -> None:
        accelerator, backbone = self._accelerator, self._backbone
        total = len(loader.dataset)  # type: ignore[arg-type]
        prepared = accelerator.prepare_data_loader(loader)
        with progress_bar(total, f'features of {split}', accelerator.is_main_process) as bar:
            features, labels = extract_features(
                accelerator, backbone, _counted(prepared, bar, accelerator.num_processes), backbone.widths
            )
        if accelerator.is_main_process:
            try:
                save_tensors({**{width_key(w): x for w, x in features.items()}, _LABELS: labels}, path)
            except OSError as error:
                raise InputError(
                    f'features cannot be kept in {self._folder} ({error.strerror}); give another features.cache'
                ) from error
        accelerator.wait_for_everyone()

    def _is_whole(self, path: Path) -> bool:
        try:
            with TensorFile(path) as file:
                return set(file.shapes) == {_LABELS, *map(width_key, self._backbone.widths)}
        except InputError as error:
            self._accelerator.print(f'Features are computed again: {error}')
            return False

    def _read(self, path: Path, names: list[str] | None) -> SplitFeatures:
        device = self._accelerator.device
        with TensorFile(path) as file:
            by_width = {width: file.whole(width_key(width)).to(device) for width in self._backbone.widths}
            return SplitFeatures(by_width, file.whole(_LABELS).to(device), names)


def _counted(loader: Iterable, bar: Any, processes: int) -> Iterator[Any]:
    for images, labels in loader:
        yield images, labels
        bar.update(min(len(images) * processes, bar.total - bar.n))


def _fingerprint(dataset: Any) -> list[Any]:
    """The number of images and, where it is quick to tell, a hash of what they are."""
    facts: list[Any] = [len(dataset)]
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if isinstance(dataset, ArrayImages):
        digest = hashlib.sha256(np.ascontiguousarray(dataset.images).data)
        digest.update(np.ascontiguousarray(dataset.labels).data)
        facts.append(digest.hexdigest())
    elif isinstance(samples, list):  # of a folder: paths and classes
        facts.append(hashlib.sha256(json.dumps(samples, default=str).encode()).hexdigest())
    return facts
