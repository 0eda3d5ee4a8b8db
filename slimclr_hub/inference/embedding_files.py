"""Embeddings as files: safetensors, npy and parquet."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slimclr_hub.errors import InputError
from slimclr_hub.files import written_whole
from slimclr_hub.inference.embed import Embeddings

_HEADER_AT_MOST = 90_000_000  # safetensors opens no file with a header of more than 100 MB
_ROW_GROUP = 4096


def check_output(path: Path, overwrite: bool = False) -> None:
    """Find out before any work whether embeddings can be written to `path`; its folder is made if it is not there.

    Args:
        path: What `save_embeddings` is to write.
        overwrite: Whether a file may be there already.

    Raises:
        InputError: The suffix is unknown, what writes it is not installed, the file is there already, or the folder
            cannot be written to.
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
            raise InputError(f'{file} is there already; choose another name or set overwrite')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix='.partial-'):
            pass
    except OSError as error:
        raise InputError(f'cannot write to {path.parent}: {error.strerror}') from error


def save_embeddings(embeddings: Embeddings, path: Path, overwrite: bool = False) -> None:
    """Write embeddings in the format that the suffix names, whole or not at all.

    - `.safetensors`: the tensor `features`, float32 [N, D]; in the metadata `names` (a JSON list), `architecture` and
      `width`. Where there are more names than safetensors opens, millions, they are beside it as for npy.
    - `.npy`: the features, float32 [N, D]; beside it `NAME.names.txt` with a name on each line.
    - `.parquet`: the columns `path` (string) and `embedding` (list of D float32); `architecture` and `width` in the
      metadata of the schema.

    Args:
        embeddings: What to write.
        path: The file, in a folder that is made if it is not there.
        overwrite: Replace a file that is there already.

    Raises:
        InputError: As `check_output` says, which is best asked before the work.
    """
    check_output(path, overwrite)
    with written_whole(path.parent) as partial:
        _WRITERS[path.suffix.lower()](embeddings, partial / path.name)


def names_path(path: Path) -> Path:
    """The text file of names that belongs to a file of features."""
    return path.with_suffix('.names.txt')


def _save_safetensors(embeddings: Embeddings, path: Path) -> None:
    from safetensors.torch import save_file

    metadata = _metadata(embeddings)
    names = json.dumps(embeddings.names)
    if len(json.dumps(names)) > _HEADER_AT_MOST:
        _save_names(embeddings, path)
    else:
        metadata['names'] = names
    save_file({'features': embeddings.features.contiguous()}, path, metadata)


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
