"""The networks in the package: what they are, that they open without a network, and that their numbers hold."""

import shutil

import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from slimclr_hub.data.sources import read_embedded
from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.hub.open import open_network
from slimclr_hub.models.cost import width_facts
from slimclr_hub.models.loading import check_complete
from slimclr_hub.runs.result import RAW_PIXELS, load
from slimclr_hub.weights import published
from slimclr_hub.weights.hashes import state_hash
from slimclr_hub.weights.published import SHIPPED, published_facts
from slimclr_hub.weights.tensor_file import TensorFile

TAGS = pytest.mark.parametrize('tag', SHIPPED)
DENSE = {0.75: '_075', 0.5: '_050', 0.25: '_025'}
LINCLS, BACKBONE = SHIPPED


@TAGS
def test_file_is_a_whole_network(tag):
    shipped = SHIPPED[tag]
    assert file_hash(shipped.weights) == shipped.sha256
    assert shipped.weights.stat().st_size < 1.3e6
    with TensorFile(shipped.weights) as file:
        layout = check_complete({name: tuple(shape) for name, shape in file.shapes.items()})
    assert (layout.architecture, layout.num_classes) == (shipped.architecture, shipped.num_classes)


@TAGS
def test_facts_are_those_of_the_network(tag):
    shipped = SHIPPED[tag]
    model = timm.create_model(shipped.name, pretrained=True)
    assert model.num_classes == shipped.num_classes
    assert published_facts(shipped.num_classes, shipped.architecture) == width_facts(model, shipped.size)
    assert model.pretrained_cfg['input_size'] == (3, shipped.size, shipped.size)


def test_both_files_have_one_backbone():
    probe, backbone = (timm.create_model(SHIPPED[tag].name, pretrained=True, num_classes=0) for tag in SHIPPED)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, probe.state_dict()[name]), name


def test_the_default_is_the_one_with_a_probe():
    model = timm.create_model('slimclr_resnet20', pretrained=True, width=0.5)
    assert (model.pretrained_cfg['tag'], model.width, model.num_classes) == (LINCLS, 0.5, 10)


@TAGS
def test_every_way_to_open_a_width_gives_the_same(tag, random_images):
    name = SHIPPED[tag].name
    model = timm.create_model(name, pretrained=True).eval()
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    x = random_images(1)
    with torch.no_grad():
        for width in model.widths:
            expected = model.forward_at(x.expand(-1, 3, -1, -1), width)
            lazy = timm.create_model(name, pretrained=True, width=width, lazy=True).eval()
            assert torch.equal(lazy(x.expand(-1, 3, -1, -1)), expected)
            torch.testing.assert_close(grey.forward_at(x, width), expected, atol=1e-4, rtol=1e-4)
            if width in DENSE:
                variant = name.replace('.', f'{DENSE[width]}.')
                dense = timm.create_model(variant, pretrained=True).eval()
                assert torch.equal(dense(x.expand(-1, 3, -1, -1)), expected)
                alone = open_network(variant).eval()
                assert alone.widths == (width,)
                torch.testing.assert_close(alone(x.expand(-1, 3, -1, -1)), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def random_images():
    def images(channels):
        return torch.randn(4, channels, 24, 24, generator=torch.Generator().manual_seed(0))

    return images


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(published._FOLDER, tmp_path / 'shipped')
    monkeypatch.setattr(published, '_FOLDER', tmp_path / 'shipped')
    shipped = SHIPPED[BACKBONE]
    overlay = {'tag': BACKBONE, 'file': str(shipped.weights)}
    content = bytearray(shipped.weights.read_bytes())
    content[-1] ^= 1
    shipped.weights.write_bytes(content)
    for damage in (lambda: None, shipped.weights.unlink):
        damage()
        with pytest.raises(InputError, match=r'fashionmnist\.safetensors is missing or damaged; install'):
            timm.create_model(shipped.name, pretrained=True, pretrained_cfg_overlay=overlay)


# The 1,000 test images in the package are among the 10,000 of the recorded accuracies.


def images_of(split, model, count):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images, labels = (array[:count] for array in read_embedded(split))
    tensors = torch.stack([transform(Image.fromarray(image).convert('RGB')) for image in images])
    return tensors, torch.from_numpy(labels).long()


def test_probe_is_as_good_as_recorded():
    model = timm.create_model('slimclr_resnet20', pretrained=True).eval()
    images, labels = images_of('test', model, 1000)
    recorded = next(result.top1 for result in load(SHIPPED[LINCLS].results) if result.protocol.kind == 'linear')
    with torch.inference_mode():
        for width in model.widths:
            right = (model.forward_at(images, width).argmax(1) == labels).double().mean().item()
            share = recorded[width] / 100
            assert abs(right - share) < 3 * (share * (1 - share) / len(labels)) ** 0.5


def test_recorded_accuracies_are_above_baselines():
    """What the card claims: three standard errors above raw pixels at the wide widths, and far above random weights."""
    results = {(of.network == RAW_PIXELS, of.protocol.kind): of for of in load(SHIPPED[BACKBONE].results)}
    for kind, widths in {'knn': (1.0, 0.75, 0.5), 'linear': (1.0, 0.75)}.items():
        own, pixels = results[False, kind], results[True, kind]
        assert own.images == pixels.images == 10_000
        for width in widths:
            assert own.top1[width] > pixels.top1[1.0] + 3 * own.standard_error(width)
    knn = results[False, 'knn']
    assert all(knn.top1[width] > start + 20 for width, start in knn.start.items())


@TAGS
def test_recorded_accuracies_are_of_this_file(tag):
    model = timm.create_model(SHIPPED[tag].name, pretrained=True, num_classes=0)
    (linear,) = (of for of in load(SHIPPED[tag].results) if of.network != RAW_PIXELS and of.protocol.kind == 'linear')
    assert linear.settings['frozen'] == state_hash(model)


def test_neighbours_are_far_better_than_those_of_random_weights():
    name = SHIPPED[BACKBONE].name
    model = timm.create_model(name, pretrained=True).eval()
    torch.manual_seed(0)
    random = timm.create_model(name, zero_init_last=False)  # its normalisations by the batch
    (bank, bank_labels), (images, labels) = images_of('train', model, 2000), images_of('test', model, 1000)

    def accuracy(network, width):
        network.set_width(width)
        classifier = KNeighborsClassifier(20, metric='cosine').fit(network(bank), bank_labels)
        return classifier.score(network(images), labels)

    with torch.inference_mode():
        for width in (1.0, 0.25):
            assert accuracy(model, width) > max(accuracy(random, width) + 0.1, 0.78)
