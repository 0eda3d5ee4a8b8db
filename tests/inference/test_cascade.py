"""Cascades against their definition, image by image, against forwards that were counted, and against closed forms."""

import copy
import json
import math
import re
from itertools import pairwise

import pytest
import timm
import torch
from PIL import Image

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.inference import cascade as fitting
from slimclr_hub.inference.images import ImageList
from slimclr_hub.inference.predict import predict
from slimclr_hub.inference.runner import InferenceConfig, preprocessing
from slimclr_hub.models.cascade import Cascade, FittedCascades, last_widths, load_cascades, margins, route
from slimclr_hub.weights.hashes import state_hash
from tests.data_room.files import some_images

COUNT = 60
QUIET = InferenceConfig(batch_size=16, workers=0, progress=False)


@pytest.fixture(scope='module')
def model():
    return timm.create_model('slimclr_resnet20', pretrained=True).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Real images in folders named by the numbers of their classes."""
    folder = tmp_path_factory.mktemp('garments')
    for index, (image, label) in enumerate(zip(*some_images('test', COUNT), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f'{index:04d}.png')
    return folder


@pytest.fixture(scope='module')
def tensors(model):
    transform, mode = preprocessing(model)
    return torch.stack([transform(Image.fromarray(image).convert(mode)) for image in some_images('test', COUNT)[0]])


@pytest.fixture(scope='module')
def answers(model, folder):
    return fitting.answer(model, folder, QUIET)


@pytest.fixture
def fitted_file(model, answers, tmp_path):
    fitted, _ = fitting.fit(model, answers)
    fitted.save(tmp_path / 'cascade.json')
    return tmp_path / 'cascade.json'


def one_by_one(model, image, cascade):
    """Logits of an image and the widths that it runs, as the definition says it."""
    for i, width in enumerate(cascade.widths):
        logits = model.forward_at(image[None], width)[0]
        first, second = sorted(logits.softmax(0).tolist(), reverse=True)[:2]
        if first - second >= cascade.margin or width == cascade.widths[-1]:
            return logits, cascade.widths[: i + 1]
    raise AssertionError


@torch.no_grad()
@pytest.mark.parametrize(
    ('widths', 'margin'), [((0.25, 0.5, 1.0), 0.6), ((0.25, 1.0), 0.9), ((0.5, 0.75), 0.4), ((0.75,), 0.0)]
)
def test_a_cascade_runs_what_its_definition_says(model, tensors, widths, margin):
    cascade = Cascade(widths, margin, 1.0, 0.0)
    expected = [one_by_one(model, image, cascade) for image in tensors]
    ran = []

    def forward(images, width):
        ran.extend([width] * len(images))
        return model.forward_at(images, width)

    routed = route(forward, tensors, cascade)
    torch.testing.assert_close(routed.logits, torch.stack([logits for logits, _ in expected]), rtol=1e-4, atol=1e-4)
    assert routed.widths.tolist() == pytest.approx([widths[-1] for _, widths in expected])
    assert sorted(ran) == sorted(width for _, widths in expected for width in widths)
    assert routed.forwards == {width: ran.count(width) for width in widths}
    at = {width: margins(model.forward_at(tensors, width).softmax(1)) for width in model.widths}
    assert torch.equal(last_widths(at, widths, margin), routed.widths)


@torch.no_grad()
def test_the_ends_of_the_scale(model, tensors):
    sure = route(model.forward_at, tensors[:8], Cascade((0.25, 1.0), 0.0, 1.0, 0.0))
    assert sure.forwards == {0.25: 8, 1.0: 0}
    assert torch.equal(sure.logits, model.forward_at(tensors[:8], 0.25))
    equal = route(lambda images, width: torch.full((len(images), 3), width), tensors[:8], Cascade((0.25, 1.0), 1, 1, 0))
    assert equal.forwards == {0.25: 8, 1: 8}
    assert (equal.logits == 1).all()


def test_costs_are_those_of_the_forwards_that_run(model, answers, tensors):
    fitted, held_out = fitting.fit(model, answers)
    order = [int(name.partition('/')[2].removesuffix('.png')) for name in held_out.images.names]
    for row in fitting.compare(held_out, fitted.cascades):
        with torch.no_grad():
            routed = route(model.forward_at, tensors[order], row.cascade)
        spent = sum(count * held_out.multiply_adds[width] for width, count in routed.forwards.items())
        assert row.multiply_adds == pytest.approx(spent / len(order))
        assert held_out.labels is not None
        right = routed.logits.argmax(1) == held_out.labels
        assert row.accuracy == pytest.approx(right.double().mean().item())
        assert held_out.labels.tolist() == some_images('test', COUNT)[1][order].tolist()


def test_no_mix_of_two_candidates_is_above_the_fit(answers):
    """By brute force over all candidates, from which the fit takes the upper hull."""
    chosen = fitting.fit_cascades(answers)
    at = {width: margins(p) for width, p in answers.probabilities.items()}
    widest = answers.probabilities[1.0].argmax(1)
    points = [(cascade.multiply_adds, cascade.agreement) for cascade in chosen]
    assert points == sorted(points)
    assert chosen[0].widths == (0.25,)
    assert chosen[-1].agreement == 1
    for width_a in (0.25, 0.5, 0.75):
        for share in range(1, 50):
            margin = torch.quantile(at[width_a], share / 50).item()
            ends = last_widths(at, (width_a, 1.0), margin)
            said = torch.where(ends == 1, widest, answers.probabilities[width_a].argmax(1))
            agreement = (said == widest).double().mean().item()
            more = (ends == 1).double().mean().item()
            spent = answers.multiply_adds[width_a] + more * answers.multiply_adds[1.0]
            below = [
                low[1] + (high[1] - low[1]) * (spent - low[0]) / (high[0] - low[0])
                for low, high in pairwise(points)
                if low[0] <= spent <= high[0]
            ]
            assert agreement <= (below[0] if below else 1) + 1e-9


def made(margin_of, right_of, labels=True):
    """Answers of two classes with these margins and rights by width; class 0 is right, and the widest's answer."""
    probabilities = {}
    for width, values in margin_of.items():
        high = torch.tensor([(1 + value) / 2 for value in values])
        sure = torch.stack([high, 1 - high], 1)
        wrong = ~torch.tensor(right_of[width])
        sure[wrong] = sure[wrong].flip(1)
        probabilities[width] = sure
    count = len(high)
    images = ImageList([f'{i}.png' for i in range(count)], [None] * count)
    return fitting.Answers(
        images, probabilities, torch.zeros(count, dtype=torch.long) if labels else None, {0.5: 10, 1.0: 40}
    )


def test_controls_in_closed_form():
    right = {0.5: [True, True, False, False], 1.0: [True] * 4}
    answers = made({0.5: [0.9, 0.8, 0.1, 0.2], 1.0: [0.5] * 4}, right)
    cascade = Cascade((0.5, 1.0), 0.5, 1.0, 0.0)
    rows = {row.cascade.widths: row for row in fitting.compare(answers, [cascade])}
    row = rows[(0.5, 1.0)]
    assert row.multiply_adds == 10 + 40 / 2
    assert row.accuracy == row.agreement == row.reached == 1
    assert row.by_chance == 0.5 * 0.5 + 0.5 * 1  # half of the images stop at a width that is right half of the time
    assert row.mixed == pytest.approx(0.5 + 0.5 * (30 - 10) / (40 - 10))
    assert rows[(0.5,)].accuracy == 0.5
    assert fitting.verdict(list(rows.values()), 4).startswith('Every cascade is above')


def test_a_cascade_that_loses_is_called_so():
    """The narrow width is sure where it is wrong."""
    right = {0.5: [True, True, False, False], 1.0: [True] * 4}
    answers = made({0.5: [0.1, 0.2, 0.9, 0.8], 1.0: [0.5] * 4}, right, labels=False)
    rows = fitting.compare(answers, [Cascade((0.5, 1.0), 0.5, 1.0, 0.0)])
    assert '1 of 1 cascades are not above' in fitting.verdict(rows, 4)
    assert fitting.fit_cascades(answers)[-1].agreement == 1
    assert 'use a fixed width' in fitting.verdict([row for row in rows if len(row.cascade.widths) == 1], 4)


def test_labels_are_known_where_folders_are_classes(model, folder, tmp_path):
    images = sorted(folder.glob('*/*.png'))
    assert fitting.answer(model, images, QUIET).labels is None  # names begin with the path as given
    assert fitting.answer(model, folder, QUIET).labels is not None


def test_a_lazy_network_knows_its_thresholds(model, fitted_file, tmp_path):
    save_folder(model, tmp_path / 'net', size=28, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, card='# A card\n')
    lazy = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True, width=0.25, lazy=True)
    assert lazy.load_cascades(fitted_file) == load_cascades(fitted_file)


def test_budget_and_predict(model, fitted_file, folder):
    network = copy.deepcopy(model)
    with pytest.raises(InputError, match='no thresholds for a cascade'):
        network.cascade(torch.zeros(1, 3, 28, 28))
    fitted = network.load_cascades(fitted_file)
    assert fitted == load_cascades(fitted_file)
    costs = [cascade.multiply_adds for cascade in fitted.cascades]
    assert fitted.within(math.inf) == fitted.cascades[-1]
    assert fitted.within(costs[1]) == fitted.cascades[1]
    assert fitted.within(costs[1] - 1) == fitted.cascades[0]
    for budget in (costs[0] - 1, math.nan):
        with pytest.raises(InputError, match=re.escape(f'budget {budget:g}: the cheapest cascade has 2.02 M')):
            fitted.within(budget)
    predictions = predict(network, folder, top=1, budget=costs[1], workers=0, progress=False)
    transform, mode = preprocessing(network)
    with torch.no_grad():
        for prediction in predictions[:5]:
            image = transform(Image.open(folder / prediction.name).convert(mode))
            logits, _ = one_by_one(network, image, fitted.cascades[1])
            assert prediction.classes[0].index == logits.argmax()
            assert prediction.classes[0].probability == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)
    with pytest.raises(InputError, match='call model'):
        network.train().cascade(torch.zeros(1, 3, 28, 28))
    with torch.no_grad():
        network.conv1.weight[0] += 1
    with pytest.raises(InputError, match='is of other weights or another size; fit it again'):
        network.load_cascades(fitted_file)


GOOD = {'widths': [0.25, 1.0], 'margin': 0.5, 'multiply_adds': 5.0, 'agreement': 0.5}


@pytest.mark.parametrize(
    'content',
    [
        '',
        'null',
        '[]',
        '{}',
        '[' * 100_000,
        '{"cascades": []}',
        {'cascades': []},
        {'cascades': [{**GOOD, 'margin': 2}]},
        {'cascades': [{**GOOD, 'margin': '0.5'}]},
        {'cascades': [{**GOOD, 'margin': math.nan}]},
        {'cascades': [{**GOOD, 'widths': [1.0, 0.25]}]},
        {'cascades': [{**GOOD, 'widths': 3}]},
        {'cascades': [{**GOOD, 'more': 1}]},
        {'cascades': [{**GOOD, 'multiply_adds': 10**400}]},
        {'cascades': [GOOD, {**GOOD, 'multiply_adds': 1}]},
        {'cascades': [GOOD], 'weights': 3},
        ' ' * (1 << 20) + '{}',
    ],
    ids=lambda content: str(content)[:30],
)
def test_files_from_elsewhere(tmp_path, content):
    path = tmp_path / 'cascade.json'
    whole = {'weights': 'a', 'size': 28, 'images': 9}
    path.write_text(content if isinstance(content, str) else json.dumps({**whole, **content}))
    with pytest.raises(InputError, match='cascade'):
        load_cascades(path)


def test_widths_that_the_network_lacks(tmp_path, model, tensors):
    cascades = (Cascade((0.3, 1.0), 0.5, 5.0, 0.5),)
    FittedCascades(state_hash(model), 28, 9, cascades).save(tmp_path / 'cascade.json')
    network = copy.deepcopy(model)
    with pytest.raises(InputError, match=r'width 0\.3 is not one of'):
        network.load_cascades(tmp_path / 'cascade.json')


def test_thresholds_are_of_one_size_of_images(fitted_file, model):
    network = copy.deepcopy(model)
    network.pretrained_cfg['input_size'] = (1, 56, 56)
    with pytest.raises(InputError, match='is of other weights or another size'):
        network.load_cascades(fitted_file)


def test_a_cascade_of_half_precision_is_sure_as_it_was_fitted(model, tensors):
    """Margins are of probabilities in float32: in bfloat16 those near 1 are 1."""
    network = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        sure = margins(network.forward_at(tensors.bfloat16(), 0.25).float().softmax(1))
        cascade = Cascade((0.25, 1.0), sure.sort(descending=True).values[5].item(), 1.0, 1.0)
        assert route(network.forward_at, tensors.bfloat16(), cascade).forwards == {0.25: COUNT, 1.0: COUNT - 6}


def test_cascades_of_many_widths_have_four_at_most():
    widths = [n / 10 for n in range(1, 7)]
    probabilities = {
        width: torch.rand(30, 3, generator=torch.Generator().manual_seed(i)) for i, width in enumerate(widths)
    }
    images = ImageList([f'{i}.png' for i in range(30)], [])
    answers = fitting.Answers(images, probabilities, None, {width: round(100 * width) for width in widths})
    assert max(len(cascade.widths) for cascade in fitting.fit_cascades(answers)) <= 4


def test_what_cannot_have_a_cascade(model, folder):
    many = timm.create_model('slimclr_resnet20', widths=[n / 20 for n in range(20, 3, -1)])
    with pytest.raises(InputError, match='17 widths have too many cascades to try; give a network of 16'):
        fitting.answer(many, folder, QUIET)
    with pytest.raises(InputError, match='needs a network with a classifier and several widths'):
        fitting.answer(timm.create_model('slimclr_resnet20', num_classes=0), folder, QUIET)
    with pytest.raises(InputError, match='19 images are too few'):
        fitting.answer(model, sorted(folder.glob('*/*.png'))[:19], QUIET)
