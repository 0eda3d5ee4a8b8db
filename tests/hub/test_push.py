"""From a checkpoint of the authors' to timm by way of the Hub, and what a push sends, keeps back and refuses."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.runs.result import Protocol, Result, save
from tests.hub.files import ROOT, Ended, save_small
from tests.hub_server import HubServer
from tests.reference import DATA, image

FORWARD = load_file(DATA / 'forward.safetensors')
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def assert_refused(ended: Ended, *words: str) -> None:
    """One line that begins with Error and holds these words; above it at most where the weights come from."""
    lines = ended.err.splitlines()
    assert ended.status == 1, ended
    assert lines[-1].startswith('Error: '), ended.err
    assert all(line.startswith('Weights from') for line in lines[:-1]), ended.err
    assert all(word in lines[-1] for word in words), ended.err


def written(hub):
    """Requests to the server that would have changed something."""
    requests = [request for request in hub.requests if request.method in ('POST', 'PUT')]
    return [(request.method, request.path, request.status) for request in requests if 'validate' not in request.path]


def main_files(hub, repo, revision='main'):
    return hub.repos[repo].commits[hub.repos[repo].refs[revision]]


# From a checkpoint of the authors' to timm

OPEN = """
import timm, torch, slimclr_hub
from safetensors.torch import load_file, save_file

image, outputs = load_file(IMAGE)['image'], {}
with torch.inference_mode():
    for tag in TAGS:
        network = 'slimclr_resnet50.' + tag
        for name, widths in (f'hf-hub:acceptance/{network}', (1.0, 0.25)), (network, (0.75, 0.5)):
            for width in widths:
                model = timm.create_model(name, pretrained=True, width=width).eval()
                outputs[f'{name} {width}'] = model(image)
        without_head = timm.create_model(name, pretrained=True, num_classes=0).eval()
        for width, output in without_head.forward_widths(image).items():
            outputs[f'pooled {tag} {width}'] = output
save_file(outputs, OUTPUTS)
"""


def test_from_the_authors_checkpoint_to_timm(hub, published, publisher, reader, tmp_path):
    for tag, folder in published.items():
        ended = publisher.command('push', folder, f'acceptance/slimclr_resnet50.{tag}', HF_TOKEN=hub.token)
        assert ended.status == 0, ended.err
    save_file({'image': image('input', 2)}, tmp_path / 'image.safetensors')
    code = OPEN.replace('TAGS', repr([*published])).replace('IMAGE', repr(str(tmp_path / 'image.safetensors')))
    hub.requests.clear()
    reader.run(code.replace('OUTPUTS', repr(str(tmp_path / 'outputs.safetensors'))), SLIMCLR_HUB_ORG='acceptance')

    downloads = [request.path for request in hub.requests if request.path.startswith('/cdn/')]
    assert len(downloads) == len(published)  # once each, and nothing from anywhere else
    outputs = load_file(tmp_path / 'outputs.safetensors')
    assert len(outputs) == 2 * len(published) * len(DEFAULT_WIDTHS)
    for name, output in outputs.items():
        kind = 'lincls/out' if 'lincls' in name and not name.startswith('pooled') else 'backbone/pooled'
        expected = FORWARD[f'{kind}/{name.rpartition(" ")[2]}']
        # Of the largest value, the least that two orders of summation agree on.
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max(), name
    for tag in published:
        del hub.repos[f'acceptance/slimclr_resnet50.{tag}']
    hub.objects.clear()
    hub.requests.clear()


# What is sent


def test_dry_run_sends_nothing(hub, publisher, small):
    hub.requests.clear()
    ended = publisher.command('push', small, 'me/dry', '--dry-run', HF_TOKEN=hub.token)
    assert ended.status == 0
    assert hub.requests == []
    assert 'me/dry' not in hub.repos
    assert f'{small} -> me/dry' in ended.out
    for name in ('config.json', 'model.safetensors', 'README.md'):
        assert name in ended.out
    assert '1.16 M' in ended.out
    assert 'Nothing was uploaded' in ended.out


@pytest.fixture
def run_folder(tmp_path):
    """A folder as training leaves it, at a path with a space and brackets in it."""
    folder = tmp_path / 'my [best] run'
    save_small(folder)
    for name in ('metrics.jsonl', 'training.png', 'log.txt', '.secret'):
        (folder / name).write_text(name)
    (folder / 'recipe.yaml').write_text('data: {name: fashion-mnist-6k}\n')
    (folder / 'checkpoints').mkdir()
    (folder / 'checkpoints' / 'epoch_3.safetensors').write_text('large')
    return folder


def test_a_run_is_published_without_its_checkpoints(hub, publisher, reader, run_folder):
    local_card = (run_folder / 'README.md').read_text()
    ended = publisher.command('push', run_folder, 'me/run', '--message', 'The best so far', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    assert str(run_folder) in ended.out
    assert f'{hub.url}/me/run/commit/{hub.repos["me/run"].refs["main"]}' in ended.out
    assert "timm.create_model('hf-hub:me/run', pretrained=True)" in ended.out
    assert not hub.repos['me/run'].private
    files = main_files(hub, 'me/run')
    sent = {'config.json', 'model.safetensors', 'README.md', 'recipe.yaml', 'metrics.jsonl', 'training.png'}
    assert 'model-index' not in files['README.md'].decode()
    parts = {
        f'progressive/{name}' for name in ('index.json', *(f'w{w}.safetensors' for w in ('025', '050', '075', '100')))
    }
    assert files.keys() - {'.gitattributes'} == sent | parts
    assert all(files[name] == (run_folder / name).read_bytes() for name in sent - {'README.md'})
    (commit,) = (request for request in hub.requests if request.path == '/api/models/me/run/commit/main')
    assert json.loads(commit.body.splitlines()[0])['value']['summary'] == 'The best so far'

    card = files['README.md'].decode()
    assert 'local-dir:' in local_card
    assert 'local-dir:' not in card
    assert str(run_folder.parent) not in card
    assert (run_folder / 'README.md').read_text() == local_card  # only what is sent is changed
    (block,) = BLOCK.findall(card)
    assert "timm.create_model('hf-hub:me/run', pretrained=True, width=0.25)" in block
    assert reader.run(f'{block}\nresult = [model.width, model.num_classes]') == [1.0, 10]


def test_folders_of_this_machine_are_left_out(hub, publisher, run_folder):
    imports = {'/home/me/secret/network.py': 'a' * 64}
    recipe = {'data': {'root': '/home/me/secret/flowers', 'size': 32}, 'run': {'output': '~/runs'}, 'imports': imports}
    (run_folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe, sort_keys=False))
    settings = {'data.root': '/home/me/secret/flowers', 'data.name': 'folder'}
    words = ['recipes/knn_eval.py', '--network', '/home/me/secret/my net', '--data.root=/home/me/secret/flowers']
    about = {'command': shlex.join(words), 'note': "the user's own /home/me/secret/net, of https://me.org/a/b"}
    result = Result(
        '/home/me/secret/net', Protocol('knn', 'flowers'), {1.0: 80.0}, settings=settings, environment=about
    )
    save([result], run_folder / 'knn')
    ended = publisher.command('push', run_folder, 'me/flowers', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    files = main_files(hub, 'me/flowers')
    assert yaml.safe_load(files['recipe.yaml']) == {
        'data': {'root': 'flowers', 'size': 32},
        'run': {'output': 'runs'},
        'imports': {'network.py': 'a' * 64},
    }
    (sent,) = json.loads(files['knn/result.json'])
    assert sent['network'] == 'net'
    assert sent['settings'] == {'data.root': 'flowers', 'data.name': 'folder'}
    assert sent['environment'] == {
        'command': "recipes/knn_eval.py --network 'my net' --data.root=flowers",
        'note': "the user's own net, of https://me.org/a/b",
    }
    assert not any(b'secret' in files[name] for name in ('recipe.yaml', 'knn/result.json', 'README.md'))


@pytest.mark.parametrize('metadata', ['license: a: b', '- a', '1: x', 'model-index: 3'])
def test_metadata_that_the_hub_would_refuse(hub, publisher, run_folder, metadata):
    save([Result(str(run_folder), Protocol('knn', 'flowers'), {1.0: 80.0})], run_folder / 'knn')
    (run_folder / 'README.md').write_text(f'---\n{metadata}\n---\n# A network\n')
    ended = publisher.command('push', run_folder, 'me/flowers', HF_TOKEN=hub.token)
    assert_refused(ended, str(run_folder), 'README.md has metadata that the Hub refuses')


def test_results_become_evaluation_results_of_the_hub(hub, publisher, reader, run_folder):
    knn = [Protocol('knn', 'fashion-mnist-6k', k=k, temperature=0.07) for k in (10, 20)]
    save([Result('net', protocol, {1.0: 80.126, 0.5: 70.0}) for protocol in knn], run_folder)
    linear = Protocol('linear', 'ImageNet', head='switchable', features='cached', epochs=90)
    save([Result('net', linear, {1.0: 72.3}, {1.0: 90.8})], run_folder / 'linear_eval')
    ended = publisher.command('push', run_folder, 'me/judged', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    files = main_files(hub, 'me/judged')
    assert {'result.json', 'linear_eval/result.json'} <= files.keys()
    card = ModelCard(files['README.md'].decode())
    assert card.data.model_name == 'judged'
    assert [
        (each.dataset_type, each.dataset_name, each.metric_type, each.metric_name, each.metric_value)
        for each in card.data.eval_results
    ] == [
        ('fashion-mnist-6k', 'fashion-mnist-6k', 'accuracy', f'top-1 (%) at width {width}, {knn[0]}', value)
        for width, value in ((1, 80.13), (0.5, 70.0))
    ] + [
        ('imagenet', 'ImageNet', 'accuracy', f'top-{top} (%) at width 1, {linear}', value)
        for top, value in ((1, 72.3), (5, 90.8))
    ]
    assert card.text.strip().startswith('# my [best] run')
    assert 'model-index' not in (run_folder / 'README.md').read_text()  # only what is sent is changed
    reader.run(f'from huggingface_hub import ModelCard\nModelCard({str(card)!r}).validate()')


def test_a_repository_that_is_there_gets_a_commit_more(hub, publisher, small):
    first = hub.add_repo('me/there', {'config.json': '{}', 'notes.md': 'stays'}, private=True)
    assert publisher.command('push', small, 'me/there', HF_TOKEN=hub.token).status == 0
    repo = hub.repos['me/there']
    assert repo.private  # as it was
    assert len(repo.commits) == 2
    assert repo.commits[first]['config.json'] == b'{}'
    files = main_files(hub, 'me/there')
    assert files['notes.md'] == b'stays'
    assert files['config.json'] == (small / 'config.json').read_bytes()
    # The same again is no commit and sends no weights.
    hub.requests.clear()
    assert publisher.command('push', small, 'me/there', HF_TOKEN=hub.token).status == 0
    assert len(repo.commits) == 2
    assert all(method != 'PUT' for method, *_ in written(hub))


def test_private_is_seen_with_a_token_only(hub, publisher, reader, small):
    assert publisher.command('push', small, 'me/private', '--private', HF_TOKEN=hub.token).status == 0
    assert hub.repos['me/private'].private
    assert_refused(reader.command('info', 'hf-hub:me/private'), 'the Hub has no me/private', 'hf auth login')
    ended = reader.command('info', 'hf-hub:me/private', HF_TOKEN=hub.token)
    assert ended.status == 0
    assert 'slimclr_resnet20, head: switchable, 10 classes' in ended.out


def test_a_branch_is_made_if_need_be(hub, publisher, reader, small, run_folder):
    assert publisher.command('push', small, 'me/branches', HF_TOKEN=hub.token).status == 0
    main = hub.repos['me/branches'].refs['main']
    for _ in range(2):
        ended = publisher.command('push', run_folder, 'me/branches', '--revision', 'v2', HF_TOKEN=hub.token)
        assert ended.status == 0, ended.err
    assert hub.repos['me/branches'].refs['main'] == main
    assert 'recipe.yaml' in main_files(hub, 'me/branches', 'v2')
    assert "'hf-hub:me/branches@v2'" in ended.out
    assert reader.command('info', 'hf-hub:me/branches@v2').status == 0


def test_the_card_of_a_converted_network(hub, publisher, reader, tmp_path):
    model = save_small(tmp_path / 'source')
    torch.save(model.extract(1.0).state_dict(), tmp_path / 'plain.pth')
    folder = tmp_path / 'start'
    assert publisher.command('convert', tmp_path / 'plain.pth', folder).status == 0
    assert publisher.command('push', folder, 'me/start', HF_TOKEN=hub.token).status == 0
    card = main_files(hub, 'me/start')['README.md'].decode()
    assert '`plain.pth`' in card
    assert 'Only width 1 is trained' in card
    assert '--model.name slimclr_resnet20 --model.weights FOLDER' in card
    assert str(tmp_path) not in card
    (block,) = BLOCK.findall(card)
    assert reader.run(f'{block}\nresult = [model.widths, model.num_classes]') == [list(DEFAULT_WIDTHS), 0]


def test_one_width_as_an_ordinary_network(hub, published, publisher, reader, tmp_path):
    folder = tmp_path / 'quarter'
    assert publisher.command('extract', published['mocov2_200e_in1k'], folder, '--width', 0.25).status == 0
    ended = publisher.command('push', folder, 'me/quarter', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    card = main_files(hub, 'me/quarter')['README.md'].decode()
    assert 'local-dir:' not in card
    (block,) = BLOCK.findall(card)
    assert reader.run(f'{block}\nresult = [type(model).__name__, model.num_features]') == ['ResNet', 512]
    # The commands take it as a network of one width.
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    embed = ['embed', 'hf-hub:me/quarter', tmp_path / 'x.png', '-o', tmp_path / 'x.npy']
    for command in ['info', 'hf-hub:me/quarter'], embed, ['export', folder, tmp_path, '--format', 'pt2', '--size', 64]:
        ended = reader.command(*command)
        assert ended.status == 0, ended.err
        assert '0.25' in ended.out
    assert np.load(tmp_path / 'x.npy').shape == (1, 512)
    assert (tmp_path / 'slimclr_resnet50_w025.pt2').is_file()


# What is refused


@pytest.mark.parametrize('repo', ['name', 'a/b/c', 'me/two words', 'me/', 'https://huggingface.co/me/name'])
def test_name_that_is_none(hub, publisher, small, repo):
    hub.requests.clear()
    ended = publisher.command('push', small, repo, HF_TOKEN=hub.token)
    assert_refused(ended, repr(repo), 'is not the name of a repository')
    assert hub.requests == []


def without(name):
    return lambda folder: (folder / name).unlink()


def edit(old, new):
    def change(folder):
        text = (folder / 'config.json').read_text()
        assert old in text
        (folder / 'config.json').write_text(text.replace(old, new))

    return change


def cut(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[: len(data) // 2])


def other_network(folder):
    (folder / 'config.json').write_text('{"architecture": "resnet18", "num_classes": 10}')


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (shutil.rmtree, ['is not a folder']),
        (without('README.md'), ['lacks README.md']),
        (without('model.safetensors'), ['lacks model.safetensors', 'slimclr-hub convert']),
        (without('config.json'), ['lacks config.json']),
        (cut, ['model.safetensors', 'truncated']),
        (edit('slimclr_resnet20', 'slimclr_resnet20x4'), ['bn1.w100.weight has shape [16]']),
        (edit('0.25', '0.3'), ['missing bn1.w030.weight', 'The file holds the widths 1.0, 0.75, 0.5, 0.25, not 0.3']),
        (edit('"num_classes": 10', '"num_classes": 11'), ['fc']),
        (edit('slimclr_resnet20', 'resnet18'), ['unexpected keyword argument']),
        (other_network, ['Missing key(s) in state_dict: "bn1.weight"', '...']),
        (edit('{', ''), ['config.json is not JSON']),
        (edit('"architecture"', '"arch"'), ["config.json is not timm's"]),
    ],
)
def test_folder_that_would_not_open(hub, publisher, small, tmp_path, change, words):
    folder = shutil.copytree(small, tmp_path / 'folder')
    change(folder)
    hub.requests.clear()
    assert_refused(publisher.command('push', folder, 'me/bad', HF_TOKEN=hub.token), str(folder), *words)
    assert hub.requests == []


@pytest.mark.parametrize('name', ['recipe.yaml', 'model.safetensors', 'knn'])
def test_what_a_link_points_to_is_not_sent(hub, publisher, small, tmp_path, name):
    folder, outside = shutil.copytree(small, tmp_path / 'folder'), tmp_path / 'outside'
    if name == 'knn':
        outside.mkdir()
        (outside / 'result.json').write_text('[]')
    else:
        (folder / name).rename(outside) if (folder / name).exists() else outside.write_text('a secret')
    (folder / name).symlink_to(outside)
    hub.requests.clear()
    ended = publisher.command('push', folder, 'me/linked', HF_TOKEN=hub.token)
    assert_refused(ended, str(folder / name), str(outside), 'outside of the folder')
    assert hub.requests == []


@pytest.mark.parametrize(
    ('environment', 'status'), [({}, 401), ({'HF_TOKEN': 'hf_wrong'}, 401), ({'HF_TOKEN': 'hf_guest'}, 403)]
)
def test_without_the_right_to_write(hub, publisher, small, environment, status):
    commit = hub.add_repo('other/net', {'config.json': '{}'})
    hub.requests.clear()
    for repo in ('other/new', 'other/net'):
        assert_refused(publisher.command('push', small, repo, **environment), repo, str(status), 'hf auth login')
    assert {answered for *_, answered in written(hub)} == {status}
    assert hub.repos['other/net'].refs == {'main': commit}
    assert 'other/new' not in hub.repos


def test_hub_in_trouble(hub, publisher, small):
    hub.fail('*/commit/main', 503, times=2)
    ended = publisher.command('push', small, 'me/patient', HF_TOKEN=hub.token)
    assert ended.status == 0, ended.err
    assert 'model.safetensors' in main_files(hub, 'me/patient')
    hub.fail('/api/repos/create', 0, times=None)
    try:
        assert_refused(publisher.command('push', small, 'me/never', HF_TOKEN=hub.token), 'the Hub cannot be reached')
    finally:
        hub.faults.clear()


def test_hub_away(small, tmp_path):
    """Exit status and streams of the command, as a user sees them."""
    with HubServer() as server:
        environment = server.environment(tmp_path, HF_TOKEN=server.token, HF_HUB_OFFLINE='1')
    command = [f'{sys.prefix}/bin/slimclr-hub', 'push', str(small), 'me/net']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    words = 'offline (HF_HUB_OFFLINE); nothing can be pushed'
    assert_refused(Ended(done.returncode, done.stdout, done.stderr), words)
    assert server.requests == []


# Text

ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
CONVERT_AND_PLAN = """
import sys
from pathlib import Path
from slimclr_hub import cli
from slimclr_hub.hub.push import encoded, plan_push

assert sys.getfilesystemencoding() == 'ascii'
folder = Path(sys.argv[2])
sys.argv.insert(1, 'convert')
try:
    cli.main()
except SystemExit as end:
    assert not end.code
with (folder / 'README.md').open('ab') as card:
    card.write(b'Entra\\xc3\\xaen\\xc3\\xa9\\n')
sys.stdout.buffer.write(encoded(plan_push(folder, 'some/where').files['README.md']))
with (folder / 'README.md').open('ab') as card:
    card.write(b'\\xff')
try:
    plan_push(folder, 'some/where')
except ValueError as error:
    print(error)
"""


def test_text_is_utf8_whatever_the_locale(small, tmp_path):
    shutil.copy(small / 'model.safetensors', tmp_path / 'modèle.safetensors')
    argv = [sys.executable, '-c', CONVERT_AND_PLAN, 'modèle.safetensors', 'réseau']
    environment = {**os.environ, **ASCII, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    assert 'réseau' in (tmp_path / 'réseau' / 'README.md').read_bytes()[:-1].decode()
    assert 'Entraîné\n' in done.stdout
    assert 'README.md is not text in UTF-8' in done.stdout.splitlines()[-1]
