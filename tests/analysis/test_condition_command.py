import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from slimclr_hub.analysis.condition import Condition, condition_defaults, condition_figure, linear_condition
from slimclr_hub.analysis.entry import main
from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.hub.opening import open_network
from slimclr_hub.runs.command_line import dump
from slimclr_hub.runs.figures import save_figure
from slimclr_hub.train.config import PretrainConfig
from tests.data_room.files import write_idx_set
from tests.hub.files import save_small

IMAGES = 80


@pytest.fixture(scope='module')
def network(tmp_path_factory) -> Path:
    """The folder of a run, whose recipe names its images."""
    folder = tmp_path_factory.mktemp('condition') / 'network'
    save_small(folder, in_chans=1)
    data = DataConfig(
        'fashion-mnist', root=str(write_idx_set(folder.parent / 'idx', 96, 37)), size=8, num_workers=0, batch_size=16
    )
    (folder / 'recipe.yaml').write_text(dump(PretrainConfig(data=data)))
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def analyse(*arguments: object) -> None:
    main(['condition', *(str(argument) for argument in arguments)])


@torch.no_grad()
def test_command(network, tmp_path, capsys, monkeypatch):
    """On the images of the network's run, without its classifier, by hand."""
    monkeypatch.setenv('COLUMNS', '80')
    options = ['--images', IMAGES, '--splits', '[train]', '--widths', '[0.25, 0.5]', '--output', tmp_path]
    analyse(network, *options, '--ridge', '1e-6')
    shown = capsys.readouterr().out
    assert '…' not in shown
    content = json.loads((tmp_path / 'condition.json').read_text())
    assert content['settings']['data.size'] == 8
    assert 'torch' in content['environment']['versions']
    data = DataConfig('fashion-mnist', root=str(network.parent / 'idx'), size=8, num_workers=0, batch_size=16)
    views, labels = (torch.cat(parts) for parts in zip(*eval_loader(data, 'train', IMAGES, 0), strict=True))
    model = open_network(str(network)).eval()
    model.reset_classifier(0)
    assert list(content['condition']['train']) == ['0.5', '0.25']
    for width, found in content['condition']['train'].items():
        features = [model.forward_at(views, each) for each in (1.0, float(width))]
        expected = linear_condition(*features, labels, ridge=1e-6)
        assert (found['images'], found['features']) == (IMAGES, [64, int(64 * float(width))])
        for name in 'mean', 'total', 'relative', 'own', 'shared', 'full':
            assert found[name] == pytest.approx(getattr(expected, name), rel=1e-3)
        assert f' {found["mean"]:.3g} ' in shown
        assert re.search(rf'│ train │ +{IMAGES} │ +{width} │', shown)
    assert (tmp_path / 'condition.pdf').is_file()

    before = (tmp_path / 'condition.json').read_bytes()
    with pytest.raises(SystemExit):
        analyse(network, *options, '--ridge', '1e-3')
    assert 'has results of other settings (ridge 1e-06 -> 0.001); give --output' in capsys.readouterr().err
    assert (tmp_path / 'condition.json').read_bytes() == before


def test_figure(tmp_path):
    values = [Condition((64, 64 // n), 99, 0.1 * n, 0.2, 0.3, 9.0, 1.0, 50.0, 70.0, 10.0 * n, 80.0) for n in (1, 2, 4)]
    results = {split: dict(zip((0.75, 0.5, 0.25), values, strict=True)) for split in ('train', 'validation')}
    figure = condition_figure(results, 'runs/network')
    assert 'network' in figure.get_suptitle()
    for axis, split in zip(figure.axes, ('training', 'training', 'validation', 'validation'), strict=True):
        assert f'99 {split} images' in axis.get_ylabel()
    save_figure(figure, tmp_path / 'condition')
    with Image.open(tmp_path / 'condition.png') as image:
        assert image.size == (1560, 1140)
        pixels = np.asarray(image.convert('RGB'))
    for colour in (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73):
        assert (pixels == colour).all(2).sum() > 2000
    assert (pixels == 255).all(2).mean() > 0.5


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['{network}', '--images', '0'], 'images is 0; give 1 or more'),
        (['{network}', '--splits', '[test]'], "splits 'test' is not one of train, validation"),
        (['{network}', '--ridge', '-1'], 'ridge is -1.0; give 0 or more'),
        (['{network}', '--data.val_split', 'null'], 'data.val_split is null, and splits asks for validation'),
        (['{network}', '--widths', '[0.6]'], 'width 0.6 is not one of 0.75, 0.5, 0.25'),
        (['--images', '9', '{network}'], '--images comes before the network; name it first'),
        (['{network}', '{network}'], 'are 2 networks; give one'),
        (['{network}', '--images', '37'], '64 features of 37 images have rank'),
    ],
)
def test_mistakes_end_in_one_line(network, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        analyse(*(argument.format(network=network) for argument in arguments), '--output', tmp_path)
    assert caught.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    assert len(error) == 1
    assert words in error[0]
    assert not list(tmp_path.iterdir())


def test_images_are_those_of_the_run_or_imagenet(network):
    own, published = condition_defaults([str(network)]), condition_defaults(['slimclr_resnet50.mocov2_200e_in1k'])
    assert (own['data.name'], own['data.size'], own['data.channels']) == ('fashion-mnist', 8, 1)
    assert (published['data.name'], published['data.size'], published['data.channels']) == ('folder', 224, 3)
