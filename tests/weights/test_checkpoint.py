"""Checkpoints that others wrote: read, or refused without running what is in them."""

import argparse
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.weights.checkpoint import read_checkpoint

# torch's own remark on newer pickles, and on archives of its own for other purposes.
pytestmark = pytest.mark.filterwarnings('ignore:Detected pickle protocol', 'ignore:.*torch.jit', 'ignore:.*TorchScript')

TENSORS = {'conv1.weight': torch.arange(24.0).reshape(2, 3, 2, 2), 'bn1.num_batches_tracked': torch.tensor(7)}

pytestmark = pytest.mark.usefixtures('nothing_allowed')


def assert_read(path):
    tensors = read_checkpoint(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[name]) for name, value in tensors.items())
    assert all(value.dtype == TENSORS[name].dtype for name, value in tensors.items())


def zipped(content, path, protocol=2):
    torch.save(content, path, pickle_protocol=protocol)


def legacy(content, path, protocol=2):
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def raw(content, path, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))


FORMATS = {'zip': zipped, 'legacy': legacy, 'raw': raw}


# What is read


@pytest.mark.parametrize('write', [zipped, legacy])
@pytest.mark.parametrize(
    'content',
    [
        TENSORS,
        OrderedDict(TENSORS),
        {name: nn.Parameter(value, requires_grad=False) for name, value in TENSORS.items()},
        {'epoch': 200, 'arch': 's_resnet50', 'state_dict': TENSORS, 'optimizer': {'state': {}, 'param_groups': []}},
        {'state_dict': OrderedDict(TENSORS), 'best_acc1': torch.tensor(67.4)},
        {'model': TENSORS, 'args': {'lr': 0.1, 'milestones': (60, 80), 'name': None, 'flag': True}},
        {'model_state_dict': TENSORS, 'rng': {1, 2}},
        {'state_dict': TENSORS, 'args': argparse.Namespace(lr=0.1, opt='sgd', sizes=(3, 4))},
        {'classy_state_dict': {'base_model': {'model': {'trunk': TENSORS, 'heads': {}}}}},
        {**TENSORS, 'epoch': 3},
    ],
)
def test_state_dicts(tmp_path, write, content):
    write(content, tmp_path / 'checkpoint.pth.tar')
    assert_read(tmp_path / 'checkpoint.pth.tar')


@pytest.mark.parametrize('write', [zipped, legacy])
@pytest.mark.parametrize('kind', [*np.typecodes['AllInteger'], *'efd?'])
def test_numpy_scalars(tmp_path, write, kind):
    """The best accuracy is often one, and what keeps losses keeps others."""
    write({'state_dict': TENSORS, 'best_acc1': np.dtype(kind).type(1)}, tmp_path / 'checkpoint.pth.tar')
    assert_read(tmp_path / 'checkpoint.pth.tar')


def test_numpy_scalar_of_numpy_1(tmp_path):
    """numpy 2 has moved the function that makes one."""
    zipped({'state_dict': TENSORS, 'best_acc1': np.float64(67.4)}, tmp_path / 'new.pth.tar')
    with zipfile.ZipFile(tmp_path / 'new.pth.tar') as new, zipfile.ZipFile(tmp_path / 'old.pth.tar', 'w') as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert b'numpy.core.multiarray' in (tmp_path / 'old.pth.tar').read_bytes()
    assert_read(tmp_path / 'old.pth.tar')


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / 'model.safetensors')
    assert_read(tmp_path / 'model.safetensors')


def test_several_tensors_of_one_storage(tmp_path):
    whole = torch.arange(100.0)
    zipped({'a': whole[:60], 'b': whole[40:].reshape(6, 10).T}, tmp_path / 'checkpoint.pth')
    tensors = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert torch.equal(tensors['a'], whole[:60])
    assert torch.equal(tensors['b'], whole[40:].reshape(6, 10).T)


# What is refused


class Runs:
    """Pickled as a call that makes a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(marker):
    return {
        'posix.system': Runs(os.system, f'touch {marker}'),
        'eval': Runs(eval, f'open({str(marker)!r}, "w").close()'),
        'exec': Runs(exec, f'open({str(marker)!r}, "w").close()'),
        'io.open': Runs(open, str(marker), 'w'),
    }


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('write', FORMATS)
@pytest.mark.parametrize('name', malicious(''))
def test_malicious_checkpoint_is_not_run(tmp_path, write, protocol, name):
    marker, path = tmp_path / 'it-ran', tmp_path / 'checkpoint.pth.tar'
    tensors = TENSORS if write != 'raw' else {'weight': [1.0, 2.0]}
    FORMATS[write]({'epoch': 3, 'state_dict': tensors, 'extra': malicious(marker)[name]}, path, protocol)
    with pytest.raises(InputError, match=rf'{name}\b.* was refused and nothing of it was run') as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    if write != 'raw' and protocol == 0:
        return  # which torch writes, but cannot read at all
    with path.open('rb') as file:  # it is as malicious as it is meant to be
        pickle.load(file) if write == 'raw' else torch.load(file, weights_only=False)
    assert marker.exists()


def test_several_that_would_run_are_all_named(tmp_path):
    """Of a newer pickle too, which names each module once."""
    marker = tmp_path / 'it-ran'
    raw([*malicious(marker).values()], tmp_path / 'checkpoint.pth', 4)
    with pytest.raises(InputError, match=r'builtins\.eval, builtins\.exec, io\.open, posix\.system\.'):
        read_checkpoint(tmp_path / 'checkpoint.pth')
    assert not marker.exists()


def test_malicious_state_dict_is_not_run(tmp_path):
    marker = tmp_path / 'it-ran'
    for i, content in enumerate([malicious(marker)['eval'], {'state_dict': malicious(marker)['eval']}]):
        zipped(content, tmp_path / f'{i}.pth')
        with pytest.raises(InputError, match='eval'):
            read_checkpoint(tmp_path / f'{i}.pth')
    assert not marker.exists()


@pytest.mark.parametrize(
    ('extra', 'name'),
    [
        (argparse.ArgumentParser, 'argparse.ArgumentParser'),
        (nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
        (np.ones(3), 'multiarray._reconstruct'),
    ],
)
@pytest.mark.parametrize('write', [zipped, legacy])
def test_objects_are_refused_by_name(tmp_path, write, extra, name):
    write({'state_dict': TENSORS, 'args': extra}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=rf'{name}\. It was refused.*save its state dict alone'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


@pytest.mark.parametrize('content', [[], {}, [*TENSORS.values()], TENSORS['conv1.weight'], 3, {'a': {'b': TENSORS}}])
def test_no_state_dict(tmp_path, content):
    zipped(content, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=r'checkpoint\.pth holds no state dict'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


def test_state_dict_in_a_state_dict(tmp_path):
    zipped({'state_dict': {'state_dict': TENSORS}}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match='holds no state dict'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


def test_no_file(tmp_path):
    for path in tmp_path, tmp_path / 'nowhere.pth', tmp_path / 'nowhere.safetensors':
        with pytest.raises(InputError, match=rf'{path.name} does not exist or is not a file'):
            read_checkpoint(path)


@pytest.mark.parametrize('name', [1, (1, 2), None, b'a'])
def test_a_tensor_without_a_name(tmp_path, name):
    zipped({name: torch.ones(1), **TENSORS}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=r'checkpoint\.pth holds a tensor under .* which is no name'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


FORMS = {
    'sparse': lambda: torch.ones(2, 3).to_sparse(),
    'quantised': lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    'without data': lambda: torch.ones(2, 3, device='meta'),
    'more than the file holds': lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', FORMS)
def test_tensors_of_other_forms(tmp_path, form):
    zipped({**TENSORS, 'conv1.weight': FORMS[form]()}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=rf'conv1\.weight .*{form}'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


# What is damaged


@pytest.mark.parametrize(
    'content',
    [b'', b'\x80', b'\x80\x02', b'PK\x03\x04', b'hello world\n', b'<!DOCTYPE html><html></html>', bytes(1000)],
)
@pytest.mark.parametrize('suffix', ['.pth', '.pth.tar', '.safetensors'])
def test_junk(tmp_path, content, suffix):
    path = tmp_path / f'checkpoint{suffix}'
    path.write_bytes(content)
    with pytest.raises(InputError, match=f'checkpoint{suffix} is (not a checkpoint|not a whole|a PyTorch)'):
        read_checkpoint(path)


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as archive:
        archive.writestr('model/readme.txt', 'nothing')
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 'script.pth')
    for name in 'other.pth', 'script.pth':
        with pytest.raises(InputError, match=f'{name} is not a checkpoint that torch can read'):
            read_checkpoint(tmp_path / name)


def bytes_of(write):
    file = io.BytesIO()
    torch.save({'epoch': 3, 'state_dict': TENSORS}, file, _use_new_zipfile_serialization=write is zipped)
    return file.getvalue()


@pytest.mark.parametrize('write', [zipped, legacy])
def test_truncated_anywhere(tmp_path, write):
    content, path = bytes_of(write), tmp_path / 'checkpoint.pth'
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        # A name that is cut off is a name that is not known.
        with pytest.raises(InputError, match=r'checkpoint\.pth (is not a checkpoint that torch|holds more than)'):
            read_checkpoint(path)


@pytest.mark.parametrize('write', [zipped, legacy])
def test_damaged_anywhere(tmp_path, write):
    """Other numbers are not told from the right ones; whatever else comes out is our own error."""
    content, path, rng = bytes_of(write), tmp_path / 'checkpoint.pth', random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 10))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors = read_checkpoint(path)
        except InputError:
            refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    assert refused > 50


def test_what_others_allowed_stays_allowed(tmp_path):
    """Torch takes back what was allowed for one file, also where it had been allowed before."""
    mine = [np.dtype, type(np.dtype('float64'))]
    torch.save({'state_dict': {'a': torch.ones(2)}}, tmp_path / 'c.pth')
    torch.serialization.add_safe_globals(mine)
    read_checkpoint(tmp_path / 'c.pth')
    assert {*torch.serialization.get_safe_globals()} == {*mine}


# What is larger than it looks


def test_a_compressed_archive(tmp_path):
    """A pickle of a thousandth of its size; torch would unpack it."""
    zipped({**TENSORS, 'note': 'x' * 5_000_000}, tmp_path / 'stored.pth')
    with zipfile.ZipFile(tmp_path / 'stored.pth') as stored, zipfile.ZipFile(tmp_path / 'small.pth', 'w') as small:
        for entry in stored.infolist():
            small.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    assert_read(tmp_path / 'stored.pth')
    with pytest.raises(InputError, match=r'small\.pth is compressed'):
        read_checkpoint(tmp_path / 'small.pth')


class Called:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('write', [zipped, legacy, raw])
def test_memory_that_a_number_asks_for(tmp_path, write):
    write({**TENSORS, 'more': Called(bytearray, 10**12)}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=r'checkpoint\.pth holds a \w+\.bytearray, which may be of any size'):
        read_checkpoint(tmp_path / 'checkpoint.pth')


def test_a_tensor_that_is_not_in_the_file(tmp_path):
    zipped({**TENSORS, 'more': Called(torch.Tensor, 1000, 1000)}, tmp_path / 'checkpoint.pth')
    with pytest.raises(InputError, match=r'checkpoint\.pth holds tensors that are larger than the file'):
        read_checkpoint(tmp_path / 'checkpoint.pth')
