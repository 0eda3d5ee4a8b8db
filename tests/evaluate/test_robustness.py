"""Accuracy on corrupted images, of the network with a classifier that the package has."""

import json

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import ImageNetInfo

from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.corruptions import Corruption
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate import robustness
from slimclr_hub.evaluate.network import open_for_test
from slimclr_hub.evaluate.robustness import RobustnessConfig, evaluate
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.weights.published import SHIPPED

pytestmark = pytest.mark.usefixtures('on_the_cpu')

WITH_HEAD, WITHOUT = (SHIPPED[tag].name for tag in ('mocov3_lincls_fashionmnist', 'mocov3_fashionmnist'))
LOOK = {'channels': 3, 'mean': (0.286,) * 3, 'std': (0.353,) * 3, 'num_workers': 0}


def test_accuracies_are_those_of_corrupted_crops():
    """By another way: corrupted by hand, one image at a time."""
    data = DataConfig(**LOOK)
    config = RobustnessConfig(network=WITH_HEAD, data=data, corruptions=('fog',), severities=(2,), images=60)
    found, tested = evaluate(config, Accelerator(), open_for_test(WITH_HEAD))
    assert tested == 60
    model = timm.create_model(WITH_HEAD, pretrained=True).eval()
    source = eval_loader(data, 'validation', 60, 0)
    corrupt, normalise = (
        Corruption('fog', 2),
        timm.data.create_transform((3, 28, 28), mean=data.mean, std=data.std, crop_pct=1.0, interpolation='bilinear'),
    )
    right: dict[str, dict[float, int]] = {
        'clean': dict.fromkeys(model.widths, 0),
        'fog': dict.fromkeys(model.widths, 0),
    }
    with torch.inference_mode():
        for index in source._loader.dataset.indices:
            image, label = source.source[int(index)]
            assert isinstance(image, Image.Image)
            for name, shown in (('clean', image), ('fog', corrupt(image))):
                for width, logits in model.forward_widths(normalise(shown)[None]).items():
                    right[name][width] += int(logits.argmax(1).item() == label)
    for name, severity in (('clean', 0), ('fog', 2)):
        assert found[name][severity] == pytest.approx({w: 100 * hits / 60 for w, hits in right[name].items()})


def test_command_writes_what_it_prints(tmp_path, capsys):
    arguments = [
        '--network',
        WITH_HEAD,
        '--images',
        '40',
        '--corruptions',
        '[jpeg, contrast]',
        '--severities',
        '[1, 5]',
    ]
    robustness._robustness([*arguments, '--data.num_workers', '0', '--output', str(tmp_path / 'out')])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / 'out' / 'robustness.json').read_text())
    assert record['images'] == 40
    assert record['top1'].keys() == {'clean', 'jpeg', 'contrast'}
    assert f'{record["top1"]["clean"]["0"]["0.25"]:.1f}' in printed
    mean = (record['top1']['jpeg']['1']['1.0'] + record['top1']['jpeg']['5']['1.0']) / 2
    assert f'{mean:.1f}' in printed
    with Image.open(tmp_path / 'out' / 'robustness.png') as figure:
        assert len(figure.convert('L').getcolors()) > 50


def test_result_of_other_images_is_not_overwritten(tmp_path):
    """Of ImageNet-R and then A by the default folder, say; the same evaluation may be repeated."""
    arguments = ['--network', WITH_HEAD, '--corruptions', '[]', '--data.num_workers', '0']
    arguments += ['--output', str(tmp_path / 'out')]
    for _ in range(2):
        robustness._robustness([*arguments, '--images', '20'])
    result = tmp_path / 'out' / 'robustness.json'
    before = result.read_bytes()
    for other, words in (
        (['--images', '30'], 'images 20, not 30'),
        (['--images', '20', '--data.size', '20'], 'data.size'),
    ):
        with pytest.raises(InputError, match=rf'robustness\.json is there already.*{words}.*--output .*out-2'):
            robustness._robustness([*arguments, *other])
    assert result.read_bytes() == before
    for content in b'{}', b'[]', b'{"settings": 3}', b'[' * 100_000, b'\xff':
        result.write_bytes(content)
        with pytest.raises(InputError, match='is not the result of robustness'):
            robustness._robustness([*arguments, '--images', '20'])


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'corruptions': ('rain',)}, "corruptions 'rain' is not one of gaussian_noise"),
        ({'severities': (0,)}, 'severities 0 is not one of 1, 2'),
        ({'severities': (1, 1)}, 'give one or several different ones'),
        ({'images': 0}, 'images is 0; give 1 or more'),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(InputError, match=words):
        RobustnessConfig(network=WITH_HEAD, **wrong)


@pytest.mark.parametrize(('named', 'split'), [('synsets', 'odd'), ('numbers', 'val')])
def test_some_classes_of_imagenet_compete_among_themselves(tmp_path, capsys, named, split):
    """As ImageNet-R, A and V2 have their folders, whose order is no class: against logits sorted by hand."""
    chosen = [7, 30, 200, 999]
    synsets = ImageNetInfo().label_names()
    model = timm.create_model('slimclr_resnet20', widths=(1.0, 0.5), num_classes=1000, in_chans=3).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 28, 28, 3), np.uint8))
    with torch.inference_mode():
        normalised = (images.permute(0, 3, 1, 2) / 255 - 0.286) / 0.353
        logits = {width: x[:, chosen] for width, x in model.forward_widths(normalised).items()}
    right = dict.fromkeys(model.widths, 0)
    for i, image in enumerate(images):
        # Two of three images get the class that the full width finds among the four.
        place = int(logits[1.0][i].argmax()) if i % 3 else i % 4
        name = synsets[chosen[place]] if named == 'synsets' else str(chosen[place])
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / split / name / f'{i}.png')
        for width, x in logits.items():
            right[width] += int(x[i].argmax()) == place
    for label in chosen:
        (tmp_path / split / (synsets[label] if named == 'synsets' else str(label))).mkdir(exist_ok=True)
    save_folder(model, tmp_path / 'net', size=28, mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0, card='')
    arguments = ['--network', str(tmp_path / 'net'), '--data.root', str(tmp_path)]
    arguments += ['--data.val_split', split] if split == 'odd' else []  # val is found by itself
    robustness._robustness([*arguments, '--corruptions', '[]', '--data.num_workers', '0'])
    record = json.loads((tmp_path / 'net' / 'robustness' / 'robustness.json').read_text())
    assert record['top1'] == {'clean': {'0': {str(w): pytest.approx(100 * n / 12) for w, n in right.items()}}}
    assert 'the 4 that these images have compete' in capsys.readouterr().out


def test_network_without_a_classifier_is_refused():
    config = RobustnessConfig(network=WITHOUT, data=DataConfig(**LOOK))
    with pytest.raises(InputError, match=r'has no classifier; `recipes/finetune\.py`'):
        evaluate(config, Accelerator(), open_for_test(WITHOUT))


def test_other_classes_are_refused():
    model = open_for_test(WITH_HEAD)
    model.reset_classifier(3)
    config = RobustnessConfig(network=WITH_HEAD, data=DataConfig(**LOOK), images=50)
    with pytest.raises(InputError, match='has 3 classes; give images of these'):
        evaluate(config, Accelerator(), model)
