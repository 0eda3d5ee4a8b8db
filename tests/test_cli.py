"""The command as it is typed: what each of its commands writes and prints, and that a mistake is one clear line."""

import ast
import logging
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimclr_hub import cli
from slimclr_hub.inference.embed import embed
from slimclr_hub.inference.predict import predict
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.models.resolutions import Pair, Resolutions, copy_statistics, statistics_of
from slimclr_hub.runs.result import load
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone
from slimclr_hub.weights.hashes import state_hash
from slimclr_hub.weights.published import PUBLISHED, SHIPPED
from tests.data_room.files import some_images, write_pngs
from tests.hub.files import ROOT, Ended, save_small, small_network

COMMANDS = (
    'list',
    'info',
    'fetch',
    'convert',
    'extract',
    'export',
    'embed',
    'predict',
    'cascade',
    'resolutions',
    'latency',
    'choose',
    'push',
    'cards',
    'doctor',
)
PROBE = 'mocov2_200e_lincls_in1k'


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `slimclr-hub` with these arguments, in this process."""
    logger = logging.getLogger('slimclr_hub')
    level = logger.level

    def run(*argv: object) -> Ended:
        monkeypatch.setattr(sys, 'argv', ['slimclr-hub', *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    yield run
    logger.setLevel(level)


@pytest.fixture
def succeed(command):
    def run(*argv: object) -> str:
        ended = command(*argv)
        assert ended.status == 0, ended
        return ended.out

    return run


@pytest.fixture
def refuse(command):
    """Runs it with a mistake in it; the one line that is printed holds these words."""

    def run(*argv: object, words: tuple[str, ...]) -> None:
        ended = command(*argv)
        assert ended.status == 1, ended
        assert ended.err.startswith('Error: '), ended
        assert ended.err.count('\n') == 1, ended
        assert all(word in ended.err for word in words), ended
        assert ended.out == '', ended

    return run


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_pngs(tmp_path_factory.mktemp('images') / 'some', some_images('test', 5)[0])


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """The state dict of an ordinary network, and the network."""
    path = tmp_path_factory.mktemp('plain') / 'plain.pth'
    dense = small_network().extract(1.0)
    torch.save({'state_dict': dense.state_dict()}, path)
    return path, dense


def open_folder(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def some(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def rows(out):
    """The lines of a table, by cells."""
    return [line.split() for line in out.splitlines()]


# help


@pytest.mark.parametrize('name', [None, *COMMANDS])
def test_help(command, name):
    ended = command(*([name] if name else []), '--help')
    assert ended.status == 0
    assert ended.err == ''
    assert 'Usage: slimclr-hub' in ended.out
    if name is None:
        assert all(f'│ {other} ' in ended.out for other in COMMANDS)


def test_as_a_process(small, images, tmp_path):
    """What the installed command prints, and where; `test_push.py` has mistakes."""
    argv = [f'{sys.prefix}/bin/slimclr-hub', 'embed', small, images, '-o', 'x.npy', '--width', '0.25']
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == 'x.npy: 5 images, 16 features each, at width 0.25\n'
    assert done.stderr == f'Weights from the file {small}/model.safetensors\n'


@pytest.mark.parametrize('argument', ['--help', 'list'])
def test_what_needs_no_network_does_not_import_torch(argument):
    command = [sys.executable, '-X', 'importtime', f'{sys.prefix}/bin/slimclr-hub', argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'slimclr_hub.cli' in imported
    assert not {'torch', 'timm', 'numpy', 'slimclr_hub.models'} & imported


def test_analyze_passes_its_arguments_on(command, tmp_path):
    ended = command('analyze', '--help')
    assert (ended.status, ended.err) == (0, '')
    assert ended.out.startswith('usage: slimclr-hub analyze ANALYSIS')
    assert 'usage: slimclr-hub analyze condition' in command('analyze', 'condition', '--help').out
    ended = command('analyze', 'gradients', tmp_path, '--output', tmp_path / 'out')
    assert ended.status == 2
    assert ended.err.startswith('error: ')
    assert str(tmp_path) in ended.err
    assert ended.err.count('\n') == 1
    assert [*tmp_path.iterdir()] == []


# list and info


def test_network_in_the_package_needs_no_connection(succeed, images, tmp_path, monkeypatch):
    monkeypatch.setattr('socket.socket.connect', lambda *address: pytest.fail(f'a connection to {address[1:]}'))
    tag = 'slimclr_resnet20.mocov3_fashionmnist'
    linear = next(result for result in load(SHIPPED['mocov3_fashionmnist'].results) if result.protocol.kind == 'linear')
    assert '31.2 M' in succeed('info', tag)
    compared = succeed('compare', tag, '--no-speed')
    assert all(f'{top1:.1f}' in compared for top1 in linear.top1.values())
    embedded = succeed('embed', tag, images, '--out', tmp_path / 'x.npy', '--width', 0.5, '--workers', 0)
    assert '5 images, 32 features each' in embedded


def test_list(succeed):
    out = succeed('list')
    authors, ours = out.split('slimclr_resnet20.TAG')
    numbers, shipped = (
        [line for line in rows(part) if line and re.fullmatch(r'[\d.]+|\w+_(in1k|fashionmnist)', line[0])]
        for part in (authors, ours)
    )
    assert len(numbers) == len(PUBLISHED) * len(DEFAULT_WIDTHS)
    for i, published in enumerate(PUBLISHED.values()):
        first, *others = numbers[4 * i : 4 * i + 4]
        assert first[0] == published.tag
        for width, cells in zip(DEFAULT_WIDTHS, [first[1:], *others], strict=True):
            reported = published.reported[width]
            accuracies = [value for value in (reported.top1, reported.box_ap, reported.mask_ap) if value is not None]
            assert float(cells[0]) == width
            assert [float(cell) for cell in cells[5:]] == accuracies
    assert numbers[0][1:] == ['1', '25.6', 'M', '4.09', 'G', '72.3']
    assert numbers[7] == ['0.25', '1.48', 'M', '278', 'M', '62.4']
    assert [line[0] for line in shipped[::4]] == [*SHIPPED]
    for i, network in enumerate(SHIPPED.values()):
        linear = next(result.top1 for result in load(network.results) if result.protocol.kind == 'linear')
        assert [float(line[-1]) for line in shipped[4 * i : 4 * i + 4]] == [
            round(value, 1) for value in linear.values()
        ]
    lines = [line for line in out.splitlines() if line.startswith('timm.create_model(')]
    assert len(lines) == 2
    for line in lines:
        assert timm.is_model(
            ast.literal_eval(line[len('timm.create_model') :].split(',')[0] + ',)')[0].partition('.')[0]
        )


def assert_tells_small(out):
    assert 'slimclr_resnet20, head: switchable, 10 classes' in out
    assert 'images: 3 channels, 32x32, mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6], crop 1.0' in out
    assert ['1', '272', 'k', '40.8', 'M', '64', '1.05'] in rows(out)
    assert ['0.25', '17.5', 'k', '2.63', 'M', '16', '0.07'] in rows(out)


def test_info_of_a_folder(succeed, small):
    for name in small, f'local-dir:{small}':
        out = succeed('info', name)
        assert_tells_small(out)
        # Of the architecture's published networks nothing is told.
        assert not re.search('tag|licen|description|origin', out)


def test_info_of_a_file(succeed, small, published):
    out = succeed('info', small / 'model.safetensors')
    assert 'slimclr_resnet20, head: switchable, 10 classes' in out
    assert ['0.25', '17.5', 'k', '2.02', 'M', '16', '0.07'] in rows(out)
    out = succeed('info', published['mocov2_200e_in1k'] / 'model.safetensors')
    assert 'slimclr_resnet50, head: none' in out
    assert ['0.5', '5.89', 'M', '1.05', 'G', '1024', '22.58'] in rows(out)
    assert not re.search('tag|licen|description|origin', out)


def test_info_of_the_hub(hub, reader, small):
    hub.add_repo('some/small', small)
    ended = reader.command('info', 'hf-hub:some/small')
    assert ended.status == 0, ended.err
    assert_tells_small(ended.out)
    assert 'Weights from the Hub: some/small' in ended.err


@pytest.mark.parametrize(
    ('name', 'tag'), [(f'slimclr_resnet50.{PROBE}', PROBE), ('slimclr_resnet50', next(iter(PUBLISHED)))]
)
def test_info_of_a_tag_needs_no_download(reader, name, tag):
    ended = reader.command('info', name, HF_HUB_OFFLINE='1')
    assert ended.status == 0, ended.err
    assert ended.err == ''
    assert 'slimclr_resnet50, head: switchable, 1000 classes' in ended.out
    assert f'tag: {tag}' in ended.out
    assert 'epochs on ImageNet-1k without labels' in ended.out
    assert 'license: other' in ended.out
    top1 = f'{PUBLISHED[tag].reported[0.5].top1:.1f}'
    assert ['0.5', '6.92', 'M', '1.05', 'G', '1024', '26.49', top1] in rows(ended.out)


# convert


def hinted(out):
    """The network that training would start from by the command that was printed."""
    words = shlex.split(out.partition('accelerate launch recipes/pretrain.py ')[2])
    options = dict(zip(words[::2], words[1::2], strict=True))
    widths = ast.literal_eval(options.pop('--model.widths', str(DEFAULT_WIDTHS)))
    assert options.keys() == {'--model.name', '--model.weights'}
    config = ModelConfig(name=options['--model.name'], weights=options['--model.weights'], widths=tuple(widths))
    return make_backbone(config, 3).eval()


@pytest.mark.parametrize('target', ['start', 'start.safetensors'])
@pytest.mark.parametrize('widths', [(), (1.0, 0.5)])
def test_convert_a_plain_network(succeed, plain, tmp_path, target, widths):
    path, dense = plain
    out = succeed('convert', path, tmp_path / target, *[word for w in widths for word in ('--width', w)])
    held = ', '.join(map(str, widths or DEFAULT_WIDTHS))
    assert f'{tmp_path / target}: slimclr_resnet20, widths {held}\n' in out
    assert 'A start for training' in out
    assert 'Open it' not in out  # of no use as it is
    backbone = hinted(out)
    assert backbone.widths == (widths or DEFAULT_WIDTHS)
    torch.testing.assert_close(backbone.forward_features(some()), dense.forward_features(some()))


def test_convert_resnet50(succeed, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model('resnet50').eval()
    torch.save(network.state_dict(), tmp_path / 'resnet50.pth')
    out = succeed('convert', tmp_path / 'resnet50.pth', tmp_path / 'start')
    assert f'pretrain.py --model.name slimclr_resnet50 --model.weights {tmp_path}/start' in out
    with torch.inference_mode():
        features = network.forward_head(network.forward_features(some(64)), pre_logits=True)
        torch.testing.assert_close(hinted(out)(some(64)), features)


def test_convert_either_encoder(succeed, plain, tmp_path):
    """A checkpoint of MoCo v3, of which the momentum encoder is half of the other."""
    tensors = plain[1].state_dict()
    half = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    both = {f'module.base_encoder.{name}': tensor for name, tensor in tensors.items()}
    both |= {f'module.momentum_encoder.{name}': tensor for name, tensor in half.items()}
    torch.save({'state_dict': both, 'optimizer': {'state': {}}}, tmp_path / 'both.pth.tar')
    for encoder, expected in ([], tensors), (['--encoder', 'momentum'], half), (['--encoder', 'online'], tensors):
        succeed('convert', tmp_path / 'both.pth.tar', tmp_path / 'one.safetensors', '--overwrite', *encoder)
        assert torch.equal(load_file(tmp_path / 'one.safetensors')['conv1.weight'], expected['conv1.weight'])


def test_convert_the_authors(published):
    """The fixture converted them; here is what came of their names."""
    for tag, folder in published.items():
        assert (folder / 'README.md').read_text() == (ROOT / 'model_cards' / f'slimclr_resnet50.{tag}.md').read_text()
        assert open_folder(folder, width=0.5).pretrained_cfg['tag'] == tag


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
def test_convert_says_how_to_open(succeed, tmp_path, head):
    model = save_small(tmp_path / 'network', head=head, in_chans=1, widths=(1.0, 0.5))
    out = succeed('convert', tmp_path / 'network' / 'model.safetensors', tmp_path / 'again')
    assert 'slimclr_resnet20, widths 1.0, 0.5, with a probe of 10 classes' in out
    call = out.partition('Open it: ')[2].strip()
    assert call == f"timm.create_model('local-dir:{tmp_path}/again', pretrained=True, width=0.5)"
    opened = eval(call).eval()
    assert torch.equal(opened(some()[:, :1]), model.forward_at(some()[:, :1], 0.5))
    assert opened.head == head


def test_convert_replaces_only_when_told(succeed, refuse, plain, tmp_path):
    path, _ = plain
    (tmp_path / 'one.safetensors').write_text('precious')
    (tmp_path / 'README.md').write_text('# Precious\n')
    (tmp_path / 'notes').write_text('stay')
    for target, there in ('one.safetensors', 'one.safetensors'), ('', 'README.md'):
        refuse('convert', path, tmp_path / target, words=(f'{tmp_path / there} is there already', '--overwrite'))
        assert 'recious' in (tmp_path / there).read_text()
        succeed('convert', path, tmp_path / target, '--overwrite')
    assert {p.name for p in tmp_path.iterdir()} == {
        *('config.json', 'model.safetensors', 'README.md'),
        *('one.safetensors', 'notes'),
    }
    assert (tmp_path / 'notes').read_text() == 'stay'


# extract


def test_extract_for_timm(succeed, published, tmp_path):
    out = succeed('extract', published[PROBE], tmp_path / 'half', '--width', 0.5)
    call = out.partition('Open it: ')[2].strip()
    assert call == f"timm.create_model('local-dir:{tmp_path}/half', pretrained=True)"
    network, whole = eval(call).eval(), open_folder(published[PROBE], width=0.5)
    assert type(network) is timm.models.ResNet
    assert timm.data.resolve_model_data_config(network) == timm.data.resolve_model_data_config(whole)
    with torch.inference_mode():
        torch.testing.assert_close(network(some(64)), whole(some(64)), rtol=1e-4, atol=1e-4)


def test_extract_for_torchvision(succeed, published, tmp_path):
    path = tmp_path / 'whole.safetensors'
    succeed('extract', published[PROBE], path, '--width', 1, '--format', 'torchvision')
    network = torchvision.models.resnet50()
    network.load_state_dict(load_file(path))
    with torch.inference_mode():
        expected = open_folder(published[PROBE])(some(64))
        assert (network.eval()(some(64)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_extract_for_mmdet(succeed, published, tmp_path):
    path = tmp_path / 'quarter.pth'
    out = succeed('extract', published[PROBE], path, '--width', 0.25, '--format', 'mmdet')
    config, neck = re.fullmatch(r'backbone = (.*)\nneck in_channels: (.*)\n', out).groups()
    assert ast.literal_eval(neck) == [64, 128, 256, 512]
    config = ast.literal_eval(config)
    assert config['base_channels'] == config['stem_channels'] == 16
    assert config['init_cfg'] == {'type': 'Pretrained', 'checkpoint': str(path)}
    tensors = torch.load(path, weights_only=True)
    assert tensors['conv1.weight'].shape == (16, 3, 7, 7)


# export


@pytest.mark.parametrize(('format', 'widths'), [('onnx', (0.25,)), ('pt2', (1.0, 0.25))])
def test_export(succeed, small, tmp_path, format, widths):
    target = tmp_path / 'a [long] path, which is printed whole wherever it goes, be that a file or a program' / 'x'
    options = [word for width in widths for word in ('--width', width)]
    out = succeed('export', small, target, '--format', format, *options)
    assert out.startswith(f'{target}:\n')
    names = [f'slimclr_resnet20_w{width * 100:03.0f}.{format}' for width in widths]
    assert sorted(file.name for file in target.iterdir()) == sorted(names)
    for width, name in zip(widths, names, strict=True):
        (line,) = (line for line in out.splitlines() if name in line)
        assert line.split()[0] == f'{width:g}'
        assert float(line.split()[-1]) < 1e-4
    if format == 'pt2':
        program = torch.export.load(target / names[-1]).module()
        torch.testing.assert_close(program(some()), open_folder(small, width=0.25)(some()))


def test_export_in_int8(succeed, small, tmp_path):
    photos = write_pngs(tmp_path / 'photos', some_images('test', 20)[0])
    int8 = ('--int8', '--calibration', photos, '--least-cosine', 0.5)
    target = tmp_path / 'out'
    out = succeed('export', small, target, '--format', 'onnx', '--width', 0.25, *int8)
    name = 'slimclr_resnet20_int8_w025.onnx'
    (line,) = (line for line in out.splitlines() if name in line)
    assert [path.name for path in target.iterdir()] == [name]
    cosine, agreement = map(float, line.split()[-2:])
    assert 0.9 < cosine <= 1
    assert 0 < agreement <= 100


def test_export_keeps_what_is_there(refuse, succeed, small, tmp_path):
    file = tmp_path / 'slimclr_resnet20_w025.pt2'
    file.write_text('precious')
    (tmp_path / 'other').write_text('stay')
    refuse('export', small, tmp_path, '--format', 'pt2', words=(str(file), 'is there already', '--overwrite'))
    assert {path.name for path in tmp_path.iterdir()} == {'other', file.name}  # not one width of four
    succeed('export', small, tmp_path, '--format', 'pt2', '--width', 0.25, '--overwrite')
    torch.export.load(file)


@pytest.mark.parametrize('size', [99_999_999, 0])
def test_export_of_an_impossible_size(refuse, small, tmp_path, size):
    refuse(
        'export',
        small,
        tmp_path / 'out',
        '--format',
        'pt2',
        '--size',
        size,
        words=(f'size {size} is not from 1 to 4096; give',),
    )
    assert not any(tmp_path.iterdir())


def test_export_that_went_wrong(command, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / 'network')
    tensors = load_file(folder / 'model.safetensors')
    tensors['fc.w100.weight'][3] = 3e38  # outputs are infinite
    save_file(tensors, folder / 'model.safetensors')
    ended = command('export', folder, tmp_path / 'out', '--format', 'pt2', '--width', 1)
    assert ended.status == 1
    assert ended.err.startswith(f'Error: {tmp_path}/out/slimclr_resnet20_w100.pt2 was not written')
    assert ended.err.count('\n') == 1
    assert [*(tmp_path / 'out').iterdir()] == []


# embed and predict


@pytest.mark.parametrize('suffix', ['.npy', '.safetensors', '.parquet'])
def test_embed(succeed, small, images, tmp_path, suffix):
    path = tmp_path / 'new' / f'features{suffix}'
    out = succeed('embed', small, images, '--out', path, '--width', 0.5, '--batch-size', 2, '--workers', 0)
    assert out == f'{path}: 5 images, 32 features each, at width 0.5\n'
    expected = embed(open_folder(small, width=0.5), images, progress=False)
    if suffix == '.npy':
        features, names = np.load(path), path.with_suffix('.names.txt').read_text().splitlines()
    elif suffix == '.safetensors':
        with safe_open(path, 'np') as file:
            features, names = file.get_tensor('features'), ast.literal_eval(file.metadata()['names'])
    else:
        table = parquet.read_table(path)
        features, names = np.array(table['embedding'].to_pylist()), table['path'].to_pylist()
    assert names == expected.names == [f'{i:04d}.png' for i in range(5)]
    np.testing.assert_allclose(features, expected.features, rtol=1e-5, atol=1e-6)


def test_embed_and_predict_leave_out_what_they_cannot_read(succeed, refuse, small, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / 'images')
    (folder / '0002.png').write_text('no image')
    words = ('cannot read 0002.png', '--skip-unreadable')
    refuse('embed', small, folder, '-o', tmp_path / 'x.npy', words=words)
    refuse('predict', small, folder, words=words)
    assert not (tmp_path / 'x.npy').exists()
    assert '4 images' in succeed('embed', small, folder, '-o', tmp_path / 'x.npy', '--skip-unreadable')
    assert '0003.png' in succeed('predict', small, folder, '--skip-unreadable')


def test_predict(succeed, small, images):
    files = [images / '0003.png', images / '0001.png']
    out = succeed('predict', small, *files, '--width', 0.25, '--top', 3, '--batch-size', 1, '--workers', 0)
    model = open_folder(small, width=0.25)
    cells = [line for line in rows(out.replace('│', ' ')) if line and re.fullmatch(r'\d+\.\d', line[-1])]
    assert [line[0] for line in cells if len(line) == 3] == [str(file) for file in files]
    found = [[int(line[-2]), float(line[-1])] for line in cells]
    expected = [
        [guess.index, round(100 * guess.probability, 1)]
        for prediction in predict(model, files, top=3, progress=False)
        for guess in prediction.classes
    ]
    assert len(expected) == 6
    assert found == expected


def test_predict_names_the_classes_of_imagenet(succeed, published, images):
    out = succeed('predict', published[PROBE], images / '0000.png', '--top', 1, '--width', 0.25, '--device', 'cpu')
    assert re.search(r'[a-z]{4}', out.replace('probability', '').replace('image', '').replace('class', ''))


def test_latency_and_choose(succeed, refuse, monkeypatch, tmp_path):
    monkeypatch.setattr('slimclr_hub.models.budget.cached_assets_path', lambda *names: tmp_path.joinpath(*names))
    refuse('choose', 'slimclr_resnet20', '--max-ms', 1e4, '--threads', 1, words=('measure first: slimclr-hub latency',))
    refuse('choose', 'slimclr_resnet20', words=('no budget; give --max-ms',))
    refuse('latency', 'slimclr_resnet20', '--runtime', 'tvm', words=("runtime 'tvm' is not one of torch",))
    measured = succeed(
        'latency', 'slimclr_resnet20', '--threads', 1, '--repeats', 2, '--figure', tmp_path / 'figure.png'
    )
    assert 'batches of 1 at 28x28, torch, threads: 1' in measured
    assert (tmp_path / 'figure.png').stat().st_size > 1000
    chosen = succeed('choose', 'slimclr_resnet20', '--max-ms', 1e4, '--threads', 1)
    assert "timm.create_model('slimclr_resnet20', pretrained=True, width=1)" in chosen
    assert ['0.5', '68.8', 'k', '7.90', 'M', '32', '0.27', '84.8'] in rows(chosen)
    published = succeed('choose', 'slimclr_resnet50', '--max-mib', 20)
    assert 'width 0.25 needs 7.66 MiB; width 0.5 would need 26.49 MiB' in published


def test_cascade(succeed, refuse, tmp_path):
    folder, out = write_pngs(tmp_path / 'images', some_images('test', 40)[0]), tmp_path / 'cascade.json'
    said = succeed('cascade', 'slimclr_resnet20', folder, '-o', out, '--workers', 0, '--figure', tmp_path / 'curve.png')
    assert 'On 20 images that the thresholds were not fitted on' in said
    assert (tmp_path / 'curve.png').stat().st_size > 1000
    predicted = ('predict', 'slimclr_resnet20', folder, '--workers', 0)
    assert '0039.png' in succeed(*predicted, '--cascade', out, '--budget', 5e6)
    refuse('cascade', 'slimclr_resnet20', folder, '-o', out, words=('is there already',))
    refuse(*predicted, '--budget', 5e6, words=('--budget 5e+06 is of a cascade',))
    refuse(*predicted, '--cascade', out, '--budget', 5, words=('budget 5: the cheapest cascade has',))
    refuse(*predicted, '--cascade', out, '--width', 0.5, words=('--width 0.5: a cascade chooses',))


def test_resolutions(succeed, refuse, tmp_path):
    folder, out = write_pngs(tmp_path / 'images' / '0', some_images('test', 40)[0]).parent, tmp_path / 'r.safetensors'
    said = succeed('resolutions', 'slimclr_resnet20', folder, '--size', 14, '-o', out, '--workers', 0)
    assert 'On 20 images that were not for the statistics' in said
    chosen = succeed('choose', 'slimclr_resnet20', '--max-macs', 6e5, '--resolutions', out)
    assert f"width=0.25, resolutions='{out}')\nmodel.set_resolution(14)\n" in chosen
    hint = succeed('choose', 'slimclr_resnet20', '--max-macs', 6e6)
    assert 'slimclr-hub resolutions slimclr_resnet20 IMAGES --size PIXELS' in hint
    predicted = ('predict', 'slimclr_resnet20', folder, '--workers', 0)
    assert '0039.png' in succeed(*predicted, '--resolutions', out, '--size', 14)
    refuse('choose', 'slimclr_resnet20', '--max-macs', 1, '--size', 0, words=('size is 0; give 1 or more',))
    refuse(*predicted, '--size', 14, words=('--resolutions FILE and --size go together',))
    refuse(
        *predicted,
        '--resolutions',
        out,
        '--size',
        15,
        words=('size 15 in place of 28: there are statistics of sizes 14, 28',),
    )
    refuse(
        'choose', 'slimclr_resnet20', '--max-macs', 1, '--resolutions', out, '--size', 9, words=('--size 9: a size',)
    )


def test_extraction_at_another_size(succeed, tmp_path):
    model = save_small(tmp_path / 'net', name='slimclr_resnet18', widths=(0.25,), num_classes=0)
    pairs = tuple(Pair(0.25, size) for size in (32, 20))
    statistics = {20: {name: tensor + 1 for name, tensor in statistics_of(model).items()}}
    Resolutions(state_hash(model), 32, 9, 0, pairs).save(statistics, tmp_path / 'r.safetensors')
    at = ('--width', 0.25, '--resolutions', tmp_path / 'r.safetensors', '--size', 20)
    succeed('extract', tmp_path / 'net', tmp_path / 'dense', *at)
    dense = open_folder(tmp_path / 'dense')
    assert dense.pretrained_cfg['input_size'] == (3, 20, 20)
    copy_statistics(statistics[20], model)
    images = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(dense(images), model(images), rtol=1e-4, atol=1e-4)


# push and cards


def test_push_dry_run(succeed, small):
    out = succeed('push', small, 'me/net', '--dry-run')
    assert f'{small} -> me/net' in out
    assert ['model.safetensors', '1.16', 'M'] in rows(out)
    assert out.endswith('Nothing was uploaded (--dry-run).\n')


def test_cards(succeed, tmp_path):
    out = succeed('cards', tmp_path / 'new' / 'cards')
    ours = {path.name: path.read_text() for path in (ROOT / 'model_cards').glob('*.md')}
    written = {path.name: path.read_text() for path in (tmp_path / 'new' / 'cards').iterdir()}
    assert written == ours, 'run `slimclr-hub cards`'
    assert sorted(out.splitlines()) == sorted(str(tmp_path / 'new' / 'cards' / name) for name in ours)


# mistakes


@pytest.mark.parametrize('name', ['info', 'extract', 'export', 'embed', 'predict'])
@pytest.mark.parametrize(
    ('network', 'words'),
    [
        ('slimclr_resnet5', ("'slimclr_resnet5' is not a tag", 'a folder', '.safetensors file', 'hf-hub:USER/NAME')),
        ('resnet50', ("'resnet50' is not a tag",)),
        ('slimclr_resnet50.mocov4', ('mocov4',)),
        ('slimclr_resnet20x4', ('no pretrained weights of slimclr_resnet20x4', 'mocov3_300e_lincls_in1k')),
        ('not/there', ("'not/there' is not",)),
        ('local-dir:not/there', ('not/there does not exist',)),
        ('hf-hub:too/many/names', ("'too/many/names' is not the name of a repository",)),
        ('{images}', ('has no config.json',)),
        ('{pickle}', ('is a PyTorch checkpoint, not safetensors', 'slimclr-hub convert')),
        ('{images}/0000.png', ('is not a whole safetensors file',)),
    ],
)
def test_network_that_is_none(refuse, images, plain, tmp_path, name, network, words):
    network = network.format(images=images, pickle=plain[0])
    arguments = {
        'extract': [tmp_path / 'out', '--width', 0.5],
        'export': [tmp_path / 'out', '--format', 'pt2'],
        'embed': [images, '-o', tmp_path / 'out.npy'],
        'predict': [images],
    }
    refuse(name, network, *arguments.get(name, []), words=words)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    'arguments',
    [
        'extract {small} {out} --width 0.3',
        'export {small} {out} --format pt2 --width 1 --width 0.3',
        'embed {small} {images} -o {out}.npy --width 0.3',
        'predict {small} {images} --width 0.3',
    ],
)
def test_width_that_is_none(refuse, small, images, tmp_path, arguments):
    arguments = arguments.format(small=small, images=images, out=tmp_path / 'out').split()
    refuse(*arguments, words=('width 0.3 ', '1.0, 0.75, 0.5, 0.25'))
    assert [*tmp_path.iterdir()] == []


class Evil:
    def __reduce__(self):
        return print, ('it was run',)  # `refuse` would see it


@pytest.mark.parametrize(
    ('source', 'target', 'words'),
    [
        ('{tmp}/none.pth', '{tmp}/out', ('{tmp}/none.pth does not exist',)),
        ('{tmp}', '{tmp}/out', ('{tmp} does not exist or is not a file',)),
        ('{tmp}/evil.pth', '{tmp}/out', ('evil.pth', 'print', 'refused')),
        ('{tmp}/text.pth', '{tmp}/out', ('text.pth is not a checkpoint',)),
        ('{tmp}/vit.pth', '{tmp}/out', ('vit.pth', 'blocks.0.attn')),
        ('{plain}', '{tmp}/out.pth', ('out.pth is the name of a file; give a folder',)),
        ('{plain}', '{tmp}/text.pth', ('text.pth is the name of a file; give a folder',)),
        ('{plain}', '{plain}/out', ('{plain}/out',)),
        ('{plain}', '{tmp}/folder.safetensors', ('folder.safetensors is a folder',)),
        ('{plain} --encoder momentum', '{tmp}/out', ('plain.pth', 'no momentum network', 'encoder_k.conv1.weight')),
        ('{plain} --width 0.5', '{tmp}/out', ('widths (0.5,) lack 1.0',)),
        ('{plain} --width 1 --width 2', '{tmp}/out', ('width 2 is outside (0, 1]',)),
    ],
)
def test_conversion_that_cannot_be(refuse, plain, tmp_path, source, target, words):
    with (tmp_path / 'evil.pth').open('wb') as file:
        pickle.dump({'state_dict': Evil()}, file, protocol=2)
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'folder.safetensors').mkdir()
    torch.save({'blocks.0.attn.qkv.weight': torch.zeros(3)}, tmp_path / 'vit.pth')
    before = sorted(tmp_path.iterdir())
    names = {'tmp': tmp_path, 'plain': plain[0]}
    first, *options = source.format(**names).split()
    refuse('convert', first, target.format(**names), *options, words=tuple(word.format(**names) for word in words))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('{small} {tmp}/out --width 0.5', ('no slimclr_resnet20', 'timm has resnet18')),
        ('{small} {tmp}/out.pth --width 0.5', ('out.pth is the name of a file; give a folder',)),
        ('{small} {small} --width 0.5', ('config.json is there already', '--overwrite')),
        ('{probe} {tmp}/out --width 0.5 --format mmdet', ('out does not end in .safetensors, .pth or .pt',)),
        ('{probe} {tmp}/out.pth --width 0.5 --format torchvision', ('width 0.5', '--format timm')),
        ('{probe} {small}/README.md --width 1 --format torchvision', ('README.md is there already',)),
        ('{probe} {tmp} --width 1 --format torchvision', ('{tmp} is a folder; give the name of a file',)),
    ],
)
def test_extraction_that_cannot_be(refuse, small, published, tmp_path, arguments, words):
    names = {'small': small, 'probe': published[PROBE], 'tmp': tmp_path}
    refuse('extract', *arguments.format(**names).split(), words=tuple(word.format(**names) for word in words))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('embed {small} {images} -o {tmp}/x.txt', ("the suffix '.txt' is not one of .safetensors, .npy, .parquet",)),
        ('embed {small} {images} -o {images}/0000.png', ("'.png' is not one of",)),
        ('embed {small} {images} -o {there}', ('there.npy is there already', '--overwrite')),
        # Before the network is as much as looked for.
        ('embed not-there {images} -o {tmp}/x.txt', ("the suffix '.txt'",)),
        ('extract not-there {small} --width 1', ('config.json is there already',)),
        ('embed {small} {images} {tmp}/none.png -o {tmp}/x.npy', ('{tmp}/none.png: No such file or directory',)),
        ('embed {small} {tmp} -o {tmp}/x.npy', ('{tmp}: no images in this folder',)),
        ('embed {small} {images} -o {tmp}/x.npy --device nowhere', ('--device nowhere',)),
        ('embed {small} {images} -o {tmp}/x.npy --batch-size 0', ('--batch-size', '0')),
        ('embed {small} {images} -o {tmp}/x.npy --workers -1', ('--workers', '-1')),
        ('predict {small} {tmp}/none.png', ('none.png: No such file or directory',)),
        ('predict {small} {images} --top 0', ('--top is 0',)),
        ('predict {backbone} {images}', ('has no head', 'lincls', 'embed')),
        ('export {small} {images}/0000.png --format pt2', ('0000.png',)),
        ('export {small} {tmp}/out --format pt2 --size 0', ('size 0',)),
        ('export {small} {tmp}/out --format onnx --int8', ('--int8, --calibration FOLDER', 'give the first two')),
        ('export {small} {tmp}/out --format onnx --calibration {images}', ('--int8, --calibration FOLDER',)),
        ('export {small} {tmp}/out --format onnx --int8 --calibration {images}', ('5 of the 16 images',)),
        ('export {small} {tmp}/out --format onnx --size 0', ('size 0 is not from 1 to 4096',)),
        ('latency {small} --size 5000', ('size is 5000; give 4096 or less',)),
        ('cascade {small} {images} -o {there}/x.json', ('--out', 'there.npy takes no files')),
        ('resolutions {small} {images} --size 20 -o {there}/x.st', ('--out', 'there.npy takes no files')),
        ('export {small} {tmp}/out --format pt2 --int8 --calibration {images}', ('pt2 is not one of onnx', 'int8')),
        ('cards {images}/0000.png', ('0000.png',)),
    ],
)
def test_other_mistakes(refuse, small, published, images, tmp_path, arguments, words):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'there.npy').write_text('precious')
    names = {'small': small, 'images': images, 'tmp': tmp_path / 'empty', 'there': tmp_path / 'there.npy'}
    names['backbone'] = published['mocov2_200e_in1k']
    before = {path: path.stat().st_mtime_ns for path in images.iterdir()}
    refuse(*arguments.format(**names).split(), words=tuple(word.format(**names) for word in words))
    assert (tmp_path / 'there.npy').read_text() == 'precious'
    assert not [path for path in (tmp_path / 'empty').rglob('*') if path.is_file()]
    assert before == {path: path.stat().st_mtime_ns for path in images.iterdir()}


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('unknown', "no such command 'unknown'"),
        ('info', "missing argument 'network'"),
        ('extract {small} out', "missing option '--width'"),
        ('extract {small} out --width half', "invalid value for '--width'"),
        (
            'extract {small} out --width 0.5 --format tensorflow',
            "'tensorflow' is not one of 'timm', 'torchvision', 'mmdet'",
        ),
        ('export {small} out', "missing option '--format'"),
        (
            'export {small} out --format tflite',
            "'tflite' is not one of 'onnx', 'openvino', 'executorch', 'litert', 'pt2'",
        ),
        ('embed {small} images', "missing option '--out'"),
        ('embed {small} images -o x.npy --precision int8', "'int8' is not one of 'no', 'fp16', 'bf16'"),
        ('convert a b --encoder teacher', "'teacher' is not one of 'online', 'momentum'"),
        ('list --all', 'no such option: --all'),
    ],
)
def test_usage(command, small, arguments, words):
    ended = command(*arguments.format(small=small).split())
    assert ended.status == 2
    assert words in ' '.join(ended.err.replace('│', ' ').split()).lower()  # capitals change with typer's version
    assert 'Traceback' not in ended.err
    assert ended.out == ''
