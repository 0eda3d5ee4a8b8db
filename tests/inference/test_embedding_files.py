import json
import sys

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open

from slimclr_hub.errors import InputError
from slimclr_hub.inference import embed
from slimclr_hub.inference.embed import Embeddings, check_output, save_embeddings

NAMES = ['cat/1.png', 'naïve, "quoted".png', '目録/2.png']
SUFFIXES = ('.safetensors', '.npy', '.parquet')


def some_embeddings(width: float | None = 0.5) -> Embeddings:
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))[:3]
    return Embeddings(NAMES, features, 'slimclr_resnet20', width, [])


def read_safetensors(path):
    with safe_open(path, 'pt') as file:
        assert list(file.keys()) == ['features']
        return file.get_tensor('features'), file.metadata()


def test_safetensors(tmp_path):
    embeddings = some_embeddings()
    save_embeddings(embeddings, tmp_path / 'out.safetensors')
    features, metadata = read_safetensors(tmp_path / 'out.safetensors')
    assert features.equal(embeddings.features)
    assert features.dtype == torch.float32
    assert json.loads(metadata.pop('names')) == NAMES
    assert metadata == {'architecture': 'slimclr_resnet20', 'width': '0.5'}
    assert [path.name for path in tmp_path.iterdir()] == ['out.safetensors']


def test_more_names_than_a_header_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, '_HEADER_AT_MOST', 20)
    save_embeddings(some_embeddings(None), tmp_path / 'out.safetensors')
    _, metadata = read_safetensors(tmp_path / 'out.safetensors')
    assert metadata == {'architecture': 'slimclr_resnet20'}
    assert (tmp_path / 'out.safetensors.names.txt').read_text(encoding='utf-8').splitlines() == NAMES


def test_npy(tmp_path):
    embeddings = some_embeddings()
    save_embeddings(embeddings, tmp_path / 'out.v1.NPY')
    features = np.load(tmp_path / 'out.v1.NPY')
    assert np.array_equal(features, embeddings.features)
    assert features.dtype == np.float32
    assert (tmp_path / 'out.v1.names.txt').read_text(encoding='utf-8').splitlines() == NAMES
    assert len(list(tmp_path.iterdir())) == 2


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, '_ROW_GROUP', 2)
    embeddings = some_embeddings()
    save_embeddings(embeddings, tmp_path / 'out.parquet')
    table = parquet.read_table(tmp_path / 'out.parquet')
    assert {field.name: str(field.type) for field in table.schema} == {
        'path': 'string',
        'embedding': 'fixed_size_list<element: float>[7]',
    }
    assert table['path'].to_pylist() == NAMES
    assert np.array_equal(np.array(table['embedding'].to_pylist(), dtype=np.float32), embeddings.features)
    assert table.schema.metadata == {b'architecture': b'slimclr_resnet20', b'width': b'0.5'}
    assert parquet.ParquetFile(tmp_path / 'out.parquet').num_row_groups == 2


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_nothing_is_overwritten_unless_asked(tmp_path, suffix):
    path = tmp_path / 'new' / f'out{suffix}'
    check_output(path)
    assert list(path.parent.iterdir()) == []
    save_embeddings(some_embeddings(), path)
    before = path.read_bytes()
    other = Embeddings(NAMES[:1], torch.zeros(1, 7), 'slimclr_resnet20', 0.25, [])
    for call in (lambda: check_output(path)), (lambda: save_embeddings(other, path)):
        with pytest.raises(InputError, match=f'out{suffix} is there already; choose another name, or give --overwrite'):
            call()
    assert path.read_bytes() == before
    check_output(path, overwrite=True)
    assert path.read_bytes() == before
    save_embeddings(other, path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_others_may_read_the_file_as_any_other(tmp_path, suffix):
    save_embeddings(some_embeddings(), tmp_path / f'out{suffix}')
    (tmp_path / 'any').touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ('suffix', 'names'), [('.npy', 'out.names.txt'), ('.safetensors', 'out.safetensors.names.txt')]
)
def test_names_of_somebody_else_are_not_overwritten(tmp_path, suffix, names):
    (tmp_path / names).write_text('mine')
    with pytest.raises(InputError, match=f'{names} is there already'):
        check_output(tmp_path / f'out{suffix}')


def test_formats_of_one_name_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, '_HEADER_AT_MOST', 20)
    for suffix in SUFFIXES:
        save_embeddings(some_embeddings(), tmp_path / f'out{suffix}')
    files = {*(f'out{suffix}' for suffix in SUFFIXES), 'out.names.txt', 'out.safetensors.names.txt'}
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize('name', ['out.csv', 'out', 'out.npz'])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(InputError, match=r"the suffix '.*' is not one of .safetensors, .npy, .parquet"):
        check_output(tmp_path / 'new' / name)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / 'folder.npy').mkdir()
    with pytest.raises(InputError, match=r'folder\.npy is a folder'):
        check_output(tmp_path / 'folder.npy', overwrite=True)
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match=r'the folder .*file takes no files'):
        check_output(tmp_path / 'file' / 'out.npy')


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(InputError, match=r'out\.parquet: parquet needs pyarrow; pip install pyarrow'):
        check_output(tmp_path / 'out.parquet')
    check_output(tmp_path / 'out.npy')


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_atomic_files_or_not_at_all(tmp_path, monkeypatch, suffix):
    path = tmp_path / f'out{suffix}'
    save_embeddings(some_embeddings(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = embed._WRITERS[suffix]

    def full_disk(embeddings, partial):
        write(embeddings, partial)
        raise OSError('No space left on device')

    monkeypatch.setitem(embed._WRITERS, suffix, full_disk)
    with pytest.raises(OSError, match='No space'):
        save_embeddings(Embeddings(['x'], torch.zeros(1, 7), 'a', None, []), path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
