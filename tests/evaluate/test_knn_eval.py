"""The k-NN evaluation: its search in shares, and the script on one process and by the real launcher on two."""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.knn import default_k, knn_predict, nearest, vote
from slimclr_hub.evaluate.knn_eval import KNNEvalConfig, _knn_eval, classes_of, neighbours_in_all, rank_of
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models.calibrate import calibrate_width
from slimclr_hub.runs.result import Protocol, Result, load
from tests.data_room.files import some_images, write_classes, write_idx_set
from tests.evaluate.test_knn import classify_by_loops, features
from tests.evaluate.test_rank import transcription
from tests.scripts import end_well, start_together
from tests.train.runs import environment

SCRIPT = Path(__file__).parents[2] / 'recipes' / 'knn_eval.py'
WIDTHS = (1.0, 0.25)
BANK, QUERIES = 95, 37  # which two processes do not divide
KS = (1, 5, 40)


def normalised(images: np.ndarray) -> torch.Tensor:
    """As the evaluation gives them to the network."""
    resized = [Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in images]
    return (torch.tensor(np.stack([np.asarray(image) for image in resized]))[:, None] / 255 - 0.286) / 0.353


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A network, and images with labels."""
    place = tmp_path_factory.mktemp('knn')
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, zero_init_last=False)
    images = normalised(some_images('train', 64)[0])
    for width in WIDTHS:
        calibrate_width(model, width, [images])  # else features would all look alike
    save_folder(model, place / 'network', size=16, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    write_idx_set(place / 'idx', BANK, QUERIES)
    return place


def arguments(place: Path, *more: str, output: str = 'out') -> list[str]:
    options = {
        'network': place / 'network', 'output': place / output, 'k': list(KS), 'temperature': '[0.1, null]',
        'data.name': 'fashion-mnist', 'data.root': place / 'idx', 'data.size': 16, 'data.channels': 1,
        'data.mean': [0.286], 'data.std': [0.353], 'data.crop_pct': 1.0, 'data.num_workers': 0,
    }  # fmt: skip
    return [argument for name, value in options.items() for argument in (f'--{name}', str(value))] + list(more)


@pytest.fixture
def alone(monkeypatch):
    """Nothing left of accelerate from another run in this process, and the CPU."""
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def results_of(folder: Path, pixels: bool = False) -> list[Result]:
    results = [of for of in load(folder / 'result.json') if of.protocol.kind == 'knn']
    return [of for of in results if (of.network == 'raw pixels') == pixels]


def rank_in(folder: Path) -> Result:
    (result,) = (of for of in load(folder / 'result.json') if of.protocol.kind == 'rank')
    return result


def results_by_k(folder: Path, pixels: bool = False) -> dict[tuple[int | None, float | None], Result]:
    return {(of.protocol.k, of.protocol.temperature): of for of in results_of(folder, pixels)}


# The search


@pytest.mark.parametrize('metric', ['unweighted', 'weighted'])
def test_one_search_serves_all_k(metric):
    (queries, _), (bank, labels) = features(100, 6, 1), features(150, 6, 2)
    temperature = None if metric == 'unweighted' else 0.1
    neighbours = nearest(F.normalize(queries, dim=1), F.normalize(bank, dim=1), labels, 40, bank_chunk=37)
    found = {k: votes.argmax(1).tolist() for k, votes in vote(neighbours, [40, 1, 7], temperature, 6)}
    assert sorted(found) == [1, 7, 40]
    for k, predictions in found.items():
        if temperature is None:
            # Of classes with equal votes both take the first.
            reference = KNeighborsClassifier(k, algorithm='brute', metric='cosine').fit(bank.numpy(), labels.numpy())
            expected = reference.predict(queries.numpy()).tolist()
        else:
            expected = classify_by_loops(queries[:20].tolist(), bank.tolist(), labels.tolist(), k, temperature)
        assert predictions[: len(expected)] == expected
    assert found[1] != found[40]


@pytest.mark.parametrize('bank_chunk', [1, 7, 64, 1000])
def test_chunks_of_the_bank_change_nothing(bank_chunk):
    (queries, _), (bank, labels) = features(30, 6, 1), features(64, 6, 2)
    whole, parts = (nearest(queries, bank, labels, 20, chunk) for chunk in (len(bank), bank_chunk))
    torch.testing.assert_close(parts.similarity, whole.similarity)
    assert parts.labels.equal(whole.labels)


@pytest.mark.parametrize('chunk', [1, 7, 1000])
def test_chunks_of_queries_change_nothing(alone, chunk):
    (queries, _), (bank, labels) = (
        (F.normalize(points, dim=1), of) for points, of in (features(30, 6, 1), features(64, 6, 2))
    )
    parts = list(neighbours_in_all(Accelerator(), queries, bank, labels, 20, chunk))
    assert len(parts) == -(-30 // chunk)
    found = torch.cat([part.labels for part in parts])
    assert found.equal(nearest(queries, bank, labels, 20).labels)


def test_rank_of_the_true_class():
    votes = torch.tensor([[0.0, 3.0, 1.0, 0.0], [2.0, 2.0, 0.0, 1.0], [2.0, 2.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    # Equal votes are in the order of the classes, as argmax has it; a class without a vote is no hit among any number.
    assert rank_of(votes, torch.tensor([2, 0, 1, 1])).tolist() == [1, 0, 1, 4]
    (queries, truth), (bank, labels) = features(100, 6, 1), features(150, 6, 2)
    ((_, votes),) = vote(nearest(queries, bank, labels, 30), [30], None, 6)
    assert (rank_of(votes, truth) == 0).equal(votes.argmax(1) == truth)
    order = votes.sort(dim=1, descending=True, stable=True).indices
    in_five = (order[:, :5] == truth[:, None]).any(1) & (votes.gather(1, truth[:, None])[:, 0] > 0)
    assert (rank_of(votes, truth) < 5).equal(in_five)


# The script


@pytest.fixture(scope='module')
def result(place):
    """The evaluation on one process, and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv('ACCELERATE_USE_CPU', 'true')
        AcceleratorState._reset_state(True)
        _knn_eval(arguments(place))
        AcceleratorState._reset_state(True)
    return place / 'out', printed.getvalue()


def test_accuracies_are_those_of_the_features(place, result, alone):
    """Of the whole bank at once, by the other function for it and features from the other pass."""
    model = timm.create_model(f'local-dir:{place / "network"}', pretrained=True).eval()

    def batches(split: str, count: int) -> list:
        images, labels = some_images(split, count)
        return [(normalised(images), torch.tensor(labels).long())]

    accelerator = Accelerator()
    bank, labels = extract_features(accelerator, model, batches('train', BANK), WIDTHS)
    queries, truth = extract_features(accelerator, model, batches('test', QUERIES), WIDTHS)
    found = results_by_k(result[0])
    assert found.keys() == {(k, t) for k in KS for t in (0.1, None)}
    for (k, temperature), measured in found.items():
        for width in WIDTHS:
            predictions = knn_predict(queries[width], bank[width], labels, k, temperature)
            expected = 100 * (predictions == truth).double().mean().item()
            assert measured.top1[width] == pytest.approx(expected)
            assert measured.top5[width] >= measured.top1[width]
    assert len({measured.top1[1.0] for measured in found.values()}) > 1


def test_rank_is_that_of_training_features(place, result):
    model = timm.create_model(f'local-dir:{place / "network"}', pretrained=True).eval()
    measured = rank_in(result[0])
    assert measured.protocol == Protocol('rank', 'fashion-mnist')
    assert (measured.top1, measured.images) == ({}, BANK)
    for width in WIDTHS:
        with torch.inference_mode():
            features = model.forward_at(normalised(some_images('train', BANK)[0]), width)
        assert measured.rank[width] == pytest.approx(transcription(features.numpy()), rel=1e-4)
    listed = ', '.join(f'{width:g}: {measured.rank[width]:.1f}' for width in WIDTHS)
    assert f'{BANK} training images; by width {listed}' in result[1]


def test_results_are_listed_from_the_best_on(place, result):
    folder, printed = result
    results = results_of(folder)
    assert [of.mean for of in results] == sorted((of.mean for of in results), reverse=True)
    assert {(of.network, of.protocol.kind, of.protocol.data, of.images) for of in results} == {
        (str(place / 'network'), 'knn', 'fashion-mnist', QUERIES)
    }
    rows = [re.split(r'\s*[│┃]\s*', line.strip(' │┃')) for line in printed.splitlines()]
    for (k, temperature), measured in results_by_k(folder).items():
        cells = [f'{measured.top1[width]:.1f} / {measured.top5[width]:.1f}' for width in WIDTHS]
        row = next(row for row in rows if row[:2] == [str(k), '-' if temperature is None else f'{temperature:g}'])
        assert row[2:4] == cells
        assert ('best' in row) == (measured == results[0])
    assert 'chosen on the very images' in printed


def test_raw_pixels(place, result):
    """As scikit-learn finds them on the same images; of an image with equal votes both take the first class."""
    (bank, labels), (queries, truth) = (some_images('train', BANK), some_images('test', QUERIES))
    found = results_by_k(result[0], pixels=True)
    assert found.keys() == {(k, t) for k in KS for t in (0.1, None)}
    assert load(result[0] / 'result.json')[: len(found)] == results_of(result[0])  # the network's own come first
    for k in KS:
        reference = KNeighborsClassifier(k, algorithm='brute', metric='cosine').fit(normalised(bank).flatten(1), labels)
        expected = 100 * reference.score(normalised(queries).flatten(1), truth)
        assert found[k, None].top1 == {1.0: pytest.approx(expected)}
        cell = f'{found[k, None].top1[1.0]:.1f} / {found[k, None].top5[1.0]:.1f}'
        assert re.search(rf'│ +{k} │ +- │.*│ +{cell} │', result[1])
    assert 'raw pixels' in result[1]


def test_random_weights(place, alone, capsys):
    """As a network does that was made so; its statistics are those of the images."""
    _knn_eval(arguments(place, '--seed', '3', output='seeded'))
    printed = capsys.readouterr().out
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, zero_init_last=False)
    torch.manual_seed(3)
    model.init_weights(zero_init_last=False)
    for width in WIDTHS:
        calibrate_width(model, width, [normalised(some_images('train', BANK)[0])])
    save_folder(model, place / 'random', size=16, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    _knn_eval(['--network', str(place / 'random'), *arguments(place, '--baselines', 'false', output='of-random')[2:]])
    expected, found = results_by_k(place / 'of-random'), results_by_k(place / 'seeded')
    assert {key: of.start for key, of in found.items()} == {key: of.top1 for key, of in expected.items()}
    assert all(of.start != of.top1 for of in found.values())
    assert not any(of.start for of in expected.values())
    row = next(line for line in printed.splitlines() if 'random weights' in line)
    best = results_of(place / 'seeded')[0]
    assert [re.findall(r'\d+\.\d', row)[-len(WIDTHS) :]] == [[f'{best.start[width]:.1f}' for width in WIDTHS]]


def test_baselines_can_be_left_out(place, result, alone, capsys):
    _knn_eval(arguments(place, '--baselines', 'false', output='without'))
    assert [(of.protocol, of.top1) for of in load(place / 'without' / 'result.json')[:-1]] == [
        (of.protocol, of.top1) for of in results_of(result[0])
    ]
    printed = capsys.readouterr().out
    assert 'raw pixels' not in printed
    assert 'random weights' not in printed


def test_images_that_cannot_be_read_are_left_out(place, tmp_path, alone):
    """Of both halves, so that nothing else changes."""
    for split, held in ('train', 'train'), ('val', 'test'):
        write_classes(tmp_path / 'images' / split, *some_images(held, 50))
    found = []
    for output in 'whole', 'damaged':
        options = ('--data.name', 'folder', '--data.root', str(tmp_path / 'images'), '--baselines', 'false')
        _knn_eval(arguments(place, *options, output=str(tmp_path / output)))
        found.append(load(tmp_path / output / 'result.json'))
        for folder in (tmp_path / 'images').glob('*/class1'):
            (folder / '0000-cut.png').write_bytes(b'cut')
    whole, damaged = ([(of.protocol, of.top1, of.top5, of.images) for of in results] for results in found)
    assert damaged == whole
    assert found[1][-1].rank == pytest.approx(found[0][-1].rank, rel=1e-4)


def test_k_follows_the_images_of_a_class(place, alone):
    argv = arguments(place, output='default')
    del argv[argv.index('--k') : argv.index('--k') + 2]
    _knn_eval(argv)
    classes = len(set(some_images('train', BANK)[1].tolist()))
    assert {k for k, _ in results_by_k(place / 'default')} == {default_k(BANK, classes)}


def test_figure(result):
    assert (result[0] / 'knn.pdf').read_bytes()[:5] == b'%PDF-'
    with Image.open(result[0] / 'knn.png') as image:
        assert image.size == (1500, 600)  # a panel for each tau


PROGRAM = """
import sys
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from slimclr_hub.evaluate.knn import vote
from slimclr_hub.evaluate.knn_eval import neighbours_in_all
from tests.evaluate.test_knn import features

accelerator = Accelerator()
rank, world = accelerator.process_index, accelerator.num_processes
assert world == 2
(queries, _), (bank, labels) = features(37, 6, 1), features({bank}, 6, 2)
mine = slice(rank, None, world)
found = []
for part in neighbours_in_all(
    accelerator, F.normalize(queries[mine], dim=1), F.normalize(bank[mine], dim=1), labels[mine], {k}, 8
):
    votes = {{k: of.clone() for k, of in vote(part, [1, {k}], 0.1, 6)}}
    found.append(torch.stack([votes[k].argmax(1) for k in (1, {k})]))
torch.save(torch.cat(found, 1), '{folder}/predictions-{bank}-' + str(rank))
"""


@pytest.fixture(scope='module')
def two_processes(place):
    """Searches in a larger and a smaller bank, then the script, each on the same two processes."""
    parts = [PROGRAM.format(folder=place, bank=bank, k=k) for bank, k in ((151, 20), (5, 5))]
    script = f'import runpy, sys\nsys.argv[0] = {str(SCRIPT)!r}\nrunpy.run_path({str(SCRIPT)!r}, run_name="__main__")\n'
    (place / 'program.py').write_text('\n'.join([*parts, script]))
    words = arguments(place, '--chunk', '9', output='two')
    run = start_together(2, place / 'program.py', *words, folder=place, variables=environment(place))
    end_well(*run)
    return place, ''.join(each.stdout for each in run)


@pytest.mark.parametrize(('size', 'k'), [(151, 20), (5, 5)])
def test_two_processes_predict_as_one(two_processes, size, k):
    """In float64; the shares of five images are smaller than k."""
    (queries, _), (bank, labels) = features(37, 6, 1), features(size, 6, 2)
    shares = [torch.load(two_processes[0] / f'predictions-{size}-{rank}') for rank in range(2)]
    assert [share.shape[1] for share in shares] == [19, 18]
    for row, neighbours in enumerate((1, k)):
        expected = knn_predict(queries, bank, labels, neighbours)
        for rank, share in enumerate(shares):
            assert share[row].equal(expected[rank::2])


def test_two_processes_have_the_accuracies_of_one(two_processes, result):
    for pixels in False, True:
        two, one = (results_by_k(folder, pixels) for folder in (two_processes[0] / 'two', result[0]))
        assert len(one) == 6
        assert {k: (of.top1, of.top5) for k, of in two.items()} == {k: (of.top1, of.top5) for k, of in one.items()}
    assert two_processes[1].count('Result:') == 1
    two, one = (rank_in(folder) for folder in (two_processes[0] / 'two', result[0]))
    assert two.rank == pytest.approx(one.rank, rel=1e-6)
    assert (two.protocol, two.images) == (one.protocol, one.images)


# Mistakes


MISTAKES = {
    'no network': ([], ['--network'], 'network'),
    'network that is not there': (['--network', 'nowhere'], [], 'nowhere'),
    'k of zero': (['--k', '[10, 0]'], [], 'k is 0; give 1 or more'),
    'no k': (['--k', '[]'], [], 'k is []'),
    'temperature of zero': (['--temperature', '[0.0]'], [], 'temperature is 0.0; give more than 0'),
    'temperature twice': (['--temperature', '[0.1, 0.1]'], [], 'several different'),
    'more neighbours than images': (['--k', '[200]'], [], f'at most {BANK}'),
    'fewer images asked for': (['--bank', '20'], [], 'at most 20'),
    'width that is none of its': (['--widths', '[0.5]'], [], '0.5'),
    'precision': (['--precision', 'fp8'], [], 'fp8'),
    'no validation images': (['--data.val_split', 'null'], [], 'data.val_split'),
    'network before its images': (
        ['--network', 'nowhere', '--data.root', 'nowhere either'],
        [],
        "there is no network 'nowhere'",
    ),
    'no folder of images': (
        ['--data.name', 'folder', '--data.root', 'data/imagenet'],
        [],
        'data.root data/imagenet does not exist; give the folder of the images by --data.root',
    ),
    'other channels': (
        ['--data.channels', '3', '--data.mean', '[0, 0, 0]', '--data.std', '[1, 1, 1]'],
        [],
        'takes images of 1 channels, and data.channels is 3; give --data.channels 1',
    ),
    'chunk': (['--chunk', '0'], [], 'chunk is 0'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake(place, mistake, alone, monkeypatch):
    changed, dropped, named = MISTAKES[mistake]
    argv = arguments(place, *changed, output='never')
    for option in dropped:
        index = argv.index(option)
        del argv[index : index + 2]
    monkeypatch.chdir(place)
    with pytest.raises(InputError) as error:
        _knn_eval(argv)
    assert named in str(error.value)
    assert '\n' not in str(error.value)
    assert not (place / 'never').exists()


def test_result_by_other_settings_is_not_overwritten(place, result, alone):
    before = {path.name: path.read_bytes() for path in result[0].iterdir()}
    with pytest.raises(InputError, match=r'by other settings \(bank None, not 90\).*--output .*out-2') as error:
        _knn_eval(arguments(place, '--bank', '90'))
    assert '\n' not in str(error.value)
    assert {path.name: path.read_bytes() for path in result[0].iterdir()} == before


def test_weights_say_which_network_it_is(place, result, tmp_path, alone):
    moved, out = tmp_path / 'moved', place / 'moved'
    shutil.copytree(place / 'network', moved)
    shutil.copytree(result[0], out)
    _knn_eval(arguments(place, '--network', str(moved), output='moved'))  # the same under another name
    assert [(of.network, of.top1) for of in results_of(out)] == [(str(moved), of.top1) for of in results_of(result[0])]
    model = timm.create_model(f'local-dir:{moved}', pretrained=True)
    model.conv1.weight.data *= 2
    save_folder(model, moved, size=16, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    with pytest.raises(InputError, match=r'by other settings \(other weights\)'):
        _knn_eval(arguments(place, '--network', str(moved), output='moved'))
    # A result of before the hash was recorded has the name alone.
    results = json.loads((out / 'result.json').read_text())
    for each in results:
        each['settings'].pop('weights', None)
        each['settings']['network'] = 'a'
    (out / 'result.json').write_text(json.dumps(results))
    with pytest.raises(InputError, match=r'by other settings \(network a, not '):
        _knn_eval(arguments(place, '--network', str(moved), output='moved'))


def test_script_ends_in_one_line(place, alone, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *arguments(place, '--bank', '90', '--k', '[91]', output='never')])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert line == 'error: k 91 is more than the 90 training images; give at most 90'


def test_a_width_that_never_trained_is_refused(place, alone):
    model = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, zero_init_last=False)
    save_folder(model, place / 'untrained', size=16, mean=(0.286,), std=(0.353,), crop_pct=1.0, card='')
    with pytest.raises(InputError, match='never been trained at width 1'):
        _knn_eval(arguments(place, '--network', str(place / 'untrained'), output='never'))


def test_images_without_labels_are_refused(alone):
    assert classes_of(Accelerator(), torch.tensor([2, 0, 6]), 'folder') == 7
    assert classes_of(Accelerator(), torch.tensor([], dtype=torch.long), 'folder') == 1  # of this process's share
    with pytest.raises(InputError, match=r'label for every image.*folder'):
        classes_of(Accelerator(), torch.tensor([2, -1, 6]), 'folder')


def test_precision_is_checked_without_a_command_line():
    with pytest.raises(InputError, match='precision'):
        KNNEvalConfig(network='x', precision='double')
