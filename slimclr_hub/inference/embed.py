"""Features of images, by a network at its active width, and their files: safetensors, npy and parquet."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import atomic_files, try_folder
from slimclr_hub.images import Problem
from slimclr_hub.inference.images import Sources
from slimclr_hub.inference.runner import InferenceConfig, run_images
from slimclr_hub.weights.tensor_file import write_safetensors

_HEADER_AT_MOST = 90_000_000  # safetensors opens no file with a header of more than 100 MB
_ROW_GROUP = 4096


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Args:
        names: Name of each image, from `list_images`.
        features: Pooled features, float32 [N, D], on the CPU.
        architecture: Name in timm's registry.
        width: Width of the network; None if it has none.
        skipped: Name of each unreadable image, and the reason.
    """

    names: list[str]
    features: torch.Tensor
    architecture: str
    width: float | None
    skipped: list[Problem]


def embed(
    model: nn.Module,
    images: Sources,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    precision: str = 'no',
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Embeddings:
    """Compute pooled features of images by a network at its active width, on its device and in its dtype.

    Images are converted to grey or RGB as the network takes them, then preprocessed by timm's evaluation transform for
    it. Headers of all files are read before the first batch, so that a file that is no image does not stop a pass
    half-way.

    Args:
        model: A network from timm's factory, slimmable or not, with or without a head.
        images: The path of a file or folder, a PIL image, or several of these, such as `dataset['image']`; see
            `list_images`.
        batch_size: Images of a batch.
        workers: Processes that decode images; by default one for each core, at most 8.
        precision: `no` for the network's own, or `fp16` or `bf16` for mixed precision.
        skip_unreadable: Leave out unreadable images, and list them on standard error at the end.
        progress: Show a bar with images per second and the time left.

    Raises:
        InputError: An argument does not fit, an image is not there or cannot be read, or the network does not pool.
    """
    config = InferenceConfig(batch_size, workers, precision, skip_unreadable, progress)
    network: Any = model
    if not hasattr(network, 'forward_head'):
        raise InputError('the network has no pooled features; create it without features_only')

    def forward(batch: torch.Tensor) -> tuple[torch.Tensor]:
        features = network.forward_head(network.forward_features(batch), pre_logits=True)
        if features.ndim != 2:
            raise InputError(
                f'the network does not pool, its features have shape {list(features.shape)}; create it with '
                "global_pool='avg'"
            )
        return (features.float(),)

    outputs = run_images(model, images, forward, config, 'embedding')
    (features,) = outputs.tensors
    architecture = network.pretrained_cfg.get('architecture', type(model).__name__)
    return Embeddings(outputs.names, features, architecture, getattr(network, 'width', None), outputs.skipped)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Check before any work that `save_embeddings` can write `path`; its folder is created.

    Raises:
        InputError: The suffix is unknown, its writer is not installed, the file exists, or the folder is not writable.
    """
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise InputError(f'{path}: the suffix {path.suffix!r} is not one of {", ".join(_WRITERS)}')
    if suffix == '.parquet':
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise InputError(f'{path}: parquet needs pyarrow; pip install pyarrow') from error
    for file in (path,) if suffix == '.parquet' else (path, names_path(path)):
        if file.is_dir():
            raise InputError(f'{file} is a folder; give the path of a file')
        if file.exists() and not overwrite:
            raise InputError(f'{file} is there already; choose another name, or give --overwrite')
    try_folder(path.parent, 'the folder')


def save_embeddings(embeddings: Embeddings, path: Path, overwrite: bool = False) -> None:
    """Write embeddings atomically, in the format of the suffix.

    - `.safetensors`: the tensor `features`, float32 [N, D]; in the metadata `names` (a JSON list), `architecture` and
      `width`. More names than its header holds, millions, are in `NAME.safetensors.names.txt`, one on each line.
    - `.npy`: the features, float32 [N, D]; beside it `NAME.names.txt` with a name on each line.
    - `.parquet`: the columns `path` (string) and `embedding` (list of D float32); `architecture` and `width` in the
      metadata of the schema.

    Raises:
        InputError: As `check_output` does, which is best called before the work.
    """
    check_output(path, overwrite)
    with atomic_files(path.parent) as partial:
        _WRITERS[path.suffix.lower()](embeddings, partial / path.name)


def names_path(path: Path) -> Path:
    """Return the text file of names that belongs to a file of features."""
    # Not one name for both formats, so that both can lie in one folder.
    return path.with_suffix('.names.txt') if path.suffix.lower() == '.npy' else path.with_name(f'{path.name}.names.txt')


def _save_safetensors(embeddings: Embeddings, path: Path) -> None:
    metadata = _metadata(embeddings)
    names = json.dumps(embeddings.names)
    if len(json.dumps(names)) > _HEADER_AT_MOST:
        _save_names(embeddings, path)
    else:
        metadata['names'] = names
    write_safetensors({'features': embeddings.features.contiguous()}, path, metadata)


def _save_npy(embeddings: Embeddings, path: Path) -> None:
    _save_names(embeddings, path)
    with path.open('wb') as file:
        np.save(file, embeddings.features.numpy())


def _save_parquet(embeddings: Embeddings, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    features = embeddings.features
    columns = {
        'path': pa.array(embeddings.names, pa.string()),
        'embedding': pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().reshape(-1)), features.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata(_metadata(embeddings))
    # No number comes twice, so a dictionary would only take time.
    parquet.write_table(table, path, row_group_size=_ROW_GROUP, use_dictionary=False)


def _save_names(embeddings: Embeddings, path: Path) -> None:
    names_path(path).write_text(''.join(f'{name}\n' for name in embeddings.names), encoding='utf-8')


def _metadata(embeddings: Embeddings) -> dict[str, str]:
    width = {} if embeddings.width is None else {'width': f'{embeddings.width:g}'}
    return {'architecture': embeddings.architecture, **width}


_WRITERS: dict[str, Callable[[Embeddings, Path], None]] = {
    '.safetensors': _save_safetensors,
    '.npy': _save_npy,
    '.parquet': _save_parquet,
}
