"""Linear evaluation as a whole, on real images and untrained networks."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slimclr_hub.data.config import LabelledDataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import EMBEDDED, read_embedded
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DivergedError, InputError, PreemptedError
from slimclr_hub.evaluate.compare.compare import compare_networks
from slimclr_hub.evaluate.compare.entries import read_entries
from slimclr_hub.evaluate.features import FeatureCache
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig, parse_linear_eval
from slimclr_hub.evaluate.linear_eval.evaluation import check_frozen, linear_eval
from slimclr_hub.evaluate.linear_eval.probe import make_head, standardisation
from slimclr_hub.evaluate.linear_eval.report import accuracies_figure, print_result
from slimclr_hub.evaluate.linear_eval.training import AugmentedBatches, CachedBatches, FeatureBatches, ProbeTraining
from slimclr_hub.evaluate.reported import reported_probe
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.inference.predict import predict
from slimclr_hub.models.calibrate import calibrate_batchnorm
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.result import Protocol, Result, load, results_in
from slimclr_hub.text import GARMENTS
from slimclr_hub.weights.hashes import state_hash
from slimclr_hub.weights.published import PUBLISHED
from tests.data_room.files import write_idx_set
from tests.scripts import end_well, start_together
from tests.train.runs import contents, environment

pytestmark = pytest.mark.usefixtures('module_on_the_cpu')

WIDTHS = (1.0, 0.5, 0.25)
TRAIN, VALIDATION = 96, 37  # the second of which no batch and no number of processes divides
SCRIPT = Path(__file__).parents[2] / 'recipes' / 'linear_eval.py'
FOLDER = ('--data.name', 'folder')


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with a data set, and an untrained network whose normalisations have seen images."""
    place = tmp_path_factory.mktemp('place')
    write_idx_set(place / 'idx', TRAIN, VALIDATION)
    torch.manual_seed(0)
    model: Any = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, zero_init_last=False)
    data = LabelledDataConfig(size=8, num_workers=0)
    images = next(iter(eval_loader(data, 'train', 128, 0)))[0]
    for width in WIDTHS:
        calibrate_batchnorm(model, width, [images])
    save_folder(model, place / 'network', size=8, mean=data.mean, std=data.std, crop_pct=1.0, card='')
    return place


@pytest.fixture
def network(place, tmp_path) -> Path:
    return shutil.copytree(place / 'network', tmp_path / 'network')


def arguments(place: Path, network: Path, *more: str) -> list[str]:
    data = {'name': 'fashion-mnist', 'root': place / 'idx', 'size': 8, 'channels': 1, 'batch_size': 16}
    data |= {'mean': [0.286], 'std': [0.353], 'crop_pct': 1.0, 'num_workers': 0}
    listed = [f'--data.{key}={value}' for key, value in data.items()]
    return ['--network', str(network), *listed, '--optim.epochs=4', '--optim.lr=0.3', *more]


def configured(place: Path, network: Path, *more: str) -> LinearEvalConfig:
    return parse_linear_eval(arguments(place, network, *more))


def test_raw_pixels_reach_what_they_do_in_scikit_learn(place, tmp_path):
    data = LabelledDataConfig(size=8, batch_size=256, num_workers=0)
    output = tmp_path / 'pixels'
    more = (f'--run.output={output}', f'--features.cache={tmp_path}', '--optim.epochs=30', '--optim.lr=0.1')
    result = linear_eval(replace(configured(place, Path('raw pixels'), *more), data=data))
    assert list(result.top1) == [1.0]
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    scores = {}
    for split in 'train', 'test':
        images, labels = read_embedded(split)
        small = np.stack(
            [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)) for image in images]
        )
        pixels = small.reshape(len(small), -1) / 255
        if split == 'train':
            reference.fit(pixels, labels)
        scores[split] = 100 * reference.score(pixels, labels)
    assert result.top1[1.0] == pytest.approx(scores['test'], abs=1)
    with pytest.raises(InputError, match='raw pixels have no network to save'):
        linear_eval(configured(place, Path('raw pixels'), '--save_to=x'))


def test_random_weights_of_a_network(place, network, tmp_path, monkeypatch):
    """The network of `place` has never been trained, so it is its own baseline, but for its seed."""
    monkeypatch.chdir(tmp_path)
    own, drawn = (
        linear_eval(configured(place, name, '--run.seed=3')) for name in (network, f'random weights of {network}')
    )
    assert drawn.network == f'random weights of {network}'
    assert drawn.top1.keys() == own.top1.keys()
    assert drawn.settings['frozen'] != own.settings['frozen']
    assert all(abs(drawn.top1[width] - own.top1[width]) < 25 for width in WIDTHS)
    with pytest.raises(InputError, match="there is no network 'nothing'"):
        linear_eval(configured(place, Path('random weights of nothing')))


def test_baselines_stand_beside_the_network(place, network, tmp_path, monkeypatch, capsys):
    """They are what the commands of their own find, an evaluation that is finished gets them, too, and once."""
    monkeypatch.chdir(tmp_path)
    alone = linear_eval(configured(place, network))
    result = linear_eval(configured(place, network, '--baselines=true'))
    drawn, pixels = (
        linear_eval(configured(place, Path(name))) for name in (f'random weights of {network}', 'raw pixels')
    )
    assert (result.top1, result.start) == (alone.top1, drawn.top1)
    assert [each.top1 for each in load(network / 'linear_eval' / 'result.json')] == [alone.top1, pixels.top1]
    before = (network / 'linear_eval' / 'result.json').stat().st_mtime_ns
    capsys.readouterr()
    linear_eval(configured(place, network, '--baselines=true'))
    printed = capsys.readouterr().out
    assert (network / 'linear_eval' / 'result.json').stat().st_mtime_ns == before
    assert f'{drawn.top1[0.25]:.1f}' in printed
    assert 'raw pixels' in printed
    compare_networks([str(network)], markdown=Path('-'), batch_size=None)
    rows = [line for line in capsys.readouterr().out.splitlines() if 'random weights' in line or 'raw pixels' in line]
    assert len(rows) == len(WIDTHS) + 1
    for name in 'raw pixels', f'random weights of {network}':
        with pytest.raises(InputError, match='which are one'):
            configured(place, Path(name), '--baselines=true')
    with pytest.raises(InputError, match='of 224 pixels say little'):
        configured(place, network, '--baselines=true', '--data.size=224')


@pytest.mark.parametrize('distillation', ['false', 'true'])
def test_probe_is_as_good_as_scikit_learns(place, network, distillation):
    """Logistic regression on the very features that were cached, of real images, at every width."""
    probe = f'--probe.distillation={distillation}'
    config = configured(place, network, probe, '--optim.epochs=30', '--optim.lr=0.1')
    config = replace(config, data=replace(config.data, name=EMBEDDED, root=None, batch_size=256))
    result = linear_eval(config)
    train, validation = (load_file(next((network / 'features').glob(f'{name}-*'))) for name in ('train', 'validation'))
    assert (len(train['labels']), len(validation['labels'])) == (6000, 1000)
    for width, key in zip(WIDTHS, ('w100', 'w050', 'w025'), strict=True):
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=1e3, max_iter=300))
        reference.fit(train[key].numpy(), train['labels'].numpy())
        accuracy = 100 * reference.score(validation[key].numpy(), validation['labels'].numpy())
        assert accuracy > 30
        assert result.top1[width] == pytest.approx(accuracy, abs=1)


# What it leaves


@pytest.mark.parametrize('head', ['switchable', 'slimmable'])
def test_saved_network_reaches_what_the_table_says(place, network, tmp_path, head, capsys):
    saved = tmp_path / 'saved'
    config = configured(place, network, f'--probe.head={head}', '--save_to', str(saved))
    result = linear_eval(config)
    assert results_in(network) == {network / 'linear_eval' / 'result.json': [result]}
    assert str(result.protocol) == f'linear evaluation, {head}, cached, 4 epochs'
    assert result.images == VALIDATION
    assert {path.name for path in (network / 'linear_eval').iterdir()} == {
        'settings.json',
        'metrics.jsonl',
        'probe.safetensors',
        'accuracy.png',
        'accuracy.pdf',
        'result.json',
    }
    printed = capsys.readouterr().out
    assert all(f'{accuracy:.1f}' in printed for accuracy in (*result.top1.values(), *result.top5.values()))
    assert f'Cached features, {head} head, with distillation, 4 epochs, {VALIDATION} images.' in printed
    own = timm.create_model(f'local-dir:{network}', pretrained=True)
    assert result.settings['frozen'] == state_hash(own)
    assert (
        f'the network has not moved; all its tensors have the hash that they had before ({state_hash(own)[:12]})'
        in printed
    )

    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    assert (model.head, model.num_classes, model.widths) == (head, 10, WIDTHS)
    images, labels = map(torch.cat, zip(*eval_loader(config.data, 'validation', None, 0), strict=True))
    for width in WIDTHS:
        with torch.no_grad():
            logits = model.forward_at(images, width)
        hits = [(logits.topk(k).indices == labels[:, None]).any(1).float().mean().item() for k in (1, 5)]
        assert [result.top1[width], result.top5[width]] == pytest.approx([100 * hit for hit in hits], rel=1e-6)
    before, after = (load_file(folder / 'model.safetensors') for folder in (network, saved))
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    (prediction,) = predict(model, [eval_loader(config.data, 'validation', None, 0).source[0][0]], top=10)
    assert {guess.label for guess in prediction.classes} == set(GARMENTS)
    assert json.loads((saved / 'config.json').read_text())['label_names'] == list(GARMENTS)
    assert f'{result.top1[0.5]:.1f}' in (saved / 'README.md').read_text()


def test_saved_network_is_compared_by_what_it_reached(place, network, tmp_path, capsys):
    saved = tmp_path / 'saved'
    result = linear_eval(configured(place, network, '--save_to', str(saved)))
    assert results_in(saved) == {saved / 'linear_eval' / 'result.json': [result]}
    capsys.readouterr()
    assert compare_networks([str(saved)], batch_size=None) == []
    printed = capsys.readouterr().out
    for width in WIDTHS:
        assert f'{result.top1[width]:.1f} / {result.top5[width]:.1f}' in printed
    # Tested again on the same images, it has a newer result.
    again = linear_eval(configured(place, saved))
    assert again.top1 == result.top1
    (entry,) = read_entries([str(saved)])
    assert entry.results == {again.protocol: [again]}
    assert entry.notes[again.protocol] == 'of linear_eval-2, the newest by this protocol; left out: linear_eval'


def test_the_best_learning_rate_is_kept_and_the_others_are_told(place, network, capsys):
    result = linear_eval(configured(place, network, '--optim.lr=[0.0001,0.3]'))
    poor, good = result.settings['sweep']
    assert (poor['lr'], good['lr'], result.settings['chosen_lr']) == (0.0001, 0.3, 0.3)
    assert sum(poor['top1'].values()) < sum(good['top1'].values())
    assert good['top1'] == {f'{width:g}': value for width, value in result.top1.items()}
    printed = capsys.readouterr().out
    assert (
        'Learning rate 0.3, the best of 0.0001 and 0.3: highest mean top-1 over the widths on the validation split, '
        'after the last epoch.\nNote: it is the highest of the sweep, and one beyond may be better'
    ) in printed
    (alone,) = linear_eval(configured(place, network)).settings['sweep']
    printed = capsys.readouterr().out
    assert '\nLearning rate 0.3.\n' in printed
    assert 'Note' not in printed
    assert alone == good
    heads = [load_file(network / name / 'probe.safetensors') for name in ('linear_eval', 'linear_eval-2')]
    assert all(heads[0][name].equal(heads[1][name]) for name in heads[0])


RESULT = Result(
    'slimclr_resnet50.mocov2_200e_in1k',
    Protocol('linear', 'ImageNet', head='switchable', features='cached', distillation=True, epochs=50),
    {1.0: 67.0, 0.5: 62.0, 0.25: 55.5},
    {1.0: 87.0, 0.5: 84.0, 0.25: 79.0},
    images=50000,
    settings={
        'chosen_lr': 0.1,
        'chosen_by': 'highest mean',
        'sweep': [{'lr': lr, 'top1': {'1': lr, '0.5': lr, '0.25': lr}} for lr in (1.0, 0.1, 0.01)],
    },
)


@pytest.mark.parametrize(
    ('tag', 'head', 'table', 'row'),
    [
        ('mocov2_200e_in1k', 'switchable', 'table 1.', ('62.5', '84.8')),
        ('mocov3_300e_lincls_in1k', 'switchable', 'table 1.', ('67.6', '88.2')),
        ('mocov2_200e_in1k', 'slimmable', 'table 3a ', ('59.6', '82.9')),
        ('mocov2_800e_in1k', 'slimmable', None, ()),
        ('mocov3_300e_in1k', 'slimmable', None, ()),
        (None, 'switchable', None, ()),
    ],
)
def test_the_papers_row_stands_beside(capsys, tag, head, table, row):
    print_result(RESULT, reported_probe(PUBLISHED[tag] if tag else None, head))
    printed = capsys.readouterr().out
    (line,) = (line.strip('│').split('│') for line in printed.splitlines() if line.startswith('│   0.5 '))
    assert [cell.strip() for cell in line] == ['0.5', '62.0', '84.0', *row]
    assert ('reported' in printed) == bool(row)
    assert f'as reported by Zhao et al., {table}' in printed if table else 'Zhao' not in printed
    assert 'Learning rate 0.1, the best of 0.01 ... 1.0: highest mean.' in printed
    assert 'Note' not in printed


@pytest.mark.parametrize(('chosen', 'end'), [(0.01, 'lowest'), (1.0, 'highest')])
def test_a_learning_rate_at_an_edge_is_told(capsys, chosen, end):
    print_result(replace(RESULT, settings={**RESULT.settings, 'chosen_lr': chosen}), None)
    printed = capsys.readouterr().out
    assert f'Learning rate {chosen}, the best of 0.01 ... 1.0' in printed
    assert f'Note: it is the {end} of the sweep' in printed


@pytest.mark.parametrize('epochs', [1, 3, 50])
def test_figure_counts_whole_epochs(epochs):
    top1 = {'1': 67.0, '0.5': 62.0, '0.25': 55.5}
    history = [{'epoch': epoch, 'top1': [top1] * 3} for epoch in range(1, epochs + 1)]
    figure = accuracies_figure(history, RESULT)
    ticks = figure.axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)
    assert figure.axes[0].get_title() == 'learning rate 0.1'
    plt.close(figure)


def test_finished_is_shown_and_anything_else_lies_beside(place, network, tmp_path, capsys):
    first = linear_eval(configured(place, network))
    result, features = contents(network / 'linear_eval'), contents(network / 'features')
    saved = tmp_path / 'saved'
    # Loaded otherwise, and now to be saved: the same evaluation.
    again = linear_eval(configured(place, network, '--data.max_corrupt=3', '--save_to', str(saved)))
    assert again == first
    assert 'finished already' in capsys.readouterr().out
    assert (saved / 'model.safetensors').is_file()

    output = ['--run.output', str(network / 'linear_eval'), '--optim.epochs=3']
    with pytest.raises(InputError, match=r'has optim\.epochs 4, not 3; give another run\.output, or these values'):
        linear_eval(configured(place, network, *output))

    model = timm.create_model(f'local-dir:{network}', pretrained=True)
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
    save_folder(model, network, size=8, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    other = linear_eval(configured(place, network))
    assert {path.name for path in network.glob('linear_eval*')} == {'linear_eval', 'linear_eval-2'}
    assert contents(network / 'linear_eval') == result
    assert {**contents(network / 'features'), **features} == contents(network / 'features')
    assert len(contents(network / 'features')) == 4
    assert list(results_in(network).values()) == [[first], [other]]


def test_evaluation_of_before_typed_protocols_is_finished(tmp_path, capsys):
    before = Path(__file__).parents[1] / 'data' / 'run_before'
    run = shutil.copytree(before, tmp_path / 'run')
    result = linear_eval(parse_linear_eval(['--network', str(run), '--optim.epochs=2']))
    assert 'finished already' in capsys.readouterr().out
    assert [result] == load(before / 'linear_eval' / 'result.json')


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        # Before its images, which are those of ImageNet for a network without a recipe.
        (
            ['--network', 'nowhere', '--data.root', 'images'],
            r"there is no network 'nowhere'; give a folder, .* a tag",
        ),
        (['--data.root', 'nowhere'], 'nowhere'),
        ([*FOLDER, '--data.root', 'images'], r'data\.root images does not exist; give the folder'),
        (['--data.val_split=null'], r'data\.val_split None is not apart'),
        (['--data.channels=3', '--data.mean=[0,0,0]', '--data.std=[1,1,1]'], r'takes images of 1 channels.*--data\.ch'),
        (['--data.batch_size=97'], r'data\.batch_size 97 is larger than the data set of 96 images'),
        (['--data.batch_size=97', '--features.mode=augmented'], r'data\.batch_size 97 is larger than the data set'),
        (['--probe.num_classes=4'], r'has class 9, and there are 4; give --probe\.num_classes 10'),
        (['--save_to', str(SCRIPT.parent)], r'save_to .*recipes is there already; give the name of a new folder'),
        (['--save_to', '/proc/nowhere'], r'save_to /proc/nowhere: /proc is not a folder that can be written to'),
        (['--run.output', str(SCRIPT.parent)], r'has no linear evaluation, but other files; give another run\.output'),
    ],
)
def test_a_mistake_is_named(place, network, more, message):
    if '/proc/nowhere' in more and os.access('/proc', os.W_OK):
        more, message = ['--save_to', f'{SCRIPT}/x'], r'save_to .*is not a folder that can be written to'
    with pytest.raises(InputError, match=message) as raised:
        linear_eval(configured(place, network, *more))
    assert '\n' not in str(raised.value)
    assert not (network / 'linear_eval').exists()


def test_no_learning_rate_converges(place, network):
    with pytest.raises(DivergedError, match=r'not finite at any of optim\.lr \[1e\+38, 3e\+38\]; lower them'):
        linear_eval(configured(place, network, '--optim.lr=[1e38,3e38]'))


@pytest.mark.parametrize('mode', ['cached', 'augmented'])
def test_default_batch_is_no_larger_than_the_images(place, network, capsys, mode):
    config = configured(place, network, '--data.batch_size=256', '--optim.epochs=1', f'--features.mode={mode}')
    result = linear_eval(config)
    assert result.settings['data']['batch_size'] == TRAIN
    assert f'data.batch_size is {TRAIN} instead of 256: there are {TRAIN} training images' in capsys.readouterr().out
    assert linear_eval(config) == result  # finished: the same settings
    assert not (network / 'linear_eval-2').exists()


# The frozen network


def test_the_network_does_not_move(place, network, tmp_path):
    before = contents(network)
    output = ['--run.output', str(tmp_path / 'out')]
    linear_eval(configured(place, network, '--features.mode=augmented', '--optim.epochs=1', *output))
    assert {name: value for name, value in contents(network).items() if not name.startswith('features')} == before


@pytest.mark.parametrize('moved', ['conv1.weight', 'bn1.w025.running_mean', 'bn1.w100.num_batches_tracked'])
def test_a_network_that_moves_is_noticed(network, moved):
    model = timm.create_model(f'local-dir:{network}', pretrained=True).eval()
    before = state_hash(model)
    with torch.no_grad():
        model.forward_widths(torch.randn(4, 1, 8, 8))
    check_frozen(model, before)
    model.state_dict()[moved].add_(1)
    with pytest.raises(RuntimeError, match='frozen network has moved'):
        check_frozen(model, before)


# Going on


class Interrupting:
    """Batches in the middle of which the process is asked to stop."""

    notes = ()

    def __init__(self, batches, after: int) -> None:
        self.batches, self.after, self.count = batches, after, 0
        self.steps_per_epoch = batches.steps_per_epoch

    def epoch(self, epoch, start=0, position=None):
        for batch in self.batches.epoch(epoch, start, position):
            self.count += 1
            yield batch
            if self.count == self.after:  # the next one is asked for, so this one's step is under way
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('after', [9, 12], ids=['within an epoch', 'at its end'])
@pytest.mark.parametrize('mode', ['cached', 'augmented'])
def test_interrupted_is_as_uninterrupted(place, network, tmp_path, mode, after):
    """Bit for bit, in the middle of an epoch of six steps."""
    config = configured(place, network, f'--features.mode={mode}', '--optim.lr=[0.1,0.5]')
    accelerator = Accelerator()
    backbone = timm.create_model(f'local-dir:{network}', pretrained=True).eval().requires_grad_(False)
    cache = FeatureCache(tmp_path / 'features', accelerator, backbone, config.data)
    head = make_head(backbone, 'switchable', 10, 0)
    scaling = standardisation(head, cache.features('train').by_width) if mode == 'cached' else None

    def training(folder: Path, after: int = 0) -> ProbeTraining:
        if mode == 'cached':
            batches: FeatureBatches = CachedBatches(cache.features('train'), 16, 0)
        else:
            batches = AugmentedBatches(
                TrainData(config.data, config.views, seed=0, view_count=1), backbone, accelerator
            )
        assert batches.steps_per_epoch == 6
        signals.received = None
        validation = cache.features('validation')
        # An accelerator of its own, as a new process has.
        return ProbeTraining(
            config,
            Accelerator(),
            copy.deepcopy(head),
            Interrupting(batches, after),  # type: ignore[arg-type]
            validation,
            scaling,
            folder,
            signals,
        )

    with StopSignals() as signals:
        whole = training(tmp_path / 'whole')
        history = whole.run()
        assert [record['epoch'] for record in history] == [1, 2, 3, 4]
        with pytest.raises(PreemptedError, match=f'SIGTERM after step {after} of 24.* same command') as stopped:
            training(tmp_path / 'parts', after).run()
        assert stopped.value.status == 75
        rest = training(tmp_path / 'parts')
        assert rest.run() == history
        assert rest.step == 24
        assert rest.features.count == 24 - after
    for i in range(2):
        expected = whole.head(i).state_dict()
        assert all(expected[name].equal(tensor) for name, tensor in rest.head(i).state_dict().items())


# Through the script


def test_two_processes_are_as_one(place, network, tmp_path):
    more = ('--features.mode=augmented', '--optim.epochs=2')
    alone = linear_eval(configured(place, network, *more, '--run.output', str(tmp_path / 'one')))
    # Features of its own, which two processes have to gather.
    words = [*arguments(place, network, *more, '--run.output', str(tmp_path / 'two'))]
    words += ['--features.cache', str(tmp_path / 'features')]
    ended = start_together(2, SCRIPT, *words, folder=tmp_path, variables=environment(tmp_path))
    end_well(*ended)
    assert ''.join(each.stdout for each in ended).count('accuracies by width') == 1
    (together,) = load(tmp_path / 'two' / 'result.json')
    assert together.top1 == alone.top1
    assert together.top5 == alone.top5
    heads = [load_file(tmp_path / name / 'probe.safetensors') for name in ('one', 'two')]
    for name, tensor in heads[0].items():
        torch.testing.assert_close(heads[1][name], tensor, rtol=1e-4, atol=1e-5)
    (features,) = (tmp_path / 'features').iterdir()
    expected = load_file(next((network / 'features').glob('validation-*')))
    assert len(expected['labels']) == VALIDATION
    for name, tensor in load_file(features).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
