"""Statistics of other sizes against a pass of an ordinary network, files from elsewhere, and the choice of a pair."""

import copy
import json
import logging
from dataclasses import asdict, replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.inference import resolutions as fitting
from slimclr_hub.inference.predict import predict
from slimclr_hub.inference.runner import InferenceConfig, preprocessing
from slimclr_hub.models import budget
from slimclr_hub.models.budget import Budget, QueryTable, Setting, Timing, choose, machine_of, table_path, versions_of
from slimclr_hub.models.resolutions import Pair, Resolutions, load_resolutions, statistics_of
from slimclr_hub.weights.hashes import state_hash
from tests.data_room.files import some_images

COUNT = 60
CONFIG = InferenceConfig(batch_size=10, workers=0, progress=False)


@pytest.fixture(scope='module')
def shipped():
    return timm.create_model('slimclr_resnet20', pretrained=True).eval()


@pytest.fixture
def model(shipped):
    return copy.deepcopy(shipped)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Real images in folders named by the numbers of their classes."""
    folder = tmp_path_factory.mktemp('garments')
    for index, (image, label) in enumerate(zip(*some_images('test', COUNT), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f'{index:04d}.png')
    return folder


@pytest.fixture(scope='module')
def fitted(shipped, folder):
    before = state_hash(shipped)
    found = fitting.fit_resolutions(shipped, folder, [20], CONFIG)
    assert state_hash(shipped) == before
    assert shipped.pretrained_cfg['input_size'] == (3, 28, 28)
    return found


@pytest.fixture(scope='module')
def file(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp('resolutions') / 'resolutions.safetensors'
    fitted[0].save(fitted[1], path)
    return path


def halves(model, folder, size):
    """Batches of 10 for the statistics, and images and labels for accuracy, as `fit_resolutions` divides them."""
    sized = copy.deepcopy(model)
    fitting.set_size(sized, size)
    transform, mode = preprocessing(sized)
    files = sorted(folder.glob('*/*.png'), key=lambda path: (int(path.parent.name), path.name))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).tolist()
    images = torch.stack([transform(Image.open(path).convert(mode)) for path in files])
    labels = torch.tensor([int(path.parent.name) for path in files])
    first, second = sorted(order[: COUNT // 2]), sorted(order[COUNT // 2 :])
    return images[first].split(10), images[second], labels[second]


def moments(model, width, batches):
    """Mean over batches of mean and unbiased variance before each normalisation of an ordinary network in training."""
    dense = model.extract(width).train()
    sums = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def record(_, inputs, name=name):
                x = inputs[0].transpose(0, 1).flatten(1)
                sums.setdefault(name, []).append((x.mean(1), x.var(1)))

            module.register_forward_pre_hook(record)
    with torch.no_grad():
        for batch in batches:
            dense(batch)
    return {name: [torch.stack(each).mean(0) for each in zip(*found, strict=True)] for name, found in sums.items()}


def test_statistics_are_moved_by_what_the_images_change(shipped, fitted, folder):
    own = {name: tensor.clone() for name, tensor in statistics_of(shipped).items()}
    for name, tensor in fitted[1][28].items():
        assert torch.equal(tensor, own[name])  # of its own size, to the last bit
    for width in (1.0, 0.25):
        there, here = (moments(shipped, width, halves(shipped, folder, size)[0]) for size in (20, 28))
        assert len(there) == 21
        key = f'w{round(100 * width):03}'
        for norm, (mean, variance) in there.items():
            switched = f'{norm}.{key}'
            wanted = own[f'{switched}.running_mean'] + mean - here[norm][0]
            torch.testing.assert_close(fitted[1][20][f'{switched}.running_mean'], wanted, rtol=1e-4, atol=1e-5)
            wanted = own[f'{switched}.running_var'] * (variance + 1e-5) / (here[norm][1] + 1e-5)
            torch.testing.assert_close(fitted[1][20][f'{switched}.running_var'], wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_network_switches_and_comes_back(model, fitted, file, folder):
    before, (_, images, labels) = state_hash(model), halves(model, folder, 20)
    found = model.load_resolutions(file)
    assert found == fitted[0] == load_resolutions(file)
    assert (found.sizes, found.images, found.tested) == ((20, 28), COUNT // 2, COUNT // 2)
    with model.set_resolution(20):
        assert state_hash(model) != before
        for pair in found.pairs:
            if pair.size == 20:
                right = model.forward_at(images, pair.width).argmax(1) == labels
                assert pair.accuracy == pytest.approx(right.double().mean().item())
        dense = model.extract(0.5)
        expected = model.forward_at(images, 0.5)
    assert state_hash(model) == before
    assert model.pretrained_cfg['input_size'] == (3, 28, 28)
    # What was taken away has the statistics and the size of the pair.
    assert dense.pretrained_cfg['input_size'] == (3, 20, 20)
    torch.testing.assert_close(dense(images), expected, rtol=1e-4, atol=1e-4)
    image = sorted(folder.glob('*/*.png'))[0]
    transform, mode = preprocessing(dense)
    probabilities = dense(transform(Image.open(image).convert(mode))[None]).softmax(1)
    (said,) = predict(dense, image, top=1, workers=0, progress=False)
    assert said.classes[0].probability == pytest.approx(probabilities.max().item(), abs=1e-5)
    half = copy.deepcopy(model).half()
    own = state_hash(half)
    with half.set_resolution(20):
        assert state_hash(half) != own
    assert state_hash(half) == own


def test_what_cannot_be_switched(model, file):
    with pytest.raises(InputError, match=r'no statistics of other sizes: model\.load_resolutions\(FILE\)'):
        model.set_resolution(20)
    model.load_resolutions(file)
    message = r'size 24 in place of 28: there are statistics of sizes 20, 28, each at widths 1, 0\.75, 0\.5, 0\.25'
    with pytest.raises(InputError, match=message):
        model.set_resolution(24)
    other = copy.deepcopy(model)
    other.add_width(0.6)
    for changed in model, other:
        if changed is model:
            changed.train()(torch.randn(2, 3, 28, 28))
        with pytest.raises(InputError, match='the statistics have changed since those of other sizes were loaded'):
            changed.set_resolution(20)
        with pytest.raises(InputError, match='is of other weights or another size; make it again'):
            changed.load_resolutions(file)


ONE = 'layer1.0.bn1.w050.running_var'


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        ({f'20.{ONE}': None}, f'20.{ONE} is missing'),
        ({f'20.{ONE}': torch.ones(9)}, rf'20.{ONE} is missing, or is not of shape \[8\]'),
        ({f'20.{ONE}': torch.full((8,), torch.nan)}, f'20.{ONE} holds NaN or infinite values'),
        ({f'20.{ONE}': torch.full((8,), -1.0)}, f'20.{ONE} is a variance below 0'),
        ({f'20.{ONE}': torch.ones(8, dtype=torch.long)}, f'20.{ONE} is of torch.int64'),
    ],
    ids=['missing', 'shape', 'nan', 'negative', 'type'],
)
def test_damaged_statistics(model, fitted, file, tmp_path, tensors, message):
    changed = {name: tensor for name, tensor in {**load_file(file), **tensors}.items() if tensor is not None}
    save_file(changed, tmp_path / 'x.safetensors', {'slimclr_resolutions': json.dumps(asdict(fitted[0]))})
    with pytest.raises(InputError, match=message):
        model.load_resolutions(tmp_path / 'x.safetensors')
    assert state_hash(model) == fitted[0].weights


PAIRS: list[dict[str, object]] = [
    {'width': 1.0, 'size': 28, 'accuracy': 0.5},
    {'width': 1.0, 'size': 20, 'accuracy': None},
]


@pytest.mark.parametrize(
    'content',
    [
        '',
        'null',
        '[' * 100_000,
        ' ' * (1 << 20) + '{}',
        {'weights': 3},
        {'size': 27},
        {'size': '28'},
        {'tested': 0.5},
        {'pairs': []},
        {'pairs': 3},
        {'pairs': [{**PAIRS[0], 'accuracy': 2}]},
        {'pairs': [{**PAIRS[0], 'accuracy': float('nan')}]},
        {'pairs': [{**PAIRS[0], 'width': '1'}]},
        {'pairs': [PAIRS[0], {**PAIRS[1], 'size': 10**9}]},
        {'pairs': [PAIRS[0], {**PAIRS[1], 'size': True}]},
        {'pairs': [{**PAIRS[0], 'size': size} for size in range(1, 30)]},
    ],
    ids=lambda content: str(content)[-40:],
)
def test_files_from_elsewhere(tmp_path, content):
    whole = {'weights': 'a', 'size': 28, 'images': 9, 'tested': 9, 'pairs': PAIRS}
    text = content if isinstance(content, str) else json.dumps({**whole, **content})
    save_file({'x': torch.ones(1)}, tmp_path / 'x.safetensors', {'slimclr_resolutions': text})
    with pytest.raises(InputError, match='holds no resolutions; `slimclr-hub resolutions'):
        load_resolutions(tmp_path / 'x.safetensors')


def test_files_of_other_kinds(tmp_path, shipped):
    save_file({'x': torch.ones(1)}, tmp_path / 'x.safetensors')
    with pytest.raises(InputError, match='holds no resolutions'):
        load_resolutions(tmp_path / 'x.safetensors')
    (tmp_path / 'x.safetensors').write_bytes(b'x' * 99)
    with pytest.raises(InputError, match='is not a whole safetensors file'):
        load_resolutions(tmp_path / 'x.safetensors')
    with pytest.raises(InputError, match='does not exist'):
        load_resolutions(tmp_path / 'y.safetensors')


# The choice


SETTING = Setting(28, 1, 1)


def growing(width, size):
    return width / 2 + size / 100


def with_accuracies(found, accuracy=growing):
    return replace(found, pairs=tuple(Pair(p.width, p.size, accuracy(p.width, p.size)) for p in found.pairs))


@pytest.fixture(scope='module')
def two():
    """A network of two widths, and its four pairs."""
    pairs = tuple(Pair(width, size) for size in (20, 28) for width in (1.0, 0.5))
    found = with_accuracies(Resolutions('a', 28, 9, 9, pairs))
    return timm.create_model('slimclr_resnet20', widths=(1.0, 0.5), device='meta'), found


def test_the_most_accurate_pair_that_fits(two):
    model, found = two
    needs = {(each.width, size): each.multiply_adds for size in found.sizes for each in model.describe(size)}
    for limit in 16e6, 5e6:
        fitting_ = [pair for pair in found.pairs if needs[pair.width, pair.size] <= limit]
        choice = choose(model, Budget(max_macs=limit), SETTING, found)
        best = max(fitting_, key=lambda pair: pair.accuracy)
        assert (choice.width, choice.size) == (best.width, best.size)
    assert choice.why.startswith(
        'width 0.5 at 20x20 (45.0 % right) needs 4.03 M multiply-adds; width 0.5 at 28x28 (53.0'
    )
    with pytest.raises(InputError, match=r'width 0\.5 at 20x20 \(45\.0 % right\) would need 4\.03 M'):
        choose(model, Budget(max_macs=1e6), SETTING, found)
    equal = with_accuracies(found, lambda width, size: 0.5)
    cheapest = choose(model, Budget(max_macs=1e9), SETTING, equal)
    assert (cheapest.width, cheapest.size) == (0.5, 20)


def test_without_accuracies_the_size_stays(two):
    model, found = two
    unknown = with_accuracies(found, lambda width, size: None)
    assert choose(model, Budget(max_macs=17e6), SETTING, unknown) == choose(model, Budget(max_macs=17e6), SETTING)


def test_milliseconds_of_all_sizes_decide(two, tmp_path, monkeypatch):
    model, found = two
    monkeypatch.setattr(budget, 'cached_assets_path', lambda library, namespace: tmp_path / library / namespace)
    timings = [Timing(p.width, replace(SETTING, size=p.size), 1, p.width * p.size, 5) for p in found.pairs]
    for known in timings[2:], timings:
        QueryTable(machine_of('cpu'), versions_of('torch'), tuple(known)).save(table_path(model))
        if known != timings:
            with pytest.raises(
                InputError, match=r'nothing was measured .* at 20x20.* NETWORK --size 20 --size 28 --ba'
            ):
                choose(model, Budget(max_ms=20), SETTING, found)
    choice = choose(model, Budget(max_ms=20), SETTING, found)
    assert choice.why == 'width 1 at 20x20 (70.0 % right) needs 20 ms; width 1 at 28x28 (78.0 % right) would need 28 ms'


def test_networks_are_made_at_the_pair(fitted, tmp_path, caplog):
    path = tmp_path / 'resolutions.safetensors'
    with_accuracies(fitted[0]).save(fitted[1], path)
    with caplog.at_level(logging.INFO, 'slimclr_hub'):
        opened = timm.create_model('slimclr_resnet20', pretrained=True, max_macs=16e6, resolutions=path)
    assert any('Within the budget width 1 at 20x20 (70.0 % right) needs 15.9 M' in text for text in caplog.messages)
    assert (opened.width, opened.pretrained_cfg['input_size']) == (1.0, (3, 20, 20))
    for name, tensor in statistics_of(opened).items():
        assert torch.equal(tensor, fitted[1][20][name])
    loaded = timm.create_model('slimclr_resnet20', pretrained=True, resolutions=path)
    assert state_hash(loaded) == fitted[0].weights
    for refused in {'lazy': True}, {'features_only': True}, {'pretrained': False}:
        with pytest.raises(InputError, match='resolutions=FILE is of whole networks'):
            timm.create_model('slimclr_resnet20', **{'pretrained': True, 'resolutions': path, **refused})


# Without labels, and in words


def test_images_without_classes(shipped, folder):
    files = sorted(folder.glob('*/*.png'))
    found, statistics = fitting.fit_resolutions(shipped, files, [14], replace(CONFIG, batch_size=30))
    assert {pair.accuracy for pair in found.pairs} == {None}
    assert (found.sizes, found.tested, set(statistics)) == ((14, 28), 0, {14, 28})
    assert 'Accuracies are not known' in fitting.verdict(found, fitting.costs_of(shipped, found.pairs))
    with pytest.raises(InputError, match='39 images are too few for statistics; give 40 at least'):
        fitting.fit_resolutions(shipped, files[:39], [14], CONFIG)
    with pytest.raises(InputError, match='size 0 is not from 1 to'):
        fitting.fit_resolutions(shipped, files, [0], CONFIG)


def test_the_best_pairs_and_the_verdict():
    costs = {Pair(1.0, 28, 0.9): 40, Pair(1.0, 20, 0.7): 20, Pair(0.5, 28, 0.7): 10, Pair(0.5, 20, 0.6): 5}
    assert fitting.best_pairs(costs) == {Pair(1.0, 28, 0.9), Pair(0.5, 28, 0.7), Pair(0.5, 20, 0.6)}
    said = fitting.verdict(Resolutions('a', 28, 9, 100, tuple(costs)), costs)
    assert said.startswith('Of the 3 pairs that no cheaper one reaches, 1 are at other sizes than 28.')
    assert '100 images: 4.9 points at most' in said  # sqrt(0.6 * 0.4 / 100)
