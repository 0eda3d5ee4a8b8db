"""Whole runs through the real launcher, and what the command line says to mistakes.

Runs are tiny, and most tests look at the same few of them: `full` is the one that the others are compared with.
"""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from slimclr_hub.runs.result import load
from tests.data_room.files import some_images, write_pngs
from tests.scripts import end_well
from tests.train.runs import (
    EPOCHS,
    QUERIES,
    SCRIPT,
    SHALLOW,
    STEPS,
    TIMEOUT,
    WIDTHS,
    contents,
    direct,
    direct_well,
    environment,
    launch,
    launch_well,
    make_place,
    read_metrics,
    start,
    start_two,
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp('pretrain'), model=SHALLOW)


@pytest.fixture(scope='module')
def full(place):
    """An uninterrupted run, and what it printed."""
    result = launch(place, '--run.name', 'full', '--run.tracker', 'tensorboard')
    assert result.returncode == 0, result.stderr
    (place / 'bar').write_text(result.stderr)
    return place / 'runs' / 'full', result.stdout


# What a run leaves


def test_folder_holds_the_result_and_what_resuming_needs(full):
    folder, _ = full
    names = {path.name for path in folder.iterdir() if not path.name.startswith('.')}
    expected = {
        'config.json',
        'model.safetensors',
        'README.md',
        'metrics.jsonl',
        'recipe.yaml',
        'result.json',
        'training.png',
        'training.pdf',
        'pareto.png',
        'pareto.pdf',
    }
    assert expected | {'checkpoints'} <= names
    assert not list(folder.rglob('*partial*'))
    # run.keep_checkpoints is 2.
    assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['step-00000018', 'step-00000024']
    with Image.open(folder / 'training.png') as image:
        assert image.size == (2250, 600)  # loss, k-NN and rank


def test_published_file_holds_the_backbone_alone(full):
    folder, _ = full
    tensors = load_file(folder / 'model.safetensors')
    reference = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, layers=(1, 1, 1)).state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in reference.items()
    }
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    trained = load_file(folder / 'checkpoints' / 'step-00000024' / 'model.safetensors')
    assert all(tensor.equal(trained[f'backbone.{name}']) for name, tensor in tensors.items())
    # Every width trained: of each the normalisation has counted batches, and the widest those of slow start as well.
    counted = [tensors[f'bn1.{key}.num_batches_tracked'].item() for key in ('w100', 'w075', 'w050', 'w025')]
    assert counted == [EPOCHS * STEPS] + 3 * [EPOCHS * STEPS // 2]


def test_timm_opens_the_folder(full):
    folder, _ = full
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, width=0.25).eval()
    assert (model.width, model.widths) == (0.25, WIDTHS)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 16)
    tensors, state = load_file(folder / 'model.safetensors'), model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in state.items())
    config = model.pretrained_cfg
    assert tuple(config['input_size']) == (1, 16, 16)
    assert (tuple(config['mean']), tuple(config['std'])) == ((0.286,), (0.353,))


def test_metrics(full):
    folder, _ = full
    training, evaluations = read_metrics(folder, 'train'), read_metrics(folder, 'eval')
    assert [record['step'] for record in training] == list(range(2, EPOCHS * STEPS + 1, 2))
    assert [record['epoch'] for record in training] == [1 + (step - 1) // STEPS for step in range(2, 25, 2)]
    assert [(record['epoch'], record['step']) for record in evaluations] == [(0, 0), (2, 12), (4, 24)]
    for record in evaluations:
        assert all(0 <= record[f'knn/{width:g}'] <= 100 for width in WIDTHS)
        assert all(1 < record[f'rank/{width:g}'] < 64 * width for width in WIDTHS)
    for record in training:
        trained = WIDTHS[:1] if record['epoch'] <= EPOCHS / 2 else WIDTHS
        assert [width for width in WIDTHS if f'info_nce/{width:g}' in record] == list(trained)
        assert record['loss'] == pytest.approx(sum(record[f'loss/{width:g}'] for width in trained), rel=1e-5)
    assert training[0]['lr'] < 0.06
    assert training[-1]['lr'] < 0.001
    raw = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert all(record['images_per_second'] > 0 for record in raw if record['kind'] == 'train')
    for record in (record for record in raw if record['kind'] == 'train'):
        assert 0 < record['grad_norm'] < 1e4
        assert 0 <= record['data_wait'] <= 1
        assert 0.01 < record['peak_memory_gib'] < 100
        below = () if record['epoch'] <= EPOCHS / 2 else WIDTHS[1:]
        for width in below:
            # Cross-entropy at tau_2 = 5 times 25, which lies above the divergence by the teacher's entropy.
            assert record[f'distillation/{width:g}'] > 25 * record[f'kl/{width:g}'] >= 0


def test_bar_shows_the_full_widths_loss(place, full):
    """The last line of the log; the total beside it would be tens of times as large."""
    last = read_metrics(full[0], 'train')[-1]
    bar = (place / 'bar').read_text()
    assert f'epoch={EPOCHS}, info_nce/1={last["info_nce/1"]:.3f}' in bar
    assert 'loss=' not in bar
    assert last['loss'] > 10 * last['info_nce/1']


def test_table_and_how_to_open_it_are_printed(full):
    folder, printed = full
    rows = [line.replace('│', ' ').split() for line in printed.splitlines()]
    evaluations = read_metrics(folder, 'eval')
    for width in WIDTHS:
        start, end = (record[f'knn/{width:g}'] for record in (evaluations[0], evaluations[-1]))
        row = next(row for row in rows if row and row[0] == f'{width:g}')
        assert row[-2:] == [f'{end:.1f}', f'{evaluations[-1][f"rank/{width:g}"]:.1f}']
        first = [f'{start:.1f}', f'{evaluations[0][f"rank/{width:g}"]:.1f}']
        assert ['random', 'weights', f'{width:g}', *first] in rows
    assert ['raw', 'pixels', f'{evaluations[0]["raw_pixels/knn"]:.1f}'] in rows
    assert not any('raw_pixels/knn' in record for record in evaluations[1:])  # measured once
    for title in 'parameters', 'multiply-adds', 'images/s', 'k-NN', 'accuracies (%)', 'pareto.png':
        assert title in printed
    assert f"timm.create_model('local-dir:{folder}', pretrained=True, width=0.25)" in printed
    assert f'Run: {folder}' in printed
    card = (folder / 'README.md').read_text()
    assert f'local-dir:{folder}' in card
    assert card.count('\n| ') == 2 + len(WIDTHS)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / 'slimclr'))  # run.project
    accumulator.Reload()
    tags = accumulator.Tags()['scalars']
    return {tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in tags}


def test_tracker_writes_an_event_file(full):
    logged = scalars(full[0])
    losses = [(record['step'], pytest.approx(record['loss'])) for record in read_metrics(full[0], 'train')]
    assert logged['train/loss'] == losses
    assert [step for step, _ in logged['eval/knn/0.25']] == [0, 12, 24]
    ranks = [(record['step'], pytest.approx(record['rank/0.5'])) for record in read_metrics(full[0], 'eval')]
    assert logged['eval/rank/0.5'] == ranks


def test_events_lie_in_the_folder_of_their_run(full):
    """Else curves of several runs would be drawn as one."""
    assert list(full[0].rglob('events.out.tfevents.*'))


# Names of runs


def test_a_taken_name_is_refused_and_nothing_overwritten(place, full):
    before = contents(full[0])
    result = direct(place, '--run.name', 'full', '--run.seed', '1')
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert f'{full[0]} is there already' in errors[0]
    assert f'--resume {full[0]}' in errors[0]
    assert contents(full[0]) == before


# Resuming


@pytest.fixture(scope='module')
def killed(place):
    """The same run, with workers that load, killed once its first checkpoint was there."""
    folder = place / 'runs' / 'killed'
    arguments = '--run.name', 'killed', '--data.num_workers', '2', '--run.tracker', 'tensorboard'
    run = start(place, '--config', 'tiny.yaml', *arguments)
    assert run.wait_for((folder / 'checkpoints' / 'step-00000006' / 'state.json').exists)
    run.kill()
    assert not (folder / 'model.safetensors').exists()
    return folder


@pytest.fixture(scope='module')
def resumed(place, killed):
    """The killed run, gone on with, and what it printed then."""
    # A kill may cut a line in two, which would be the next thing to stumble over.
    with (killed / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "epoch": 4, "st')
    return killed, end_well(start(place, '--resume', str(killed)))


def test_resumed_run_equals_an_uninterrupted_one(full, resumed):
    killed, printed = resumed
    assert 'Resuming after epoch' in printed
    assert (killed / 'model.safetensors').read_bytes() == (full[0] / 'model.safetensors').read_bytes()
    assert read_metrics(killed) == read_metrics(full[0])
    ours, theirs = (
        load_file(folder / 'checkpoints' / 'step-00000024' / 'model.safetensors') for folder in (killed, full[0])
    )
    assert ours.keys() == theirs.keys()
    # The momentum encoder and the queue as well.
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert (killed / 'training.png').exists()


def test_resumed_run_is_drawn_as_one(full, resumed):
    """What was logged after the last checkpoint is not drawn a second time."""
    ours, theirs = scalars(resumed[0]), scalars(full[0])
    assert ours.keys() == theirs.keys()
    for tag in (tag for tag in theirs if tag.startswith(('train/loss', 'eval/'))):
        assert ours[tag] == theirs[tag], tag


# Several processes


@pytest.fixture(scope='module')
def two_processes(place):
    """A run without a name on two processes, each of which normalises its half of the batch."""
    printed = launch_well(place, '--method.bn_splits', '1', '--knn.every', '4', processes=2)
    return place / 'runs' / f'mocov2_slimclr_resnet20_fashion-mnist_{EPOCHS}e', printed


def test_two_processes_were_two(two_processes):
    folder, printed = two_processes
    # Each process saves its own random generators.
    states = sorted(path.name for path in (folder / 'checkpoints' / 'step-00000024').glob('random_states_*'))
    assert states == ['random_states_0.pkl', 'random_states_1.pkl']
    # One result, printed once.
    assert printed.count('Open it:') == 1
    assert printed.count(f'Run: {folder}') == 1
    assert [path.name for path in folder.parent.glob('mocov2_*_fashion-mnist_*')] == [folder.name]


def test_two_processes_have_the_losses_of_one(two_processes, full):
    """`full` is one process that normalises the halves of its batch apart."""
    ours, theirs = read_metrics(two_processes[0], 'train'), read_metrics(full[0], 'train')
    assert len(ours) == len(theirs) == EPOCHS * STEPS // 2
    # Gradients are summed in another order, and training magnifies the difference from step to step.
    for line, (record, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert record.keys() == reference.keys()
        for name in (name for name in record if name.startswith(('loss', 'info_nce'))):
            assert record[name] == pytest.approx(reference[name], rel=1e-4 if line < 2 else 1e-2), (line, name)


def test_two_processes_average_their_statistics(two_processes, full):
    ours, theirs = (load_file(run[0] / 'model.safetensors') for run in (two_processes, full))
    assert ours.keys() == theirs.keys()
    # The stem sees the images themselves, so its statistics hardly depend on how training went; those of one half alone
    # would be several percent off.
    for name in 'bn1.w100.running_mean', 'bn1.w100.running_var':
        assert (ours[name] - theirs[name]).norm() < 0.1 * theirs[name].norm(), name


def test_two_processes_classify_every_image_once(two_processes):
    evaluations = read_metrics(two_processes[0], 'eval')
    assert [record['epoch'] for record in evaluations] == [0, 4]
    for record in evaluations:
        for width in WIDTHS:
            # A share of the images there are; padding a batch for the second process would make it one of more.
            correct = record[f'knn/{width:g}'] / 100 * QUERIES
            assert correct == pytest.approx(round(correct), abs=1e-3)


# Other methods


def test_supervised_run_tells_its_own_accuracy(place):
    changes = ['dim', 'queue_size', 'bn_splits', 'momentum']
    arguments = [argument for name in changes for argument in (f'--method.{name}', 'null')]
    printed = direct_well(
        place, *arguments, '--method.name', 'supervised', '--method.num_classes', '10', '--run.name', 'supervised',
        '--optim.epochs', '1', '--probe.every', '1',
    )  # fmt: skip
    folder = place / 'runs' / 'supervised'
    last = read_metrics(folder, 'eval')[-1]
    for width in WIDTHS:
        assert {f'{kind}/{width:g}' for kind in ('top1', 'knn', 'linear')} <= last.keys()
        assert f'{last[f"top1/{width:g}"]:.1f}' in printed
    for record in read_metrics(folder, 'train'):
        assert {'cross_entropy/1', 'cross_entropy/0.25', 'accuracy/0.25'} <= record.keys()
        assert 'distillation/0.25' not in record
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, width=0.5).eval()
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    assert model.fc.weight.shape[0] == 10  # one classifier, of all widths
    assert 'trained with labels' in (folder / 'README.md').read_text()


def test_mocov3_on_two_processes(place):
    """Normalised over both, by LARS, with a distribution of its own for the second view."""
    end_well(*start_two(
        place, '--config', 'tiny.yaml', '--method.name', 'mocov3', '--method.hidden_dim', '32',
        '--method.queue_size', 'null', '--method.bn_splits', 'null',
        '--second_views', '{blur_prob: 0.0, solarize_prob: 1.0}', '--optim.name', 'lars',
        '--optim.filter_bias_and_bn', 'true', '--optim.epochs', '1', '--run.name', 'mocov3',
    ))  # fmt: skip
    folder = place / 'runs' / 'mocov3'
    records = read_metrics(folder, 'train')
    assert records[-1]['momentum'] > records[0]['momentum'] > 0.9
    assert all(f'info_nce/{width:g}' in records[-1] for width in WIDTHS)
    # Both processes have the statistics of all images.
    first, second = (
        torch.load(folder / 'checkpoints' / 'step-00000006' / f'process_{rank}.pt')['statistics'] for rank in range(2)
    )
    assert first.keys() == second.keys()
    for name, statistic in first.items():
        torch.testing.assert_close(second[name], statistic, msg=name)


# A single width, on a folder of one's own


def test_single_width_on_a_flat_folder(place):
    images, _ = some_images('train', 48)
    write_pngs(place / 'flat', images)
    taken = place / 'runs' / 'mocov2_slimclr_resnet20_folder_1e'
    taken.mkdir(parents=True)
    printed = direct_well(
        place, '--data.name', 'folder', '--data.root', 'flat', '--model.widths', '[0.5]', '--optim.epochs', '1',
        '--data.channels', '3', '--data.mean', '[0.5, 0.5, 0.5]', '--data.std', '[0.5, 0.5, 0.5]',
        '--run.precision', 'bf16',
    )  # fmt: skip
    # The name of choice was taken.
    assert not any(taken.iterdir())
    folder = taken.with_name(f'{taken.name}-2')
    assert 'the rank of features is measured, and no accuracy' in printed
    assert 'k-NN' not in printed
    assert 'effective rank by width on flat' in ' '.join(printed.split())
    records = read_metrics(folder)
    assert [(record['kind'], record['step']) for record in records] == [
        ('eval', 0), ('train', 2), ('train', 3), ('eval', 3),
    ]  # fmt: skip
    assert all('info_nce/0.5' in record and 'info_nce/1' not in record for record in records[1:3])
    (measured,) = load(folder / 'result.json')
    assert (measured.protocol.kind, measured.top1, measured.images) == ('rank', {}, 48)
    assert (measured.start, measured.rank) == tuple({0.5: records[i]['rank/0.5']} for i in (0, -1))
    assert 1 < measured.rank[0.5] < 32
    assert '| rank at start | rank |' in (folder / 'README.md').read_text()
    with Image.open(folder / 'training.png') as image:
        assert image.size == (1500, 600)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert (model.widths, model.width) == ((0.5,), 0.5)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


# Mistakes


MISTAKES = {
    'unknown method': (['--method.name', 'simsiam'], 'simsiam'),
    'unknown network': (['--model.name', 'resnet5O'], 'resnet5O'),
    'network that is not slimmable': (['--model.name', 'resnet18'], 'not slimmable'),
    'width above one': (['--model.widths', '[1.5]'], '1.5'),
    'no data.root': (['--data.root', 'null'], 'data.root'),
    'data.root that is not there': (['--data.root', 'nowhere'], 'nowhere'),
    'folder that is not there': (['--data.name', 'folder', '--data.root', 'nowhere'], 'nowhere'),
    'empty folder': (['--data.name', 'folder', '--data.root', 'empty'], 'empty'),
    'batch larger than the data': (['--data.batch_size', '128', '--method.queue_size', '128'], '96 images'),
    'queue not a multiple': (['--method.queue_size', '65'], 'method.queue_size 65'),
    'unknown key': (['--optim.rate', '1'], '--optim.rate'),
    'unknown optimizer': (['--optim.name', 'sdg'], 'sdg'),
    'momentum of no optimizer': (['--optim.momentum', '-3'], 'optim.momentum'),
    'no webdataset there': (
        ['--data.name', 'wds/', '--data.root', 'nowhere', '--data.train_split', 'a-{0..1}.tar',
         '--data.num_samples', '64', '--knn.every', '0'],
        'nowhere',
    ),
    'resume of what is not a run': (['--resume', 'empty'], 'empty'),
    'resume with another value': (['--resume', 'runs/full', '--optim.lr', '0.1'], 'optim.lr 0.06 -> 0.1'),
}  # fmt: skip
IN_A_PROCESS_OF_ITS_OWN = 'batch larger than the data'


@pytest.fixture
def workplace(place, full, monkeypatch):
    """The current folder and nothing left of accelerate from another run in this process."""
    (place / 'empty').mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    AcceleratorState._reset_state(True)
    yield place
    AcceleratorState._reset_state(True)


def folders_of_runs(place: Path) -> list[str]:
    return sorted(path.name for path in (place / 'runs').iterdir())


def test_mistake_in_a_process_of_its_own(workplace):
    arguments, named = MISTAKES[IN_A_PROCESS_OF_ITS_OWN]
    before = folders_of_runs(workplace)
    command = [sys.executable, SCRIPT, '--config', 'tiny.yaml', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(workplace), timeout=TIMEOUT)
    assert result.returncode == 2
    assert 'Traceback' not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line)
    assert line.startswith('error: ')
    assert named in line
    assert folders_of_runs(workplace) == before


@pytest.mark.parametrize('mistake', [mistake for mistake in MISTAKES if mistake != IN_A_PROCESS_OF_ITS_OWN])
def test_mistake(workplace, mistake, capsys, monkeypatch):
    """The same script in this process, which already has everything imported."""
    arguments, named = MISTAKES[mistake]
    before, run = folders_of_runs(workplace), contents(workplace / 'runs' / 'full')
    recipe = [] if '--resume' in arguments else ['--config', 'tiny.yaml']
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *recipe, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('error: '))
    assert named in line
    assert folders_of_runs(workplace) == before
    assert contents(workplace / 'runs' / 'full') == run


def test_resume_of_a_finished_run_changes_nothing(workplace, full, monkeypatch, capsys):
    copy = shutil.copytree(full[0], workplace / 'finished')
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), '--resume', 'finished', '--run.tracker', 'none'])
    runpy.run_path(str(SCRIPT), run_name='__main__')
    assert f'Resuming after epoch {EPOCHS}' in capsys.readouterr().out
    assert (copy / 'model.safetensors').read_bytes() == (full[0] / 'model.safetensors').read_bytes()
    assert read_metrics(copy) == read_metrics(full[0])
