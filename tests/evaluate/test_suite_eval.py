"""Logistic regression on several data sets: the embedded images, and a folder that the test writes."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from slimclr_hub.data.sources import read_embedded
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate import suite_eval
from slimclr_hub.evaluate.features import FeatureCache
from slimclr_hub.evaluate.network import open_for_test
from slimclr_hub.evaluate.suite_eval import SuiteConfig, evaluate, mean_per_class, read_suite
from slimclr_hub.settings import read_yaml
from slimclr_hub.weights.published import SHIPPED
from tests.scripts import Script, end_well

pytestmark = pytest.mark.usefixtures('on_the_cpu')

ROOT = Path(__file__).parents[2]
NETWORK = SHIPPED['mocov3_fashionmnist'].name
LOOK = {'size': 28, 'channels': 3, 'mean': (0.286,) * 3, 'std': (0.353,) * 3, 'crop_pct': 1.0}


@pytest.fixture(scope='module')
def suite(tmp_path_factory) -> Path:
    """Two folders of three classes of garments, of 8 to 24 images to train on and 40 to test."""
    folder = tmp_path_factory.mktemp('suite')
    for name, metric in (('few', 'top1'), ('more', 'mean_per_class')):
        for split, named in (('train', 'train'), ('val', 'test')):
            images, labels = read_embedded(named)
            for label, cls in enumerate(('shirt', 'trouser', 'pullover')):
                count = 40 if split == 'val' else 8 if name == 'few' else 8 * (label + 1)
                path = folder / name / split / cls
                path.mkdir(parents=True)
                for i, index in enumerate(np.flatnonzero(labels == label)[:count]):
                    Image.fromarray(images[index]).save(path / f'{i}.png')
        with (folder / 'suite.yaml').open('a') as file:
            file.write(f'{name}: {{name: folder, root: {folder / name}, val_split: val, metric: {metric}}}\n')
    return folder / 'suite.yaml'


def test_scores_are_those_of_scikit_learn(suite, tmp_path):
    """At the strength that was chosen; C is the inverse of decay x images."""
    sets = read_suite(suite, LOOK)
    config = SuiteConfig(network=NETWORK, suite=str(suite), output=str(tmp_path))
    found = evaluate(config, sets, Accelerator())
    assert found.keys() == {'few', 'more'}
    model = open_for_test(NETWORK)
    model.reset_classifier(0)
    for name, each in found.items():
        assert (each['train_images'], each['images']) == (24 if name == 'few' else 48, 120)
        cache = FeatureCache(tmp_path / 'mine', Accelerator(), model, sets[name].data)
        train, test = cache.features('train'), cache.features('val')
        for width, x in train.by_width.items():
            mean, std = x.mean(0), x.std(0, correction=0)
            std[std == 0] = torch.inf
            decay = each['weight_decays'][width]
            theirs = LogisticRegression(C=1 / (decay * len(x)), max_iter=5000, tol=1e-8)
            theirs.fit((x - mean) / std, train.labels)
            predicted = theirs.predict((test.by_width[width] - mean) / std)
            right = (
                np.mean(predicted == test.labels.numpy())
                if name == 'few'
                else balanced_accuracy_score(test.labels, predicted)
            )
            assert each['scores'][width] == pytest.approx(100 * right, abs=1.7)  # one or two of 120 images


def test_mean_per_class_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3], 200, p=[0.8, 0.15, 0.05])
    found = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 5, 200))
    ours = mean_per_class(torch.from_numpy(found), torch.from_numpy(labels))
    assert ours == pytest.approx(100 * balanced_accuracy_score(labels, found), abs=1e-9)


def test_a_killed_suite_keeps_what_it_has_measured(suite, tmp_path):
    words = '--network', NETWORK, '--suite', suite, '--output', tmp_path

    def start() -> Script:
        return Script(ROOT / 'recipes' / 'suite_eval.py', *words, folder=tmp_path, variables=os.environ)

    running, result = start(), tmp_path / 'suite.json'
    assert running.wait_for(result.is_file)
    running.kill()
    before = json.loads(result.read_text())['sets']
    printed = end_well(start())
    assert all(f'{name}: measured before' in printed for name in before)
    after = json.loads(result.read_text())['sets']
    assert after.keys() == {'few', 'more'}
    assert all(after[name] == before[name] for name in before)
    assert 'mean per class' in printed
    assert (tmp_path / 'suite.png').is_file()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('- a\n', 'is no suite'),
        ('a: {name: folder, rot: x}\n', 'a: there is no key rot; give name, '),
        ('a: {name: folder, root: nowhere}\n', 'a: data.root nowhere does not exist'),
        ('a: {metric: mAP}\n', "a: metric 'mAP' is not one of top1, mean_per_class"),
        ('a: {name: wds/x, root: nowhere, num_samples: 4}\n', 'is a stream'),
        ('a: {size: big}\n', 'a: '),
    ],
)
def test_bad_suites_end_in_one_line(tmp_path, capsys, monkeypatch, text, message):
    path = tmp_path / 'suite.yaml'
    path.write_text(text)
    arguments = ['--network', NETWORK, '--suite', str(path), '--output', str(tmp_path / 'o')]
    monkeypatch.setattr(sys, 'argv', ['suite_eval.py', *arguments])
    with pytest.raises(SystemExit):
        suite_eval.main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'o').exists()


def test_the_usual_list_is_a_suite(tmp_path):
    template = read_yaml(ROOT / 'recipes' / 'configs' / 'suite_eval' / 'transfer.yaml')
    for name, section in template.items():
        if section['name'] == 'folder':
            for split in 'train', 'test':
                (tmp_path / name / split).mkdir(parents=True)
            section['root'] = str(tmp_path / name)
    path = tmp_path / 'suite.yaml'
    path.write_text(yaml.safe_dump(template))
    assert read_suite(path, LOOK).keys() == template.keys()


def test_raw_pixels_and_classes_of_one_image(suite, tmp_path):
    """A class of a single image leaves none to choose the strength on; raw pixels have one width."""
    config = SuiteConfig(network='raw pixels', suite=str(suite), output=str(tmp_path / 'o'))
    sets = read_suite(suite, {**LOOK, 'channels': 1, 'mean': (0.286,), 'std': (0.353,)})
    assert evaluate(config, {'few': sets['few']}, Accelerator())['few']['scores'].keys() == {1.0}
    for split in 'train', 'val':
        (tmp_path / 'lone' / split / 'a').mkdir(parents=True)
        (tmp_path / 'lone' / split / 'b').mkdir()
        for i, cls in enumerate('aab' if split == 'train' else 'ab'):
            Image.new('L', (28, 28), 80 * i).save(tmp_path / 'lone' / split / cls / f'{i}.png')
    path = tmp_path / 'lone.yaml'
    path.write_text(f'lone: {{name: folder, root: {tmp_path / "lone"}, val_split: val}}\n')
    with pytest.raises(InputError, match='class 1 has a single image'):
        evaluate(config, read_suite(path, LOOK | {'channels': 1, 'mean': (0.3,), 'std': (0.3,)}), Accelerator())
