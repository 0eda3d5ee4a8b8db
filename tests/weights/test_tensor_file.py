"""Safetensors files: read by slices, written whole."""

import json
import os
import pickle
import random
import resource
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimclr_hub.errors import InputError
from slimclr_hub.hub import formats
from slimclr_hub.inference.embed import Embeddings, save_embeddings
from slimclr_hub.weights.checkpoint import read_checkpoint
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

SHAPES = {
    'conv': (64, 48, 3, 3),
    'point': (300, 256, 1, 1),
    'linear': (1000, 512),
    'norm': (2048,),
    'batches': (),
    'nothing': (0, 4),
    'cube': (5, 6, 7),
    'large': (3000, 500),
}


NUMBERS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8]
NUMBERS += [torch.int64, torch.int32, torch.int16, torch.int8]


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {**tensors, 'half': tensors['conv'].half(), 'brain': tensors['linear'].bfloat16(), 'count': torch.tensor(77)}


@pytest.fixture(scope='module')
def tensors():
    return make()


@pytest.fixture(scope='module')
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp('tensors') / 'model.safetensors'
    save_file(tensors, path, metadata={'format': 'pt', 'architecture': 'none'})
    return path


def assert_equal(read, expected):
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)


# Reading


def test_names_and_shapes(path, tensors):
    with TensorFile(path) as file:
        assert file.shapes == {name: tuple(value.shape) for name, value in tensors.items()}


def test_without_metadata(tmp_path):
    save_file({'a': torch.ones(3)}, tmp_path / 'bare.safetensors')
    with TensorFile(tmp_path / 'bare.safetensors') as file:
        assert file.shapes == {'a': (3,)}


def test_whole(path, tensors):
    with TensorFile(path) as file:
        for name, value in tensors.items():
            assert_equal(file.whole(name), value)


def random_part(tensors, rng):
    """A tensor's name and some of its rows, columns and so on."""
    name = rng.choice([name for name, value in tensors.items() if value.numel()])
    index = []
    for n in tensors[name].shape[: rng.randint(0, tensors[name].ndim)]:
        start = rng.randrange(n + 1)
        index.append(slice(start, rng.randint(start, n)))
    return name, tuple(index)


@pytest.mark.parametrize('seed', range(3))
def test_parts_are_slices(path, tensors, seed):
    """Those that were read before stay what they were, after the file is closed too."""
    rng, reads = random.Random(seed), []
    with TensorFile(path) as file:
        for _ in range(300):
            name, index = random_part(tensors, rng)
            reads.append((file.part(name, index), tensors[name][index]))
    for read, expected in reads:
        assert_equal(read, expected)


def test_parts_that_are_read_in_several_blocks(path, tensors):
    """A large tensor's columns come with whole rows, of which a mebibyte is read at a time."""
    assert tensors['large'].nbytes > 5 << 20
    with TensorFile(path) as file:
        for rows in slice(0, 3000), slice(700, 2999), slice(2998, 3000), slice(5, 6):
            for columns in slice(0, 100), slice(250, 500), slice(0, 500):
                assert_equal(file.part('large', (rows, columns)), tensors['large'][rows, columns])


def test_parts_by_open_and_negative_bounds(path, tensors):
    with TensorFile(path) as file:
        for part in slice(None), slice(3), slice(-2, None), slice(1, -1), slice(2, 2), slice(3, 1), slice(0, 99):
            assert_equal(file.part('cube', (part, slice(None), part)), tensors['cube'][part, :, part])
        assert_equal(file.part('nothing', (slice(0), slice(1, 3))), tensors['nothing'][:0, 1:3])
        assert_equal(file.part('batches', []), tensors['batches'])


LAYOUTS = {
    'contiguous': lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    'view': lambda shape, dtype: torch.zeros([n + 2 for n in shape], dtype=dtype)[tuple(slice(1, -1) for _ in shape)],
    'channels_last': lambda shape, dtype: torch.zeros(shape, dtype=dtype).to(
        memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format
    ),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_copies_the_leading_block(path, tensors, layout, dtype):
    with TensorFile(path) as file:
        for name, value in tensors.items():
            for share in 1.0, 0.5, 0.0:
                shape = [int(n * share) if i < 2 else n for i, n in enumerate(value.shape)]
                target = LAYOUTS[layout](shape, dtype)
                strides = target.stride()
                file.copy_leading(name, target)
                assert_equal(target, value[tuple(slice(0, n) for n in shape)].to(dtype))
                assert target.stride() == strides


def test_copies_into_parameters(path, tensors):
    """As they are in a network, which asks for gradients."""
    with TensorFile(path) as file:
        for shape in (1000, 512), (10, 20):
            parameter = torch.nn.Parameter(torch.zeros(shape))
            file.copy_leading('linear', parameter.detach())
            assert parameter.requires_grad
            assert_equal(parameter.detach(), tensors['linear'][: shape[0], : shape[1]])


def test_copies_nothing_beside_the_target(path, tensors):
    around = torch.full((70, 60, 3, 3), 5.0)
    with TensorFile(path) as file:
        file.copy_leading('conv', around[:64, :48])
        file.copy_leading('norm', around.flatten()[-2048:])
    assert_equal(around[:64, :48], tensors['conv'])
    assert_equal(around.flatten()[-2048:], tensors['norm'])
    assert (around[:64, 48:] == 5).all()


def test_a_map_is_sent_as_its_place(tmp_path):
    """To a process that is not forked; parts of it, and copies, go as other arrays."""
    rows = torch.arange(6000.0).view(1000, 6)
    save_tensors({'before': torch.zeros(3), 'rows': rows}, tmp_path / 'rows.safetensors')
    with TensorFile(tmp_path / 'rows.safetensors') as file:
        mapped = file.mapped('rows')
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000
    for _ in range(2):
        again = pickle.loads(sent)
        assert np.array_equal(again, rows.numpy())
        sent = pickle.dumps(again)
    for part in mapped[5:9], mapped[3], mapped[[1, 2]], mapped[5:9].copy():
        assert np.array_equal(pickle.loads(pickle.dumps(part)), part)


# What cannot be read


@pytest.mark.parametrize('name', ['nowhere.safetensors', ''])
def test_no_file(tmp_path, name):
    with pytest.raises(InputError, match='does not exist or is not a file'):
        TensorFile(tmp_path / name)


def test_truncated(path, tmp_path):
    content = path.read_bytes()
    for length in 0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1:
        (tmp_path / 'short.safetensors').write_bytes(content[:length])
        with pytest.raises(InputError, match=r'short\.safetensors is not a whole safetensors file; it is truncated'):
            TensorFile(tmp_path / 'short.safetensors')


def test_too_long(path, tmp_path):
    (tmp_path / 'long.safetensors').write_bytes(path.read_bytes() + b'more')
    with pytest.raises(InputError, match='not a whole safetensors file'):
        TensorFile(tmp_path / 'long.safetensors')


@pytest.mark.parametrize(
    'content',
    [
        b'hello world, this is no safetensors file',
        struct.pack('<Q', 1 << 60) + b'{}',
        struct.pack('<Q', 20) + b'{"a": [not json     ',
        struct.pack('<Q', 60) + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4000000]}}',
        struct.pack('<Q', 52) + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0]}}',
        bytes(200),
    ],
)
def test_junk(tmp_path, content):
    (tmp_path / 'junk.safetensors').write_bytes(content)
    with pytest.raises(InputError, match=r'junk\.safetensors is not a whole safetensors file.*of another format'):
        TensorFile(tmp_path / 'junk.safetensors')


def test_pickles_are_told(tmp_path, tensors):
    torch.save(tensors, tmp_path / 'zip.safetensors')
    torch.save(tensors, tmp_path / 'old.safetensors', _use_new_zipfile_serialization=False)
    (tmp_path / 'raw.safetensors').write_bytes(pickle.dumps({'a': 1}))
    for name in 'zip', 'old', 'raw':
        with pytest.raises(InputError, match=rf'{name}\.safetensors is a PyTorch checkpoint.*`slimclr-hub convert`'):
            TensorFile(tmp_path / f'{name}.safetensors')


def test_kinds_of_numbers(tmp_path):
    """All that a network may be kept in; others are refused by name."""
    numbers = {str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in NUMBERS}
    save_tensors(numbers, tmp_path / 'model.safetensors')
    with TensorFile(tmp_path / 'model.safetensors') as file:
        for name, value in numbers.items():
            assert_equal(file.whole(name), value)
    save_tensors({'ours': torch.ones(3), 'scale': torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / 'eight')
    with pytest.raises(InputError, match='eight: scale is of type F8_E4M3, not one of F64, '):
        TensorFile(tmp_path / 'eight')


@pytest.mark.parametrize('shape', [[0, 2**63], [2**62, 2**62, 0], [2**40, 0, 2**40]])
def test_shapes_without_data_beyond_all_tensors(tmp_path, shape):
    header = json.dumps({'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, 0]}}).encode()
    file = tmp_path / 'large.safetensors'
    file.write_bytes(struct.pack('<Q', len(header)) + header)
    for read in TensorFile, read_checkpoint:
        with pytest.raises(InputError, match=r'large\.safetensors'):
            read(file)


def test_becomes_shorter_while_it_is_read(path, tmp_path):
    copy = tmp_path / 'copy.safetensors'
    copy.write_bytes(path.read_bytes())
    with TensorFile(copy) as file:
        os.truncate(copy, 5000)
        with pytest.raises(InputError, match=r'copy\.safetensors became shorter'):
            file.whole('large')


@contextmanager
def without_rights():
    """As nobody, if this is root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


@pytest.mark.parametrize('locked', ['secret', 'secret/model.safetensors', 'secret/model.pth'])
def test_unreadable(locked):
    with tempfile.TemporaryDirectory() as name:  # pytest's own are root's alone
        folder = Path(name)
        (folder / 'secret').mkdir()
        save_tensors({'a': torch.ones(3)}, folder / 'secret/model.safetensors')
        torch.save({'a': torch.ones(3)}, folder / 'secret/model.pth')
        folder.chmod(0o755)
        (folder / locked).chmod(0)
        for path in (folder / locked).glob('*') if (folder / locked).is_dir() else [folder / locked]:
            with without_rights(), pytest.raises(InputError, match=rf'{path} cannot be read: Permission denied'):
                read_checkpoint(path)
        (folder / locked).chmod(0o755)


# Writing


def test_saves_and_reads_back(tmp_path, tensors):
    save_tensors(tensors, tmp_path / 'model.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
    with TensorFile(tmp_path / 'model.safetensors') as file:
        assert file.shapes.keys() == tensors.keys()
        for name in file.shapes:
            assert_equal(file.whole(name), tensors[name])


def test_saves_views_and_other_layouts(tmp_path):
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    tensors = {
        'x': x,
        'same': x,
        'part': x[1:],
        'overlap': x.flatten()[10:90],
        'transposed': x.transpose(0, 1),
        'narrow': x[:, :, 1:3],
        'expanded': torch.ones(1).expand(7),
        'channels_last': x.to(memory_format=torch.channels_last),
        'parameter': torch.nn.Parameter(x),
    }
    save_tensors(tensors, tmp_path / 'model.safetensors')
    read = load_file(tmp_path / 'model.safetensors')
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_equal(read[name], value.detach())


def test_replaces(tmp_path):
    target = tmp_path / 'model.safetensors'
    save_tensors(make(0), target)
    with TensorFile(target) as before:
        save_tensors(make(1), target)
        assert_equal(before.whole('linear'), make(0)['linear'])  # what is open stays as it was
    assert_equal(load_file(target)['linear'], make(1)['linear'])
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']


def test_a_file_replaces_itself(tmp_path, tensors):
    """Its tensors are backed by the file that is replaced."""
    target = tmp_path / 'model.safetensors'
    save_tensors(tensors, target)
    save_tensors(load_file(target), target)
    for name, value in load_file(target).items():
        assert_equal(value, tensors[name])


@pytest.mark.parametrize(('mask', 'mode'), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_tensors({'a': torch.ones(3)}, tmp_path / 'model.safetensors')
    finally:
        os.umask(before)
    assert (tmp_path / 'model.safetensors').stat().st_mode & 0o777 == mode


@pytest.fixture
def full_disk():
    """A limit on the size of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('there', [False, True])
def test_whole_or_not_at_all(tmp_path, there, full_disk):
    target = tmp_path / 'model.safetensors'
    if there:
        save_tensors({'a': torch.ones(3)}, target)
    with pytest.raises(OSError, match='File too large'):
        save_tensors({'a': torch.zeros(1_000_000)}, target)
    assert [path.name for path in tmp_path.iterdir()] == (['model.safetensors'] if there else [])
    assert not there or torch.equal(load_file(target)['a'], torch.ones(3))


def test_every_writer_tells_of_a_full_disk(tmp_path, full_disk):
    with pytest.raises(OSError, match='File too large'):
        formats.save_tensors({'a': torch.zeros(1_000_000)}, tmp_path / 'a.pth')
    with pytest.raises(OSError, match='File too large'):
        save_embeddings(Embeddings(['x'], torch.zeros(1, 1_000_000), 'y', 1.0, []), tmp_path / 'a.safetensors')
    assert [*tmp_path.iterdir()] == []


def test_tensors_that_cannot_be_written(tmp_path):
    target = tmp_path / 'model.safetensors'
    save_tensors({'a': torch.ones(3)}, target)
    with pytest.raises(NotImplementedError):
        save_tensors({'a': torch.empty(3, device='meta')}, target)
    with pytest.raises(TypeError):
        save_tensors({'a': torch.zeros(3)}, target, {'epoch': 3})
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
    assert torch.equal(load_file(target)['a'], torch.ones(3))
