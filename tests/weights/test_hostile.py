"""Repositories, caches and folders that were made to mislead whoever loads from them."""

import itertools
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from slimclr_hub import cli
from slimclr_hub.files import write_text
from slimclr_hub.hub.folder import save_folder
from tests.hub_server import sha1, sha256
from tests.weights.client import digest
from tests.weights.conftest import is_refused, make

SMALL = 'slimclr_resnet20'
NUMBERS = itertools.count()


@pytest.fixture(scope='module')
def network():
    return make(SMALL, num_classes=3)


@pytest.fixture
def name():
    return f'hostile/net-{next(NUMBERS)}'


@pytest.fixture(scope='module')
def folder(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile') / 'network'
    save_folder(network, folder, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, card='# A card\n')
    return folder


def changed(folder, **entries):
    """Text of the folder's config.json with other entries in its `pretrained_cfg`."""
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(entries)
    return json.dumps(config)


# A config.json that names other sources


def test_tensors_and_paths_of_a_config_on_the_hub_are_ignored(hub, client, cache, name, network, folder):
    weights = (folder / 'model.safetensors').read_bytes()
    config = changed(folder, state_dict={'a': 1}, file='/etc/passwd', source='local-dir')
    hub.add_repo(name, {'config.json': config, 'model.safetensors': weights})
    answer = client('create', f'hf-hub:{name}', cache_dir=str(cache))
    assert answer.value == digest(network.state_dict()), answer.message
    assert len(answer.sources) == 1
    hub.add_repo(name, {'config.json': config, 'model.safetensors': os.urandom(len(weights))})
    hub.lie(f'/{name}/resolve/*/model.safetensors', etag=sha256(weights))
    answer = client('create', f'hf-hub:{name}', cache_dir=str(cache / 'other'))
    assert is_refused(answer, name, f'not {sha256(weights)} as the Hub says')


@pytest.mark.parametrize('entries', [{'state_dict': {'a': 1}}, {'hf_hub_filename': 'pytorch_model.bin'}])
def test_a_repository_of_pickles_is_not_loaded(hub, client, cache, name, network, folder, tmp_path, entries):
    torch.save(network.state_dict(), tmp_path / 'pytorch_model.bin')
    pickled = (tmp_path / 'pytorch_model.bin').read_bytes()
    hub.add_repo(name, {'config.json': changed(folder, **entries), 'pytorch_model.bin': pickled})
    assert is_refused(client('create', f'hf-hub:{name}', cache_dir=str(cache)), name, 'only safetensors')


def test_a_folder_from_elsewhere_is_loaded_by_its_own_file(client, folder, network, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    (tmp_path / 'config.json').write_text(changed(folder, state_dict={'a': 1}, file='/etc/passwd'))
    answer = client('create', f'local-dir:{tmp_path}')
    assert answer.value == digest(network.state_dict()), answer.message
    assert answer.sources == [f'Weights from the file {tmp_path / "model.safetensors"}']


def test_tensors_of_the_callers_own_come_first(folder, network):
    """Also where the name has a source, which timm itself prefers."""
    import timm

    tensors = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay={'state_dict': tensors})
    assert digest(model.state_dict()) == digest(tensors)


ESCAPES = '\x1b]0;a title\x07\x1b[2J\u202e'


@pytest.fixture
def shown(capfd, monkeypatch):
    """Runs the command as a user does: its exit status, what it printed and its one line of an error."""

    def run(*argv):
        monkeypatch.setattr('sys.argv', ['slimclr-hub', *map(str, argv)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        assert not {'\x1b', '\x07', '\u202e'} & {*out, *err}
        return status, out, err.splitlines()[-1] if err else ''

    return run


def test_a_terminal_is_told_nothing_by_what_others_wrote(shown, folder, network, tmp_path):
    names = ('tag', 'description', 'license', 'origin_url')
    config = changed(folder, **dict.fromkeys(names, ESCAPES))
    net = tmp_path / f'net{ESCAPES.replace("/", "")}'
    net.mkdir()
    (net / 'config.json').write_text(config)
    (net / 'README.md').write_text('# A card\n')
    (net / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    status, out, _ = shown('info', net)
    assert status == 0
    assert all(f'{name}: \\x1b]0;a title\\x07\\x1b[2J\\u202e' in out for name in names)
    status, out, _ = shown('push', net, 'me/net', '--dry-run')
    assert status == 0
    assert '\\x1b[2J' in out
    save_file({**network.state_dict(), ESCAPES: torch.ones(1)}, net / 'model.safetensors')
    status, _, line = shown('info', net)
    assert status == 1
    assert 'unexpected \\x1b]0;a title' in line


def test_a_value_of_thousands_of_characters_leaves_the_remedy_in_sight(shown, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'x' * 5000}))
    status, _, line = shown('info', tmp_path)
    assert status == 1
    assert re.search(rf'{re.escape(str(tmp_path))} is a x+ \.\.\. x+, not a slimmable network$', line)
    assert len(line) < 4000


OTHERS = """
{"pretrained_cfg": []}
{"pretrained_cfg": null}
{"pretrained_cfg": "x"}
{"pretrained_cfg": {"mean": "x"}}
{"pretrained_cfg": {"mean": [NaN, 0, 0]}}
{"pretrained_cfg": {"std": [0, 1, 1]}}
{"pretrained_cfg": {"std": [1e999, 1, 1]}}
{"pretrained_cfg": {"std": [1000000000, 1, 1]}}
{"pretrained_cfg": {"input_size": [null]}}
{"pretrained_cfg": {"crop_pct": "x"}}
{"pretrained_cfg": {"crop_pct": 1e-9}}
{"pretrained_cfg": {"crop_pct": NaN}}
{"pretrained_cfg": {"interpolation": "x"}}
{"pretrained_cfg": {"crop_mode": ["x"]}}
{"model_args": []}
{"model_args": null}
{"model_args": {"global_pool": "x"}}
{"model_args": {"widths": "x"}}
{"model_args": {"in_chans": -3}}
{"model_args": {"in_chans": 1000000000}}
{"model_args": {"layers": [1000000, 3, 3]}}
{"model_args": {"layers": [1, 1, 1], "channels": [4000, 4000, 4000]}}
{"model_args": {"num_classes": 1000000000}}
{"model_args": {"widths": [1.0, 0.0001]}}
{"pretrained_cfg": {"input_size": [3, 10000000, 10000000]}}
{"num_classes": []}
{"num_classes": 10000000}
{"label_names": 3}
{"label_names": [[1]]}
{"label_names": ["a"], "label_descriptions": {"b": "c"}}
"""


@pytest.mark.parametrize('text', OTHERS.split('\n')[1:-1])
def test_a_config_of_other_types_is_one_line(shown, folder, tmp_path, text):
    net, entries = shutil.copytree(folder, tmp_path / 'net'), json.loads(text)
    config = {**json.loads((net / 'config.json').read_text()), **entries}
    (net / 'config.json').write_text(json.dumps(config))
    status, _, line = shown('info', net)
    assert status == 1
    assert any(word in line for word in (str(net), 'num_classes', 'width', 'in_chans'))


@pytest.mark.parametrize('kind', ['int32', 'bool', 'nan', 'inf'])
@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_a_folder_of_no_real_numbers_is_one_line(shown, folder, network, tmp_path, kind, file):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weight = tensors['layer2.0.conv1.weight']
    if kind in ('nan', 'inf'):
        weight[0, 0, 0, 0] = float(kind)
    else:
        tensors['layer2.0.conv1.weight'] = weight.to(getattr(torch, kind))
    net = shutil.copytree(folder, tmp_path / 'net', ignore=lambda *_: ['model.safetensors'])
    (torch.save if file.endswith('.bin') else save_file)(tensors, net / file)
    status, _, line = shown('info', net)
    assert status == 1
    assert 'layer2.0.conv1.weight' in line
    assert ('NaN' if kind in ('nan', 'inf') else kind) in line


def test_an_argument_that_is_empty(shown, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, line = shown('convert', folder / 'model.safetensors', '')
    assert status == 1
    assert 'an argument is empty' in line
    assert [*tmp_path.iterdir()] == []


def test_a_config_that_is_nested_too_deep(shown, folder, tmp_path):
    net = shutil.copytree(folder, tmp_path / 'net')
    (net / 'config.json').write_text('[' * 100_000)
    assert shown('info', net)[0] == 1


SHAPES = {
    'scalar head': {f'fc.{key}.weight': () for key in ('w100', 'w075', 'w050', 'w025')},
    'scalar bias': {'fc.w100.bias': ()},
    'scalar convolution': {'conv1.weight': ()},
    'flat convolution': {'conv1.weight': (16,)},
    'scalar normalisation': {'bn1.w100.weight': ()},
}


@pytest.mark.parametrize('kind', SHAPES)
def test_tensors_of_other_dimensions_are_one_line(shown, folder, network, tmp_path, kind):
    net = shutil.copytree(folder, tmp_path / 'net')
    tensors = {**network.state_dict(), **{name: torch.ones(shape) for name, shape in SHAPES[kind].items()}}
    save_file(tensors, net / 'model.safetensors')
    file = net / 'model.safetensors'
    for argv in (['info', net], ['info', file], ['convert', file, tmp_path / 'x']):
        status, _, line = shown(*argv)
        assert status == 1
        assert any(name in line for name in SHAPES[kind])


# Hashes


@pytest.mark.parametrize('form', ['upper', 'short', 'word', 'path'])
def test_a_hash_is_compared_whatever_its_form(hub, client, cache, name, form):
    right = os.urandom(5000)
    etag = {
        'upper': sha256(right).upper(),
        'short': sha256(right)[:40],
        'word': 'abc',
        'path': f'../../../{sha256(right)}',
    }[form]
    hub.add_repo(name, {'model.safetensors': os.urandom(5000)})
    hub.lie(f'/{name}/resolve/*', etag=etag)
    for _ in range(2):  # found in the cache, too
        words = {'word': 'no hash', 'path': 'outside of the cache'}.get(form, 'as the Hub says')
        assert is_refused(client('from_hub', name, cache), name, words)


def test_a_right_hash_that_is_a_path_is_refused(hub, client, cache, name):
    data = os.urandom(5000)
    hub.add_repo(name, {'config.json': '{}', 'model.safetensors': data})
    hub.lie(f'/{name}/resolve/*', etag=f'../../../{sha256(data)}')
    assert is_refused(client('from_hub', name, cache), name, 'outside of the cache')
    assert is_refused(client('from_hub', name, cache, filename='config.json'), name, 'outside of the cache')


@pytest.mark.parametrize('form', ['upper', 'git'])
def test_a_right_hash_of_another_form_is_right(hub, client, cache, name, form):
    data = os.urandom(5000)
    hub.add_repo(name, {'model.safetensors': data})
    hub.lie(f'/{name}/resolve/*', etag=sha256(data).upper() if form == 'upper' else sha1(data))
    answer = client('from_hub', name, cache)
    assert answer.error is None, answer.message


def test_a_wrong_hash_deletes_nothing_outside_the_cache(hub, client, cache, name, tmp_path):
    hub.add_repo(name, {'model.safetensors': b'right'})
    assert client('from_hub', name, cache).error is None
    (link,) = cache.rglob('model.safetensors')
    (blob,) = cache.glob('*/blobs/*')
    precious = tmp_path / 'precious'
    precious.write_bytes(b'a year of work')
    # An entry of the cache that points out of it; a whole folder of them.
    blob.unlink()
    blob.symlink_to(precious)
    os.utime(precious, (2e9, 2e9))  # newer than what has been checked
    assert is_refused(client('from_hub', name, cache), name, 'outside of the cache and stays')
    assert precious.read_bytes() == b'a year of work'
    assert not link.is_symlink()
    assert not blob.is_symlink()
    blobs = tmp_path / 'blobs'
    blobs.mkdir()
    (blobs / sha256(b'right')).write_bytes(b'a year of work')
    os.utime(blobs / sha256(b'right'), (2e9, 2e9))
    blob.parent.rmdir()
    blob.parent.symlink_to(blobs)
    assert is_refused(client('from_hub', name, cache), name, 'outside of the cache and stays')
    assert (blobs / sha256(b'right')).read_bytes() == b'a year of work'


# Links


def test_writing_does_not_follow_a_planted_link(tmp_path):
    precious = tmp_path / 'precious'
    precious.write_text('a year of work')
    (tmp_path / 'result.json.partial').symlink_to(precious)
    write_text(tmp_path / 'result.json', '[]')
    assert precious.read_text() == 'a year of work'
    assert (tmp_path / 'result.json').read_text() == '[]'
    assert not (tmp_path / 'result.json').is_symlink()
