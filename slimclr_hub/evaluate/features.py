"""Features of images by a frozen network at several widths: computed in one pass, and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slimclr_hub.data import DataConfig
from slimclr_hub.data.labels import UNREADABLE
from slimclr_hub.data.loaders import EvalLoader, eval_loader
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.files import try_folder
from slimclr_hub.models.widths import width_key
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.weights.hashes import tensors_hash
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

NOTHING_READ = 'no image of the evaluation can be read'

LABELS, _HASH = 'labels', 'sha256'


class FeatureExtractor(Protocol):
    """What gives features: a network without a classifier, raw pixels, or a teacher."""

    @property
    def widths(self) -> Sequence[float]:
        """Widths in descending order."""

    def forward_widths(self, images: torch.Tensor, widths: Sequence[float]) -> dict[float, torch.Tensor]:
        """Images [B, C, H, W] -> for each width features [B, D]."""

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The tensors that the features depend on."""


@torch.inference_mode()
def extract_features(
    accelerator: Accelerator, backbone: FeatureExtractor, loader: Iterable, widths: Sequence[float]
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Compute pooled features in one pass over the images, and gather them and the labels from all processes.

    The backbone is in eval mode, without a classifier; `loader` yields (images, labels), prepared by `accelerator`.
    Images that cannot be read are left out.

    Returns:
        For each width float32 features [N, D], and labels [N], on the device.

    Raises:
        DataError: None can be read.
    """
    features, labels = [], []
    for by_width, label in _gathered(accelerator, backbone, loader, widths):
        features.append(by_width)
        labels.append(label)
    return _joined(features, labels)


def _gathered(
    accelerator: Accelerator, backbone: FeatureExtractor, loader: Iterable, widths: Sequence[float]
) -> Iterator[tuple[dict[float, torch.Tensor], torch.Tensor]]:
    for images, label in loader:
        with accelerator.autocast():
            outputs = backbone.forward_widths(images, widths)
        *found, labels = accelerator.gather_for_metrics((*[output.float() for output in outputs.values()], label))
        yield dict(zip(widths, found, strict=True)), labels


def _joined(
    features: list[dict[float, torch.Tensor]], labels: list[torch.Tensor]
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    if not labels or all((of == UNREADABLE).all() for of in labels):
        raise DataError(NOTHING_READ)
    widths = [*features[0]] if features else []
    return readable({w: torch.cat([batch.pop(w) for batch in features]) for w in widths}, torch.cat(labels))


def readable(
    features: dict[float, torch.Tensor], labels: torch.Tensor
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Features by width and labels without those of images that cannot be read."""
    kept = labels != UNREADABLE
    if kept.all():
        return features, labels
    return {width: x[kept] for width, x in features.items()}, labels[kept]


def check_labels(labels: torch.Tensor, num_classes: int, split: str, key: str) -> None:
    """Raise an InputError if an image has no label, or one beyond the classes, whose number the setting `key` gives."""
    least, most = labels.min().item(), labels.max().item()
    if least < 0:
        raise InputError(f'split {split} has images without a label; a classifier needs one for each')
    if most >= num_classes:
        raise InputError(
            f'split {split} has class {most}, and there are {num_classes}; give --{key} {most + 1} or more'
        )


def with_progress(accelerator: Accelerator, loader: Iterable, total: int, title: str) -> Iterator[Any]:
    """Batches of a loader, with a bar over the images of all processes; the others are about as far as this one."""
    with progress_bar(total, title, accelerator.is_main_process) as bar:
        for images, labels in loader:
            yield images, labels
            bar.update(min(len(images) * accelerator.num_processes, total - bar.n))


@dataclass(frozen=True)
class SplitFeatures:
    """Features of the centre crops of a split.

    `by_width` is width -> pooled features, float32 [N, C * width], in descending order; `labels` are classes [N].
    """

    by_width: dict[float, torch.Tensor]
    labels: torch.Tensor
    class_names: Sequence[str] | None = None


class FeatureCache:
    """Features of the splits of a data set by one frozen network, kept on disk.

    The name of a file depends on the network's weights and widths, the precision, and the images: their number, a hash
    of them where that is quick to compute, size, crop and normalisation. All processes ask together; while features are
    computed, the main process collects them in main memory.

    Args:
        folder: Folder of the files.
        accelerator: Accelerator of the processes.
        backbone: The network, in eval mode, without a classifier, on the accelerator's device.
        config: The images.
        key: The setting that names the folder, for errors.
        precision: Precision of the features where it is not the accelerator's.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        backbone: FeatureExtractor,
        config: DataConfig,
        key: str = 'features.cache',
        precision: str | None = None,
    ) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._backbone = backbone
        self._config = config
        self._key = key
        self._precision = precision or accelerator.mixed_precision
        self._weights = tensors_hash(backbone.state_dict())

    def features(self, split: str, at_most: int | None = None) -> SplitFeatures:
        """Read or compute features of a split on the device; of `at_most` images, a fixed random choice, if given.

        Raises:
            InputError: There is no such split, the source is a stream and there are several processes, or the features
                cannot be kept.
            DataError: More images than allowed cannot be read, or none can.
        """
        path, loader = self.file(split, at_most)
        with TensorFile(path) as file:
            by_width = {w: file.whole(width_key(w)).to(self._accelerator.device) for w in self._backbone.widths}
            labels = file.whole(LABELS).to(self._accelerator.device)
        return SplitFeatures(by_width, labels, loader.source.class_names)

    def file(self, split: str, at_most: int | None = None) -> tuple[Path, EvalLoader]:
        """The file with the features of a split, which is written if it is not there, and the loader of its images.

        Its tensors are the `width_key` of each width, and `LABELS`. Arguments and errors are those of `features`.
        """
        accelerator = self._accelerator
        loader = eval_loader(self._config, split, at_most, 0, accelerator.num_processes)
        path = self._path(split, loader)
        # The main process decides for all: it may be writing the file while another one looks.
        there: list[Any] = [path.is_file() and self._is_whole(path)] if accelerator.is_main_process else [None]
        if not broadcast_object_list(there)[0]:
            self._compute(loader, split, path)
        return path, loader

    def _path(self, split: str, loader: EvalLoader) -> Path:
        data = self._config.fingerprint()
        del data['train_split'], data['val_split']
        facts = {
            'weights': self._weights,
            'widths': self._backbone.widths,
            'precision': self._precision,
            'split': split,
            'images': loader.source.fingerprint(),
            'count': loader.total,
            **data,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        name = ''.join(letter if letter.isalnum() else '-' for letter in split)[:40]
        return self._folder / f'{name}-{key}.safetensors'

    def _compute(self, loader: EvalLoader, split: str, path: Path) -> None:
        accelerator, backbone = self._accelerator, self._backbone
        from_main_process(lambda: try_folder(self._folder, self._key))
        counted = with_progress(accelerator, loader.prepared(accelerator), loader.total, f'features of {split}')
        parts, labels = [], []
        with torch.inference_mode():
            for features, label in _gathered(accelerator, backbone, counted, backbone.widths):
                labels.append(label.cpu())
                if accelerator.is_main_process:
                    parts.append({width: x.cpu() for width, x in features.items()})
        by_width, found = _joined(parts, labels)
        tensors = {**{width_key(w): x for w, x in by_width.items()}, LABELS: found}
        from_main_process(lambda: self._keep(tensors, path))

    def _keep(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        try:
            save_tensors({**tensors, _HASH: _as_tensor(tensors_hash(tensors))}, path)
        except OSError as error:
            raise InputError(
                f'features cannot be kept in {self._folder} ({error.strerror}); give another {self._key}'
            ) from error

    def _is_whole(self, path: Path) -> bool:
        try:
            with TensorFile(path) as file:
                tensors = {name: file.whole(name) for name in file.shapes}
        except InputError as error:
            self._accelerator.print(f'Features are computed again: {error}')
            return False
        names = {LABELS, _HASH, *map(width_key, self._backbone.widths)}
        if tensors.keys() == names and tensors.pop(_HASH).equal(_as_tensor(tensors_hash(tensors))):
            return True
        self._accelerator.print(f'Features are computed again: {path} is not as it was written')
        return False


def _as_tensor(digest: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
