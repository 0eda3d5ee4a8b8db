"""Weights in parts: splitting and joining as inverse of each other, and an index that nobody trusts."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import shapes_at
from slimclr_hub.weights.progressive import INDEX, PartFiles, encode, join, read_index, split
from slimclr_hub.weights.tensor_file import TensorFile
from tests.networks import randomise_batchnorm

SHA = 'a' * 64


def make(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', zero_init_last=False, **kwargs)
    randomise_batchnorm(model)
    return model


def nested(model):
    """Shapes of the network of the narrowest width, of the two narrowest, ..."""
    return [shapes_at(model, model.widths[i:]) for i in reversed(range(len(model.widths)))]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


NETWORKS = [
    {},
    {'num_classes': 0},
    {'head': 'slimmable'},
    {'global_pool': 'catavgmax'},
    {'in_chans': 1},
    {'widths': (1.0, 0.8, 0.55, 0.3, 0.1)},
    {'widths': (0.5, 0.25)},
    {'widths': (0.7,)},
]


@pytest.mark.parametrize('kwargs', NETWORKS, ids=str)
def test_join_is_the_inverse_of_split(kwargs):
    model = make(**kwargs)
    tensors = model.state_dict()
    parts = split(tensors, nested(model))
    assert len(parts) == len(model.widths)
    assert_equal(join(parts), tensors)
    assert sum(t.numel() for part in parts for t in part.values()) == sum(t.numel() for t in tensors.values())
    for count, width in enumerate(
        reversed(model.widths), start=1
    ):  # the parts up to a width are a network of their own
        narrow = timm.create_model('slimclr_resnet20', **{**kwargs, 'widths': model.widths[-count:]})
        narrow.load_state_dict(join(parts[:count]))
        x = torch.randn(1, kwargs.get('in_chans', 3), 32, 32)
        assert torch.equal(narrow.eval().forward_at(x, width), model.eval().forward_at(x, width))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_files(tmp_path, dtype):
    model = make().to(dtype)
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    files = encode(path, dict(zip(reversed(model.widths), nested(model), strict=True)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    index = read_index(tmp_path / INDEX)
    assert index.widths == model.widths
    assert index.size == path.stat().st_size
    assert {f'progressive/{part.file}': part.size for part in index.parts} == {
        name: len(content) for name, content in files.items() if name != INDEX
    }
    parts = [tmp_path / 'progressive' / part.file for part in index.parts]
    with TensorFile(path) as whole, PartFiles(tmp_path / INDEX, index.widths, parts) as file:
        assert (file.shapes, file.dtypes) == (whole.shapes, whole.dtypes)
        for name, shape in whole.shapes.items():
            assert torch.equal(file.whole(name), whole.whole(name))
            block = [slice(n // 3, n) for n in shape[:2]]
            assert torch.equal(file.part(name, block), whole.part(name, block))
            target = torch.zeros([n // 2 for n in shape])
            file.copy_leading(name, target)
            assert torch.equal(target, whole.part(name, [slice(0, n // 2) for n in shape]).float())
    assert encode(path, dict(zip(reversed(model.widths), nested(model), strict=True))) == files


MISFITS = {
    'a block twice': ({'a': (4, 2)}, 'a is in two parts'),
    'of nothing': ({'b.below': (1, 2)}, 'b.below extends a tensor that is in no part before'),
    'too few columns': ({'a.below': (1, 1)}, 'a.below has shape [1, 1], which does not fit beside [2, 2]'),
    'before the right': ({'a.right': (2, 1), 'a.below': (1, 2)}, 'a.below has shape [1, 2]'),
    'too many rows': ({'a.right': (3, 1)}, 'a.right has shape [3, 1]'),
    'dimensions': ({'a.right': (2, 1, 1)}, 'a.right has shape [2, 1, 1]'),
    'numbers': ({'n.right': ()}, 'n.right has shape [], which does not fit beside []'),
    'vectors': ({'v.below': (1,)}, 'v.below has shape [1], which does not fit beside [3]'),
}


@pytest.mark.parametrize('case', MISFITS)
def test_parts_that_do_not_fit(case, tmp_path):
    shapes, words = MISFITS[case]
    parts = [{'a': torch.ones(2, 2), 'v': torch.ones(3), 'n': torch.tensor(1)}]
    parts.append({name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(InputError, match=re.escape(words)):
        join(parts)
    paths = [tmp_path / f'{i}.safetensors' for i in range(2)]
    for part, path in zip(parts, paths, strict=True):
        save_file(part, path)
    with pytest.raises(InputError, match=re.escape(words)):
        PartFiles(tmp_path / INDEX, (1.0, 0.5), paths)


def test_parts_of_different_types(tmp_path):
    save_file({'a': torch.ones(2, 2)}, tmp_path / 'a')
    save_file({'a.below': torch.ones(2, 2, dtype=torch.float16)}, tmp_path / 'b')
    with pytest.raises(InputError, match=r'a\.below is of torch\.float16, not torch\.float32'):
        PartFiles(tmp_path / INDEX, (1.0, 0.5), [tmp_path / 'a', tmp_path / 'b'])


# The index


def about(width=0.25, **entries):
    return {'width': width, 'file': f'w{int(100 * width):03}.safetensors', 'size': 9, 'sha256': SHA, **entries}


def with_part(**entries):
    return {'size': 9, 'sha256': SHA, 'parts': [about(**entries)]}


HOSTILE = {
    'no JSON': (b'{', 'is not JSON'),
    'no text': (b'\xff\xfe\xfd', 'is not JSON'),
    'deep': (b'[' * 200_000, 'is not JSON'),
    'large': (b' ' * ((1 << 20) + 1), 'more than 1048576'),
    'empty': ({}, 'is no index'),
    'a list': ([], 'is no index'),
    'no parts': ({'size': 9, 'sha256': SHA, 'parts': []}, 'is no index'),
    'parts by name': ({'size': 9, 'sha256': SHA, 'parts': {'a': 1}}, 'is no index'),
    'a thousand parts': ({'size': 9, 'sha256': SHA, 'parts': [about()] * 1000}, 'is no index'),
    'no part': ({'size': 9, 'sha256': SHA, 'parts': ['w025']}, 'None is not a width'),
    'a path upwards': (with_part(file='../w025.safetensors'), "is '../w025.safetensors', not w025.safetensors"),
    'a path': (with_part(file='/etc/passwd'), "is '/etc/passwd', not w025.safetensors"),
    'an address': (with_part(file='https://example.org/w025.safetensors'), 'not w025.safetensors'),
    "another width's file": (with_part(file='w050.safetensors'), 'not w025.safetensors'),
    'no file': (with_part(file=None), 'is None, not w025.safetensors'),
    'width 0': (with_part(width=0.0), '0.0 is not a width'),
    'width 2': (with_part(width=2.0), '2.0 is not a width'),
    'no number': (with_part(width=0.5) | {'parts': [{**about(), 'width': float('nan')}]}, 'nan is not a width'),
    'many decimals': ({'size': 9, 'sha256': SHA, 'parts': [{**about(), 'width': 0.123456}]}, 'is not a width'),
    'a width in words': ({'size': 9, 'sha256': SHA, 'parts': [{**about(), 'width': 'x' * 500}]}, 'is not a width'),
    'a width twice': ({'size': 9, 'sha256': SHA, 'parts': [about(), about()]}, 'do not ascend'),
    'widths that descend': ({'size': 9, 'sha256': SHA, 'parts': [about(0.5), about()]}, 'do not ascend'),
    'negative size': (with_part(size=-1), '-1 is not a number of bytes'),
    'size true': (with_part(size=True), 'True is not a number of bytes'),
    'size 1.5': (with_part(size=1.5), '1.5 is not a number of bytes'),
    'no hash': (with_part(sha256=None), 'None is not a sha256'),
    'a short hash': (with_part(sha256='a' * 63), 'is not a sha256'),
    'a hash of a path': (with_part(sha256='../' * 21 + 'a'), 'is not a sha256'),
    'no hash of the whole': ({**with_part(), 'sha256': 7}, '7 is not a sha256'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_index(tmp_path, case):
    content, words = HOSTILE[case]
    path = tmp_path / 'index.json'
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError) as caught:
        read_index(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    path.write_text(json.dumps(with_part()))
    assert [part.file for part in read_index(path).parts] == ['w025.safetensors']
