import copy
from dataclasses import replace
from typing import Any

import datasets
import pytest
import timm
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.evaluate.baselines import raw_pixels
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.evaluate.logistic import linear_predict
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.models.calibrate import batchnorms_of, calibrate_batchnorm, is_calibrated
from slimclr_hub.train.config import KNNConfig, OptimConfig, PretrainConfig, ProbeConfig
from slimclr_hub.train.online import OnlineEvaluation, online_evaluation
from tests.data_room.files import png_bytes, some_images, write_idx_set, write_pngs
from tests.evaluate.test_rank import transcription

WIDTHS = (1.0, 0.75, 0.5, 0.25)
BANK, QUERIES = 400, 200


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    root = write_idx_set(tmp_path_factory.mktemp('idx'), BANK, QUERIES)
    data = DataConfig(name='fashion-mnist', root=str(root), size=16, batch_size=64, num_workers=0)
    return replace(PretrainConfig(), data=data, knn=KNNConfig(k=20, bank=300), probe=ProbeConfig(every=2))


@pytest.fixture(scope='module')
def accelerator(module_on_the_cpu):
    return Accelerator()


@pytest.fixture(scope='module')
def evaluate(config, accelerator):
    return OnlineEvaluation(config, accelerator)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (1, 1, 1)  # of blocks in each stage
    return timm.create_model('slimclr_resnet20', layers=layers, num_classes=0, in_chans=1, zero_init_last=False)


def images(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(16, 1, 16, 16, generator=generator) + 0.5 for _ in range(count)]


def train_a_little(model, width: float) -> None:
    model.train()
    for batch in images(3):
        model.forward_at(batch, width)


@pytest.mark.parametrize('splits', [1, 4])
def test_network_is_left_as_it_was(evaluate, splits):
    model = network()
    split_batchnorm(model, splits)
    train_a_little(model, 1.0)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    momenta = [norm.momentum for width in WIDTHS for norm in batchnorms_of(model, width)]
    evaluate(model, 0)
    after = model.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for width in WIDTHS for norm in batchnorms_of(model, width)] == momenta
    assert all(norm.splits == splits for norm in batchnorms_of(model, 0.5))
    assert [is_calibrated(model, width) for width in WIDTHS] == [True, False, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_global_generator_is_neither_used_nor_moved(evaluate):
    """Else a run would depend on how often it is looked at: keys are shuffled by the global generator."""
    model = network()
    results = []
    for seed in 0, 1:
        torch.manual_seed(seed)
        undisturbed = torch.rand(3)
        torch.manual_seed(seed)
        results.append(evaluate(model, 0))
        assert torch.rand(3).equal(undisturbed)
    assert results[0] == results[1]


def test_untrained_widths_are_calibrated(config, accelerator, evaluate):
    """The result is that of a network whose untrained widths were calibrated by hand on the first of the bank."""
    model = network()
    train_a_little(model, 1.0)
    result = evaluate(model, 0)['knn']

    by_hand = copy.deepcopy(model).eval()
    bank = list(eval_loader(config.data, 'train', 300, 0))
    queries = list(eval_loader(config.data, 'validation', None, 0))
    for width in WIDTHS[1:]:
        calibrate_batchnorm(by_hand, width, (batch for batch, _ in bank[:8]))
    features, labels = extract_features(accelerator, by_hand, bank, WIDTHS)
    asked, truth = extract_features(accelerator, by_hand, queries, WIDTHS)
    for width in WIDTHS:
        predicted = knn_predict(asked[width], features[width], labels, 20, 0.1)
        # Two ways through the same images; a single one on the border may fall to either side.
        assert result[width] == pytest.approx(
            100 * (predicted == truth).float().mean().item(), abs=100 / QUERIES + 1e-3
        )

    assert list(result) == list(WIDTHS)
    # Ten classes: chance is 10 %, and garments differ so much that even random features find them.
    assert min(result.values()) > 20


def test_trained_width_keeps_its_statistics(evaluate):
    """What was trained is evaluated as it is: nonsense in its statistics shows, at this width and no other."""
    model = network()
    healthy = evaluate(model, 0)['knn']
    train_a_little(model, 0.5)
    for norm in batchnorms_of(model, 0.5):
        norm.running_mean.fill_(1e4)
    result = evaluate(model, 0)['knn']
    assert result[0.5] < 25
    for width in 1.0, 0.75, 0.25:
        assert result[width] == healthy[width]


def test_calibration_is_the_mean_over_batches():
    model = network().train()
    train_a_little(model, 0.5)
    others = {name: value.clone() for name, value in model.state_dict().items() if '.w050.' not in name}
    norms = list(batchnorms_of(model, 0.5))
    seen = {norm: ([], []) for norm in norms}

    def record(norm, inputs):
        variance, mean = torch.var_mean(inputs[0].double(), (0, 2, 3), correction=1)
        seen[norm][0].append(mean)
        seen[norm][1].append(variance)

    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    calibrate_batchnorm(model, 0.5, images(5, seed=1))
    for hook in hooks:
        hook.remove()

    assert len(norms) == 7 + 2
    for norm in norms:
        means, variances = map(torch.stack, seen[norm])
        assert len(means) == 5
        assert torch.allclose(norm.running_mean.double(), means.mean(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(norm.running_var.double(), variances.mean(0), rtol=1e-4, atol=1e-6)
        assert norm.num_batches_tracked == 5
        assert norm.momentum == 0.1
    assert model.training
    assert all(norm.training for norm in norms)
    after = model.state_dict()
    assert all(after[name].equal(value) for name, value in others.items())
    assert is_calibrated(model, 0.5)
    assert not is_calibrated(model, 0.25)


def test_calibration_restores_the_network_after_an_error():
    model = network().eval()

    def broken():
        yield images(1)[0]
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='disk'):
        calibrate_batchnorm(model, 0.5, broken())
    assert not model.training
    assert all(norm.momentum == 0.1 and not norm.training for norm in batchnorms_of(model, 0.5))


# The linear probe, and the network's own classifier


def test_each_is_measured_when_it_is_due(config, accelerator):
    several = replace(config, knn=replace(config.knn, every=3), optim=OptimConfig(epochs=7))
    evaluate, model = OnlineEvaluation(several, accelerator), network()
    kinds = [set(evaluate(model, epoch)) for epoch in range(8)]
    assert kinds == [
        {'rank', 'knn', 'linear'},
        set(),
        {'rank', 'linear'},
        {'rank', 'knn'},
        {'rank', 'linear'},
        set(),
        {'rank', 'knn', 'linear'},
        {'rank', 'knn', 'linear'},
    ]


def test_linear_accuracy(config, accelerator, evaluate):
    """As scikit-learn has it, whose C is the weight of the data instead."""
    model = network()
    result = evaluate(model, 0)['linear']
    model.eval()
    for width in WIDTHS:
        calibrate_batchnorm(model, width, (batch for batch, _ in list(eval_loader(config.data, 'train', 300, 0))[:8]))
    features, labels = extract_features(accelerator, model, list(eval_loader(config.data, 'train', 300, 0)), WIDTHS)
    asked, truth = extract_features(accelerator, model, list(eval_loader(config.data, 'validation', None, 0)), WIDTHS)
    for width in WIDTHS:
        scaler = StandardScaler().fit(features[width])
        regression = LogisticRegression(C=1 / (len(labels) * config.probe.weight_decay), max_iter=1000)
        regression.fit(scaler.transform(features[width]), labels)
        expected = 100 * regression.score(scaler.transform(asked[width]), truth)
        assert result[width] == pytest.approx(expected, abs=2.01)  # an image or two of 200 lie on the border


def test_raw_pixels(config, accelerator):
    """As scikit-learn has them on the same images, once, before training.

    At so large a temperature all neighbours vote alike, as there; at so large a weight decay both regressions converge.
    """
    config = replace(config, knn=replace(config.knn, temperature=1e6), probe=ProbeConfig(every=2, weight_decay=0.1))
    evaluate = OnlineEvaluation(config, accelerator)
    evaluate(network(), 0)
    (bank, labels), (asked, truth) = (
        (torch.cat([images for images, _ in batches]).flatten(1), torch.cat([classes for _, classes in batches]))
        for batches in (
            list(eval_loader(config.data, 'train', 300, 0)),
            list(eval_loader(config.data, 'validation', None, 0)),
        )
    )
    neighbours = KNeighborsClassifier(20, algorithm='brute', metric='cosine').fit(bank, labels)
    assert evaluate.facts['raw_pixels/knn'] == pytest.approx(100 * neighbours.score(asked, truth), abs=0.51)
    scaler = StandardScaler().fit(bank)
    regression = LogisticRegression(C=1 / (len(labels) * config.probe.weight_decay), max_iter=1000)
    regression.fit(scaler.transform(bank), labels)
    expected = 100 * regression.score(scaler.transform(asked), truth)
    assert evaluate.facts['raw_pixels/linear'] == pytest.approx(expected, abs=0.51)  # one image of 200
    evaluate(network(), 2)
    assert evaluate.facts.keys() == {'k', 'images', 'rank_images'}


def test_raw_pixels_can_be_left_out(config, accelerator):
    without = OnlineEvaluation(replace(config, knn=replace(config.knn, raw_pixels=False)), accelerator)
    assert without(network(), 0).keys() == {'rank', 'knn', 'linear'}
    assert without.facts.keys() == {'k', 'images', 'rank_images'}


def test_raw_pixels_of_large_images_are_left_out():
    small = DataConfig(size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert raw_pixels(small, 50_000) is not None
    assert raw_pixels(small, 1_281_167) is None
    assert raw_pixels(replace(small, size=65), 100) is None
    assert raw_pixels(replace(small, size=224), 100) is None


def test_linear_probe_of_features_that_never_move():
    bank = torch.randn(50, 4)
    bank[:, 1] = 3.0
    labels = (bank[:, 0] > 0).long()
    assert linear_predict(bank, bank, labels).equal(labels)


@pytest.mark.parametrize(('bank', 'labels'), [(torch.zeros(0, 3), torch.zeros(0)), (torch.zeros(2, 3), -torch.ones(2))])
def test_linear_probe_needs_labelled_images(bank, labels):
    with pytest.raises(InputError, match=r'linear probe'):
        linear_predict(torch.zeros(1, 3), bank, labels.long())


def test_classifier_is_measured_as_it_is(config, evaluate):
    """A network with a classifier tells its own accuracy, and k-NN searches its features rather than its outputs."""
    model = network().eval()
    train_a_little(model, 1.0)
    without = evaluate(model, 0)
    assert without.keys() == {'rank', 'knn', 'linear'}
    model.reset_classifier(10)
    for linear in model.fc.values():
        torch.nn.init.zeros_(linear.weight)
        linear.bias.data = torch.eye(10)[3]
    result = evaluate(model, 0)
    labels = torch.cat([labels for _, labels in eval_loader(config.data, 'validation', None, 0)])
    share = 100 * (labels == 3).float().mean().item()
    assert result['top1'] == pytest.approx(dict.fromkeys(WIDTHS, share))
    assert result['knn'] == without['knn']
    assert model.num_classes == 10


def test_none_where_there_is_nothing_to_evaluate(config, accelerator, tmp_path, capsys):
    assert isinstance(online_evaluation(config, accelerator), OnlineEvaluation)
    assert online_evaluation(replace(config, knn=KNNConfig(every=0), probe=ProbeConfig()), accelerator) is None
    assert capsys.readouterr().out == ''
    data = replace(config.data, name='wds/', root=str(tmp_path), num_samples=3, val_split=None)
    assert online_evaluation(replace(config, data=data), accelerator) is None
    assert 'Evaluation while training is off: data.val_split None' in capsys.readouterr().out


# The rank, for which images need no labels


def rank_by_hand(batches: list) -> dict[float, float]:
    """Of all features of untrained widths, by the singular values of the whole matrix."""
    model: Any = network().eval()
    ranks = {}
    for width in WIDTHS:
        calibrate_batchnorm(model, width, (batch for batch, _ in batches[:8]))
        with torch.inference_mode():
            features = torch.cat([model.forward_at(batch, width) for batch, _ in batches])
        ranks[width] = transcription(features.numpy())
    return ranks


def test_rank_is_that_of_training_features(config, evaluate):
    result = evaluate(network(), 0)['rank']
    assert result == pytest.approx(rank_by_hand(list(eval_loader(config.data, 'train', 300, 0))), rel=1e-5)
    assert evaluate.facts['rank_images'] == 300
    assert 1.5 < min(result.values()) < max(result.values()) < 64


@pytest.mark.parametrize('splits', [['train', 'validation'], ['']], ids=['one class', 'no validation split'])
def test_images_without_labels_have_a_rank(config, accelerator, tmp_path, capsys, splits):
    for split in splits:
        write_pngs(tmp_path / split, some_images('train', 70)[0])
    data = replace(config.data, name='folder', root=str(tmp_path), channels=1, mean=(0.5,), std=(0.5,))
    unlabelled = replace(config, data=data)
    evaluate = online_evaluation(unlabelled, accelerator)
    assert evaluate is not None
    result = evaluate(network(), 0)
    assert result.keys() == {'rank'}
    assert result['rank'] == pytest.approx(rank_by_hand(list(eval_loader(data, 'train', None, 0))), rel=1e-5)
    assert evaluate.facts == {'rank_images': 70}
    printed = capsys.readouterr().out
    assert ('no accuracy: data.val_split validation is not apart' in printed) == (splits == [''])


# Labels as they are found


def hub_data(root, config: PretrainConfig, labels: list, damaged: int = 0) -> PretrainConfig:
    """A streamed or downloaded data set with these labels, some of whose validation images cannot be read."""
    images, _ = some_images('train', len(labels))
    rows: list[dict | None] = [{'bytes': png_bytes(image), 'path': None} for image in images]
    for split in 'train', 'validation':
        table = datasets.Dataset.from_dict({'image': rows, 'label': labels})
        table.to_parquet(str(root / f'{split}.parquet'))
        rows = [None, {'bytes': b'cut', 'path': None}][:damaged] + rows[damaged:]
    data = replace(config.data, name=f'hfds/{root}', root=None)
    return replace(config, data=data)


@pytest.mark.usefixtures('hub_cache')
@pytest.mark.parametrize(
    ('labels', 'why'),
    [
        (
            [[1, 2], [1]] * 32,
            'train 64 of 64 images have no class, or several; data.label_key says',
        ),
        ([0.5, 1.0] * 32, '32 of 64 images have no class'),
        (['only'] * 64, 'all images are of one class'),
    ],
    ids=['several', 'floats', 'one'],
)
def test_without_classes_there_is_the_rank_alone(config, accelerator, tmp_path, capsys, labels, why):
    evaluate = online_evaluation(hub_data(tmp_path, config, labels), accelerator)
    assert evaluate is not None
    for epoch in 0, 2:
        assert evaluate(network(), epoch).keys() == {'rank'}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('While training the rank of features is measured, and no accuracy: ')
    assert why in line


@pytest.mark.usefixtures('hub_cache')
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_names_are_classes_and_unreadable_images_are_left_out(config, accelerator, tmp_path, caplog, kind):
    _, numbers = some_images('train', 64)
    of = hub_data(tmp_path, config, [f'class {number}' for number in numbers], damaged=2)
    of = replace(of, data=replace(of.data, name=f'{kind}/{tmp_path}'))
    evaluate = online_evaluation(of, accelerator)
    assert evaluate is not None
    result = evaluate(network(), 0)
    assert evaluate.facts['images'] == 62
    # Each image is its own nearest neighbour, one of the bank's.
    assert min(result['knn'].values()) > 20
    assert evaluate(network(), 2).keys() == {'rank', 'knn', 'linear'}
    messages = [record.getMessage() for record in caplog.records if 'left out an image' in record.getMessage()]
    assert len(messages) == 2
    few = online_evaluation(replace(of, data=replace(of.data, max_corrupt=1)), accelerator)
    assert few is not None
    with pytest.raises(DataError, match=r'2 images cannot be read: .*row 0 \(no image\)'):
        few(network(), 0)
