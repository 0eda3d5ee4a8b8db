"""A network fetched by size, by the real client from a Hub on loopback that counts bytes; and what goes wrong then."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from slimclr_hub.hub.folder import save_folder
from tests.hub.files import Client, save_small, small_network
from tests.hub_server import sha256

MIB = 1 << 20
NUMBERS = itertools.count()
PARTS = [f'progressive/{name}.safetensors' for name in ('w025', 'w050', 'w075', 'w100')]

# Names for the steps of a client.
SETUP = """
import hashlib, os, timm, torch, slimclr_hub

def attempt(act):
    try:
        act()
    except ValueError as error:
        return f'{type(error).__name__}: {error}'

def create(name, cache, **kwargs):
    return timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs).eval()

def digest(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode() + tensor.reshape(-1).numpy().tobytes())
    return found.hexdigest()

x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
"""


def digest(tensors):
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode() + tensor.reshape(-1).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(autouse=True)
def calm(hub):
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope='module')
def user(reader):
    reader.run(SETUP)
    return reader


@pytest.fixture(scope='module')
def pushed(hub, publisher, small):
    """Files of a small network as `push` sends them."""
    ended = publisher.command('push', small, 'parts/small', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    repo = hub.repos['parts/small']
    return repo.commits[repo.refs['main']]


@pytest.fixture
def name(hub, pushed):
    """A repository of it like no other."""
    name = f'parts/net-{next(NUMBERS)}'
    hub.add_repo(name, pushed)
    return name


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / 'cache')


def open_narrow(user, name, cache, **environment):
    code = f"model = create('hf-hub:{name}', {cache!r}, width=0.25, lazy=True); before = model(x)"
    user.run(code, **environment)


def downloads(hub):
    return [request.path.split('/', 3)[3] for request in hub.requests if request.path.startswith('/cdn/')]


def files_of(cache):
    """Names of the files that the cache offers, and what a download has left."""
    found = [path for path in Path(cache).rglob('*') if not path.is_dir() and '.no_exist' not in path.parts]
    offered = {str(path).partition('/snapshots/')[2].partition('/')[2] for path in found if 'snapshots' in path.parts}
    return offered, [path.name for path in found if path.suffix == '.incomplete']


GROW = """
error = attempt(lambda: model.set_width(0.5))
result = [error, list(model.held), model.width, torch.equal(model(x), before)]
"""


def refused_growth(user, *words, **environment):
    error, held, width, equal = user.run(GROW, **environment)
    assert error, 'it grew'
    assert '\n' not in error
    assert all(word in error for word in words), error
    assert (held, width, equal) == ([0.25], 0.25, True)


def is_whole_after_all(user, pushed):
    user.run('model.hold(); model.set_width(1.0)')
    assert user.run('result = digest(model)') == digest(load(pushed['model.safetensors']))


# What it costs


def test_a_resnet50_by_size(hub, publisher, user, tmp_path, cache):
    """With a classifier of 1000 classes, 110 MB as a whole."""
    folder = tmp_path / 'resnet50'
    whole = small_network('slimclr_resnet50')
    save_folder(whole, folder, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, card='# A card\n')
    repo = 'parts/slimclr_resnet50.mocov3_300e_lincls_in1k'
    assert publisher.command('push', folder, repo, HF_TOKEN=hub.token).status == 0
    costs = []
    for code in (
        f"model = create('hf-hub:{repo}', {cache!r}, width=0.25, lazy=True)",
        'model.set_width(0.5)',
        'model.set_width(1.0)',
    ):
        hub.sent = 0
        user.run(code)
        costs.append(hub.sent / MIB)
    print('MiB on the wire:', costs)
    assert costs[0] <= 8.5
    assert costs[1] <= 21.5
    assert sum(costs) * MIB <= (folder / 'model.safetensors').stat().st_size + 2 * MIB
    assert downloads(hub) == PARTS
    assert user.run('model.hold(); result = digest(model)') == digest(whole.state_dict())
    # The dense network of the published tag, from another cache.
    hub.requests.clear()
    code = f"result = digest(create('slimclr_resnet50_025', {str(tmp_path / 'other')!r}))"
    assert user.run(code, SLIMCLR_HUB_ORG='parts') == digest(whole.extract(0.25).state_dict())
    assert downloads(hub) == PARTS[:1]
    tag = repo.partition('/')[2]
    ended = user.command('fetch', tag, '--width', '0.25', SLIMCLR_HUB_ORG='parts')
    assert ended.status == 0, ended.err
    assert f"timm.create_model('{tag}', pretrained=True, width=0.25, lazy=True)" in ended.out
    assert downloads(hub) == PARTS[:1] * 2
    del hub.repos[repo]
    hub.objects.clear()


def test_only_what_is_asked_for(hub, user, name, cache):
    open_narrow(user, name, cache)
    assert downloads(hub) == PARTS[:1]
    assert files_of(cache) == ({'config.json', 'progressive/index.json', PARTS[0]}, [])
    hub.requests.clear()
    user.run('model.forward_at(x, 0.25); model.set_width(0.75)')
    assert downloads(hub) == PARTS[1:3]
    hub.requests.clear()
    user.run('model.set_width(0.5)')
    assert hub.requests == []


def test_the_parts_are_bit_for_bit_the_whole_file(hub, user, name, pushed, cache):
    open_narrow(user, name, cache)
    is_whole_after_all(user, pushed)


def test_dense_networks(hub, user, pushed, cache):
    whole = small_network('slimclr_resnet20')
    for width in (0.25, 0.5):
        name = f'parts/net-{next(NUMBERS)}'
        hub.add_repo(name, pushed)
        overlay = {'hf_hub_id': name, 'file': None}
        code = f"""
dense = create('slimclr_resnet20_{int(100 * width):03}', {cache!r}, pretrained_cfg_overlay={overlay})
result = digest(dense)
"""
        assert user.run(code) == digest(whole.extract(width).state_dict())
        assert 'model.safetensors' not in files_of(cache)[0]


def test_some_widths_of_it(hub, user, name, cache):
    user.run(f"model = create('hf-hub:{name}', {cache!r}, widths=(0.5, 0.25))")
    assert downloads(hub) == PARTS[:2]
    assert user.run('result = list(model.widths)') == [0.5, 0.25]


def test_without_lazy_and_at_full_width_it_is_the_whole_file(hub, user, name, cache):
    for kwargs in ('width=0.25', 'width=1.0, lazy=True'):
        user.run(f"model = create('hf-hub:{name}', {cache!r}, {kwargs})")
    assert downloads(hub) == ['model.safetensors']


def test_a_whole_file_in_the_cache_comes_first(hub, user, name, cache):
    user.run(f"create('hf-hub:{name}', {cache!r})")
    hub.requests.clear()
    open_narrow(user, name, cache)
    assert downloads(hub) == []
    assert not any('progressive' in request.path for request in hub.requests)


def test_without_parts_it_is_the_whole_file(hub, user, pushed, cache):
    hub.add_repo('parts/none', {name: data for name, data in pushed.items() if 'progressive' not in name})
    open_narrow(user, 'parts/none', cache)
    is_whole_after_all(user, pushed)
    assert downloads(hub) == ['model.safetensors']


def test_parts_of_other_weights_are_not_used(hub, user, pushed, cache):
    """As when only the whole file was replaced, by a tool that knows no parts."""
    tensors = {name: tensor + 1 for name, tensor in load(pushed['model.safetensors']).items()}
    hub.add_repo('parts/stale', {**pushed, 'model.safetensors': save(tensors, {'format': 'pt'})})
    open_narrow(user, 'parts/stale', cache)
    assert downloads(hub) == ['model.safetensors']
    assert user.run('model.hold(); result = digest(model)') == digest(tensors)


def test_a_network_grows_by_the_commit_that_it_was_opened_at(hub, user, name, pushed, cache, tmp_path):
    open_narrow(user, name, cache)
    hub.add_repo(name, {'config.json': pushed['config.json']})
    is_whole_after_all(user, pushed)


def test_a_copy_grows_from_the_hub(hub, user, name, pushed, cache):
    open_narrow(user, name, cache)
    user.run('import pickle; model = pickle.loads(pickle.dumps(model))')
    is_whole_after_all(user, pushed)


def test_a_private_repository(hub, user, pushed, cache):
    hub.add_repo('parts/private', pushed, private=True)
    open_narrow(user, 'parts/private', cache, HF_TOKEN=hub.token)
    refused_growth(user, 'hf auth login', HF_TOKEN=hub.guest_token)
    user.run('model.set_width(1.0)', HF_TOKEN=hub.token)


# The command, and without a connection


def test_fetch_for_a_machine_without_a_connection(hub, user, name, tmp_path):
    home = tmp_path / 'home'
    online = Client(hub.environment(home), tmp_path / 'work')
    offline = Client(hub.environment(home, HF_HUB_OFFLINE='1'), tmp_path / 'work')
    with online, offline:
        ended = online.command('fetch', f'hf-hub:{name}', '--width', '0.5')
        assert ended.status == 0, ended.err
        assert 'widths up to 0.5' in ended.out
        assert f"timm.create_model('hf-hub:{name}', pretrained=True, width=0.5, lazy=True)" in ended.out
        assert downloads(hub) == PARTS[:2]
        hub.requests.clear()
        offline.run(SETUP)
        offline.run(f"model = create('hf-hub:{name}', None, width=0.25, lazy=True); before = model(x)")
        error = offline.run('result = attempt(lambda: model.set_width(1.0))')
        assert 'offline' in error
        assert '--width 0.75' in error
        assert offline.run('model.set_width(0.5); result = list(model.held)') == [0.5, 0.25]
        dense = offline.command('info', f'hf-hub:{name}')
        assert dense.status == 1
        assert 'no model.safetensors' in dense.err
        assert hub.requests == []
        assert online.command('fetch', f'hf-hub:{name}').status == 0
        assert downloads(hub) == ['model.safetensors']


# Faults


def damaged(hub, name, path):
    """Other bytes of the same size, which the Hub announces by the hash of the right ones."""
    repo = hub.repos[name]
    files = repo.commits[repo.refs['main']]
    hub.lie(f'/{name}/resolve/*/{path}', etag=sha256(files[path]))
    repo.commits[repo.refs['main']] = {**files, path: os.urandom(len(files[path]))}


FAULTS = {
    'missing': (
        lambda hub, name: hub.fail(f'/{name}/*/w050*', 404, None, X_Error_Code='EntryNotFound'),
        ['has no progressive/w050.safetensors', 'slimclr-hub fetch'],
    ),
    'refused': (lambda hub, name: hub.fail(f'/{name}/*/w050*', 403, None), ['403']),
    'an error of the server': (lambda hub, name: hub.fail('/cdn/*/w050*', 500, None), ['500']),
    'hangs up': (lambda hub, name: hub.fail('*', 0, None), ['cannot be reached']),
    'cut': (lambda hub, name: hub.cut('/cdn/*/w050*', 1000, None), ['cannot be reached']),
    'another size': (lambda hub, name: hub.lie(f'/{name}/*/w050*', size=1), ['1 bytes', 'as the index says']),
    'another hash': (lambda hub, name: hub.lie(f'/{name}/*/w050*', etag='0' * 64), ['0' * 64, 'as the index says']),
    'no hash': (lambda hub, name: hub.lie(f'/{name}/*/w050*', etag='../../x'), ['../../x', 'as the index says']),
    'damaged': (lambda hub, name: damaged(hub, name, PARTS[1]), ['w050.safetensors', 'sha256', 'deleted']),
    'a bomb': (lambda hub, name: hub.bomb('/cdn/*/w050*', 50 * MIB), ['more came']),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_while_it_grows(hub, user, name, pushed, cache, fault):
    break_it, words = FAULTS[fault]
    open_narrow(user, name, cache)
    commit = hub.repos[name].refs['main']
    break_it(hub, name)
    refused_growth(user, *words)
    assert files_of(cache) == ({'config.json', 'progressive/index.json', PARTS[0]}, [])
    hub.faults.clear()
    hub.repos[name].commits[commit] = pushed
    is_whole_after_all(user, pushed)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_at_the_first_part(hub, user, name, pushed, cache, fault):
    """Nothing is made, nothing is left, and the whole file helps where the parts are wrong."""
    break_it, words = FAULTS[fault]
    break_it(hub, name)
    error = user.run(f"result = attempt(lambda: create('hf-hub:{name}', {cache!r}, width=0.5, lazy=True))")
    assert '\n' not in error
    assert all(word in error for word in words), error
    assert files_of(cache)[0] <= {'config.json', 'progressive/index.json', PARTS[0]}
    assert files_of(cache)[1] == []


def test_too_slow(hub, user, name, pushed, cache):
    open_narrow(user, name, cache)
    hub.slow('/cdn/*/w050*', 0.5, 1000, times=1)
    refused_growth(user, 'SLIMCLR_DOWNLOAD_SECONDS', SLIMCLR_DOWNLOAD_SECONDS='1')
    hub.faults.clear()
    is_whole_after_all(user, pushed)


def test_a_cache_that_cannot_be_written(hub, user, name, pushed):
    """By nobody, if this is root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are root's alone
        Path(folder).chmod(0o755)
        cache = f'{folder}/cache'
        open_narrow(user, name, cache)
        code = """
def grow():
    import os
    user = os.geteuid()
    for path, folders, _ in os.walk(CACHE):
        os.chmod(path, 0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        model.set_width(0.5)
    finally:
        if user == 0:
            os.seteuid(0)
        for path, folders, _ in os.walk(CACHE):
            os.chmod(path, 0o755)

error = attempt(grow)
result = [error, list(model.held), torch.equal(model(x), before)]
"""
        error, held, equal = user.run(code.replace('CACHE', repr(cache)))
        assert 'Permission denied' in error, error
        assert (held, equal) == ([0.25], True)
        is_whole_after_all(user, pushed)


def test_two_processes_at_once(hub, user, publisher, name, pushed, cache):
    publisher.run(SETUP)
    for client in user, publisher:
        open_narrow(client, name, cache)
    hub.slow('/cdn/*/w050*', 0.2, 20_000)
    hub.requests.clear()
    with ThreadPoolExecutor(2) as pool:
        held = [*pool.map(lambda c: c.run('model.set_width(0.5); result = list(model.held)'), (user, publisher))]
    assert held == [[0.5, 0.25]] * 2
    assert downloads(hub) == PARTS[1:2]  # one waits for the other
    is_whole_after_all(user, pushed)
    is_whole_after_all(publisher, pushed)


def test_killed_while_writing(hub, user, name, pushed, cache, tmp_path):
    open_narrow(user, name, cache)
    hub.slow('/cdn/*/w050*', 0.5, 10_000)
    other = Client(hub.environment(tmp_path / 'home'), tmp_path / 'work')
    other.run(SETUP)
    with ThreadPoolExecutor(1) as pool:
        open_narrow(other, name, cache)
        hub.requests.clear()
        growing = pool.submit(other.run, 'model.set_width(0.5)')
        while not downloads(hub):
            time.sleep(0.05)
        time.sleep(0.5)
        other._process.kill()
        with pytest.raises(AssertionError, match='has ended'):
            growing.result()
    offered, _ = files_of(cache)
    assert PARTS[1] not in offered
    hub.faults.clear()
    is_whole_after_all(user, pushed)
    # What the killed process has left is under no name that a client opens, as huggingface_hub leaves it of any file.
    offered, left = files_of(cache)
    assert offered == {'config.json', 'progressive/index.json', *PARTS}
    assert len(left) == 1


def test_a_part_that_was_damaged_on_the_disk(hub, user, name, pushed, cache):
    open_narrow(user, name, cache)
    user.run('model.set_width(0.5)')
    (blob,) = (path.resolve() for path in Path(cache).rglob('w050.safetensors'))
    blob.chmod(0o600)
    blob.write_bytes(os.urandom(blob.stat().st_size))
    user.run('held = list(model.held)')
    error = user.run('result = attempt(lambda: model.set_width(0.75))')
    assert 'deleted' in error
    assert user.run('result = [list(model.held), model.width]') == [[0.5, 0.25], 0.5]
    is_whole_after_all(user, pushed)


# Parts that the index tells rightly, and that are made to mislead


def republished(pushed, change, number=1, **index):
    """The files with one part changed, and an index that knows."""
    tensors = load(pushed[PARTS[number]])
    change(tensors)
    content = save(tensors, {'format': 'pt'})
    told = json.loads(pushed['progressive/index.json'])
    told['parts'][number] |= {'size': len(content), 'sha256': sha256(content)}
    return {**pushed, PARTS[number]: content, 'progressive/index.json': json.dumps(told | index)}


def set_to(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def nan(tensor):
    tensor.view(-1)[-1] = float('nan')
    return tensor


HOSTILE = {
    'NaN': (set_to('layer1.0.conv1.weight.below', nan), ['layer1.0.conv1.weight holds NaN']),
    'NaN in a mean': (set_to('layer1.0.bn1.w050.running_mean', nan), ['w050.running_mean holds NaN']),
    'integers': (set_to('bn1.w050.bias', lambda t: t.int()), ['bn1.w050.bias is of torch.int32']),
    'a type': (set_to('layer1.0.conv1.weight.below', lambda t: t.half()), ['is of torch.float16, not torch.float32']),
    'a shape': (set_to('layer1.0.conv1.weight.below', lambda t: t[:1]), ['layer1.0.conv1.weight has shape']),
    'a large shape': (set_to('layer1.0.conv1.weight.below', lambda t: t.repeat(99, 1, 1, 1)), ['has shape [400, 8']),
    'a kernel': (set_to('layer1.0.conv1.weight.below', lambda t: t[..., :1].contiguous()), ['does not fit beside']),
    'a mean': (set_to('bn1.w050.running_mean', torch.zeros(5)), ['bn1.w050.running_mean has shape [5]']),
    'a lack': (lambda tensors: tensors.pop('bn1.w050.weight'), ['missing bn1.w050.weight']),
    'no block': (lambda tensors: tensors.pop('layer1.0.conv1.weight.right'), ['does not fit beside']),
    'twice': (set_to('conv1.weight', torch.zeros(4, 3, 3, 3)), ['conv1.weight is in two parts']),
    'of nothing': (set_to('other.below', torch.zeros(4, 3)), ['other.below extends']),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_parts(hub, user, pushed, cache, case):
    change, words = HOSTILE[case]
    name = f'parts/net-{next(NUMBERS)}'
    hub.add_repo(name, republished(pushed, change))
    open_narrow(user, name, cache)
    refused_growth(user, *words)
    error = user.run(f"result = attempt(lambda: create('hf-hub:{name}', {cache!r}, width=0.5, lazy=True))")
    assert all(word in error for word in words), error


def no_safetensors(files, path):
    told = json.loads(files['progressive/index.json'])
    content = b'PK\x03\x04 a pickle'
    told['parts'][1] |= {'size': len(content), 'sha256': sha256(content)}
    return {**files, path: content, 'progressive/index.json': json.dumps(told)}


def test_a_part_that_is_no_safetensors_file(hub, user, pushed, cache):
    hub.add_repo('parts/pickle', no_safetensors(pushed, PARTS[1]))
    open_narrow(user, 'parts/pickle', cache)
    refused_growth(user, 'PyTorch checkpoint, not safetensors')


@pytest.mark.parametrize(
    ('index', 'words'),
    [
        ('{', ['is not JSON']),
        ('{}', ['is no index']),
        (lambda told: told['parts'][0].update(file='../../../w025.safetensors'), ['not w025.safetensors']),
        (lambda told: told['parts'][0].update(size=10**30), ['as the index says']),
        (lambda told: told['parts'][0].update(sha256='b' * 64), ['b' * 64, 'as the index says']),
        (lambda told: told['parts'].reverse(), ['do not ascend']),
    ],
    ids=['no JSON', 'empty', 'path', 'size', 'hash', 'order'],
)
def test_a_hostile_index(hub, user, pushed, cache, index, words):
    """One line that names the remedy, which helps."""
    if callable(index):
        told = json.loads(pushed['progressive/index.json'])
        index(told)
        index = json.dumps(told)
    name = f'parts/net-{next(NUMBERS)}'
    hub.add_repo(name, {**pushed, 'progressive/index.json': index})
    error = user.run(f"result = attempt(lambda: create('hf-hub:{name}', {cache!r}, width=0.25, lazy=True))")
    assert '\n' not in error
    assert all(word in error for word in [*words, '`slimclr-hub fetch hf-hub:']), error
    assert files_of(cache) == ({'config.json', 'progressive/index.json'}, [])
    user.run(f"create('hf-hub:{name}', {cache!r})")  # as `fetch` does
    open_narrow(user, name, cache)
    is_whole_after_all(user, pushed)


def test_push_makes_parts_of_what_is_pushed(hub, publisher, tmp_path):
    """Not of what lies beside it, from another network."""
    save_small(tmp_path / 'net')
    (tmp_path / 'net/progressive').mkdir()
    (tmp_path / 'net/progressive/index.json').write_text('{}')
    (tmp_path / 'net/progressive/secret.safetensors').write_text('a')
    assert publisher.command('push', tmp_path / 'net', 'parts/again', HF_TOKEN=hub.token).status == 0
    repo = hub.repos['parts/again']
    files = repo.commits[repo.refs['main']]
    assert [name for name in files if name.startswith('progressive/')] == ['progressive/index.json', *PARTS]
    index = json.loads(files['progressive/index.json'])
    assert index['sha256'] == sha256(files['model.safetensors'])
    assert [(f'progressive/{part["file"]}', part['size'], part['sha256']) for part in index['parts']] == [
        (name, len(files[name]), sha256(files[name])) for name in PARTS
    ]


@pytest.mark.parametrize('kwargs', [{'widths': (0.5,)}, {'widths': (1.0, 0.5), 'overlap': True, 'head': 'slimmable'}])
def test_push_of_other_networks(hub, publisher, user, tmp_path, kwargs):
    save_small(tmp_path / 'net', **kwargs)
    name = f'parts/net-{next(NUMBERS)}'
    assert publisher.command('push', tmp_path / 'net', name, HF_TOKEN=hub.token).status == 0
    repo = hub.repos[name]
    parts = [path for path in repo.commits[repo.refs['main']] if path.startswith('progressive/')]
    assert len(parts) == (0 if len(kwargs['widths']) == 1 else 3)
    user.run(f"model = create('hf-hub:{name}', {str(tmp_path / 'cache')!r}, width=0.5, lazy=True); model.hold()")
    assert user.run('result = digest(model)') == digest(load_file(tmp_path / 'net' / 'model.safetensors'))
    shutil.rmtree(tmp_path / 'cache')
