"""Results and protocols: what is written is read again, folders of earlier versions and unfinished runs included."""

import json
import shutil
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from slimclr_hub.errors import InputError
from slimclr_hub.runs.result import Protocol, Result, data_name, load, results_in, save, training_results

BEFORE = Path(__file__).parents[1] / 'data' / 'run_before'
KNN = Protocol('knn', 'photos', k=10, temperature=0.1)
RESULT = Result('runs/a', KNN, {1.0: 80.0, 0.25: 64.0}, start={1.0: 20.0}, images=400, settings={'k': [10]})


def test_results_are_read_as_they_were_written(tmp_path):
    results = [RESULT, replace(RESULT, protocol=replace(KNN, temperature=None), top5={1.0: 99.0})]
    assert save(results, tmp_path / 'new') == tmp_path / 'new' / 'result.json'
    assert load(tmp_path / 'new' / 'result.json') == results
    assert results_in(tmp_path) == {tmp_path / 'new' / 'result.json': results}


@pytest.mark.parametrize('text', ['', '{', '[1]', '{"kind": "knn"}', '[{"network": "a", "protocol": {"kin": 1}}]'])
def test_another_file_is_refused_by_its_name(tmp_path, text):
    (tmp_path / 'result.json').write_text(text)
    with pytest.raises(InputError, match=r'result\.json is not the result of an evaluation'):
        load(tmp_path / 'result.json')


ODD = [
    {'top1': {'1.0': 'x'}},
    {'top1': {'1.0': 101}},
    {'top1': {'1.0': float('nan')}},
    {'top1': {}},
    {'top1': {'2': 50.0}},
    {'images': 'many'},
    {'settings': None},
    {'environment': {'time': 3}},
    {'network': {}},
    {'network': 'raw pixels', 'top1': {'0.5': 50.0}},
    {'protocol': {'kind': 'knn', 'data': {}}},
    {'protocol': {'kind': 'knn', 'temperature': 'x'}},
    {'protocol': {'kind': 'else'}},
    {'protocol': {'kind': 'linear', 'features': 'x'}},
]


@pytest.mark.parametrize('entries', ODD)
def test_a_value_of_another_type_is_refused(tmp_path, entries):
    (file,) = (save([RESULT], tmp_path),)
    (content,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**content, **entries}]))
    with pytest.raises(InputError, match=r'result\.json is not the result of an evaluation'):
        load(file)


@pytest.mark.parametrize(
    ('protocol', 'words', 'label'),
    [
        (KNN, 'k-NN, k=10, tau=0.1', 'k-NN eval'),
        (replace(KNN, temperature=None, train_images=500), 'k-NN, k=10, unweighted, at most 500 training images', None),
        (replace(KNN, while_training=True), 'k-NN, k=10, tau=0.1, while training', 'k-NN'),
        (
            Protocol('linear', 'photos', 9, None, None, 'slimmable', 'cached', False, False, 1),
            'linear evaluation, slimmable, cached, without distillation, at most 9 training images, not standardised, '
            '1 epoch',
            'linear eval',
        ),
        (
            Protocol('linear', head='switchable', features='augmented', standardised=False, source='A et al., table 1'),
            'linear evaluation, switchable, augmented, as reported by A et al., table 1',
            'linear, reported',
        ),
        (
            replace(KNN, k=None, while_training=True),
            'k-NN, k by the images of a class, tau=0.1, while training',
            'k-NN',
        ),
        (Protocol('logistic', while_training=True), 'logistic regression, while training', 'linear'),
        (Protocol('classifier', while_training=True), "the network's own classifier, while training", 'top-1'),
    ],
)
def test_protocol_in_words(protocol, words, label):
    assert str(protocol) == words
    assert label in (None, protocol.label)


def test_standard_error_is_that_of_a_proportion():
    assert RESULT.standard_error(1.0) == pytest.approx(100 * sqrt(0.8 * 0.2 / 400))
    assert replace(RESULT, images=None).standard_error(1.0) is None
    assert RESULT.mean == 72.0


def test_run_and_evaluations_of_before_typed_protocols():
    metrics, knn, linear = (results_in(BEFORE)[BEFORE / name] for name in FILES)
    assert [(str(each.protocol), each.protocol.data) for each in metrics] == [
        ('k-NN, k=20, tau=0.1, while training', 'fashion-mnist-6k'),
        ('logistic regression, while training', 'fashion-mnist-6k'),
    ]
    assert metrics[0].top1 == pytest.approx({0.5: 68.2, 0.25: 63.6}, abs=0.01)
    assert metrics[0].start == pytest.approx({0.5: 70.6, 0.25: 63.2}, abs=0.01)
    assert len(knn) == 8
    assert str(knn[0].protocol) == json.loads((BEFORE / 'knn_eval' / 'result.json').read_text())['protocol']
    assert (knn[0].top1, knn[0].top5) == ({0.5: 70.0, 0.25: 64.5}, {0.5: 94.2, 0.25: 93.7})
    assert knn[-1].mean == min(each.mean for each in knn)
    (only,) = linear
    assert str(only.protocol) == json.loads((BEFORE / 'linear_eval' / 'result.json').read_text())['protocol']
    assert only.protocol.standardised
    assert (only.images, only.environment['hardware']) == (1000, '2 x AMD EPYC')


FILES = ('metrics.jsonl', 'knn_eval/result.json', 'linear_eval/result.json')


def test_unfinished_run_has_the_results_so_far(tmp_path):
    shutil.copy(BEFORE / 'recipe.yaml', tmp_path)
    lines = (BEFORE / 'metrics.jsonl').read_text().splitlines()
    (tmp_path / 'metrics.jsonl').write_text(lines[0] + '\n' + lines[1][:40])  # killed while it wrote
    knn, logistic = results_in(tmp_path)[tmp_path / 'metrics.jsonl']
    assert (knn.top1[0.5], knn.start) == (pytest.approx(70.6, abs=0.01), {})
    assert logistic.protocol.kind == 'logistic'


def test_k_that_a_recipe_leaves_open_is_told():
    metrics = [{'kind': 'eval', 'knn/1': 50.0, 'top1/1': 60.0}, {'kind': 'train', 'knn/1': 0.0}]
    recipe = {'data': {'name': 'a'}, 'knn': {'k': None, 'temperature': 0.1, 'bank': 5}}
    knn, classifier = training_results(metrics, recipe, 'runs/a', k=16, images=7)
    assert str(knn.protocol) == 'k-NN, k=16, tau=0.1, at most 5 training images, while training'
    assert classifier.protocol == Protocol('classifier', 'a', while_training=True)
    assert knn.images == 7


@pytest.mark.parametrize(
    ('data', 'name'),
    [
        ({'name': 'folder', 'root': '/data/imagenet'}, 'ImageNet'),
        ({'name': 'folder', 'root': '/data/birds/'}, 'birds'),
        ({'name': 'folder', 'root': '/data/imagenet100'}, 'imagenet100'),
        ({'name': 'torch/cifar10', 'root': '/data'}, 'torch/cifar10'),
        ({'name': 'hfds/ILSVRC/imagenet-1k', 'root': None}, 'ImageNet'),
        ({'name': 'fashion-mnist-6k'}, 'fashion-mnist-6k'),
    ],
)
def test_name_of_a_data_set(data, name):
    assert data_name(data) == name
