"""Fine-tuning as a whole, on real images and small networks."""

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
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import read_entries
from slimclr_hub.evaluate.logistic import fit_linear
from slimclr_hub.evaluate.repetitions import print_spread, repetitions
from slimclr_hub.finetune.config import StartConfig, parse_finetune
from slimclr_hub.finetune.job import finetune
from slimclr_hub.finetune.network import open_start
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.inference.predict import predict
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import calibrate_batchnorm
from slimclr_hub.runs.result import load
from slimclr_hub.train.setup import make_optimizer
from tests.data_room.files import some_images, write_classes, write_pngs
from tests.scripts import Script, end_well, start_together
from tests.train.runs import contents, environment, read_metrics

pytestmark = pytest.mark.usefixtures('module_on_the_cpu')

WIDTHS = (1.0, 0.5)
SCRIPT = Path(__file__).parents[2] / 'recipes' / 'finetune.py'


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """Photos in folders of classes, and a network whose normalisations have seen images."""
    place = tmp_path_factory.mktemp('finetune')
    images, labels = some_images('train', 400)
    three = labels < 3
    write_classes(place / 'photos', images[three][:96], labels[three][:96])
    torch.manual_seed(0)
    shape: dict[str, Any] = {'layers': (1, 1, 1), 'widths': WIDTHS, 'in_chans': 1}
    model = timm.create_model('slimclr_resnet20', num_classes=0, **shape, zero_init_last=False)
    assert isinstance(model, SlimmableResNet)
    batches = [torch.randn(32, 1, 16, 16) for _ in range(3)]
    for width in WIDTHS:
        calibrate_batchnorm(model, width, batches)
    save_folder(model, place / 'network', size=16, mean=(0.5,), std=(0.5,), crop_pct=1.0, card='a card')
    return place


def arguments(place: Path, output: Path | str, *more: str, network: Path | str | None = None) -> list[str]:
    return [
        *('--network', str(network or place / 'network'), '--data.root', str(place / 'photos')),
        *('--data.num_workers', '0', '--data.batch_size', '16', '--optim.epochs', '2', '--run.log_every', '2'),
        *('--run.output', str(output), *more),
    ]


def tuned(place: Path, output: Path, *more: str, **where):
    AcceleratorState._reset_state(True)
    return finetune(parse_finetune(arguments(place, output, *more, **where)))


@pytest.fixture(scope='module')
def whole(place):
    """A fine-tuning that nothing happened to."""
    tuned(place, place / 'whole')
    return place / 'whole'


def test_folder_is_opened_by_all_who_open_networks(place, whole):
    (result,) = load(whole / 'result.json')
    assert tuple(result.top1) == WIDTHS
    assert result.protocol.kind == 'classifier'
    config = json.loads((whole / 'config.json').read_text())
    names = config['label_names']
    assert len(names) == config['num_classes'] == 3
    model = timm.create_model(f'local-dir:{whole}', pretrained=True, width=0.5).eval()
    assert model.widths == WIDTHS
    assert model.pretrained_cfg['input_size'] == (1, 16, 16)
    photo = next((place / 'photos' / names[1]).iterdir())
    (prediction,) = predict(model, photo, workers=0)
    assert {each.label for each in prediction.classes} == set(names)
    (entry,) = read_entries([str(whole)])
    assert entry.results[result.protocol][0].top1 == result.top1
    assert not (whole / 'checkpoints').exists()
    assert {'training.png', 'training.pdf', 'README.md', 'metrics.jsonl'} <= {path.name for path in whole.iterdir()}
    assert f"local-dir:{whole}', pretrained=True, width=0.5" in (whole / 'README.md').read_text()


def test_accuracies_are_those_of_the_saved_network(place, whole):
    """By another way: each held-out image through the network that the folder gives."""
    config = parse_finetune(arguments(place, 'x'))
    (result,) = load(whole / 'result.json')
    loader = eval_loader(config.data, 'validation', None, 0)
    assert result.images == loader.total
    for width in WIDTHS:
        model = timm.create_model(f'local-dir:{whole}', pretrained=True, width=width).eval()
        with torch.inference_mode():
            right = [model(images).argmax(1) == labels for images, labels in loader]
        assert result.top1[width] == pytest.approx(100 * torch.cat(right).double().mean().item())


def test_learns(place, tmp_path):
    """Losses fall, and the three classes are told apart far better than by chance."""
    result = tuned(place, tmp_path / 'out', '--optim.epochs', '6', '--optim.lr', '1e-2')
    first, *_, last = read_metrics(tmp_path / 'out', 'train')
    for width in WIDTHS:
        assert last[f'cross_entropy/{width:g}'] < first[f'cross_entropy/{width:g}'] - 0.2
    assert result.top1[1.0] > 50


def test_finished_one_is_shown_and_nothing_changes(place, whole, capsys):
    before = contents(whole)
    tuned(place, whole)
    assert 'is finished already' in capsys.readouterr().out
    assert contents(whole) == before
    with pytest.raises(InputError, match=r'run.output .* has optim.lr 0.002, not 0.5; give another'):
        tuned(place, whole, '--optim.lr', '0.5')


def test_one_width_alone(place, tmp_path):
    result = tuned(place, tmp_path / 'out', '--model.widths', '[0.5]')
    assert tuple(result.top1) == (0.5,)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.widths == (0.5,)
    assert model.conv1.weight.shape[0] == 8


def test_frozen_parts_and_statistics_stay(place, tmp_path):
    tuned(place, tmp_path / 'out', '--model.frozen', '2', '--model.frozen_norm', 'true')
    before = load_file(place / 'network' / 'model.safetensors')
    after = load_file(tmp_path / 'out' / 'model.safetensors')
    for name, tensor in before.items():
        stays = name.startswith(('conv1', 'bn1', 'layer1')) or 'running' in name or 'tracked' in name
        assert after[name].equal(tensor) == stays, name


def test_moving_average_covers_all_widths_and_is_what_is_saved(place, tmp_path):
    """With a decay of 0 it is the network itself, with one of nearly 1 the network that it began with."""
    tuned(place, tmp_path / 'plain')
    tuned(place, tmp_path / 'zero', '--optim.ema', '0')
    tuned(place, tmp_path / 'slow', '--optim.ema', '0.999999')
    plain, zero, slow = (load_file(tmp_path / name / 'model.safetensors') for name in ('plain', 'zero', 'slow'))
    assert all(zero[name].equal(tensor) for name, tensor in plain.items())
    start = load_file(place / 'network' / 'model.safetensors')
    moved = [name for name, tensor in start.items() if tensor.is_floating_point() and not plain[name].equal(tensor)]
    assert {f'bn1.w{key}.running_mean' for key in ('100', '050')} | {'conv1.weight'} <= set(moved)
    for name in moved:
        torch.testing.assert_close(slow[name], start[name], rtol=1e-3, atol=1e-3)
        assert not slow[name].equal(plain[name])


def test_every_parameter_is_in_one_group(place, tmp_path):
    """Of layer decay, too, whose learning rates fall towards the stem."""
    config = parse_finetune(arguments(place, 'x', '--optim.layer_decay', '0.5')).optim
    model = open_start(str(place / 'network'), StartConfig())
    model.reset_classifier(3)
    optimizer = make_optimizer(config, model, fused=False, layer_decay=config.layer_decay)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    of = dict(model.named_parameters())
    assert scales[id(of['conv1.weight'])] < scales[id(of['layer3.0.conv1.weight'])] < 1
    assert scales[id(of['fc.w050.weight'])] == 1
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert all(bool(decays[id(p)]) == (p.ndim > 1) for p in of.values())
    on_all = replace(config, filter_bias_and_bn=False)
    groups = make_optimizer(on_all, model, fused=False, layer_decay=config.layer_decay).param_groups
    assert {group['weight_decay'] for group in groups} == {config.weight_decay}
    result = tuned(place, tmp_path / 'out', '--optim.layer_decay', '0.5', '--optim.clip_grad', '1')
    assert tuple(result.top1) == WIDTHS


def test_layer_decay_scales_the_steps(place, tmp_path):
    """With plain SGD and one step, a layer moves by its scale times what it moves without decay."""
    once = ['--optim.name', 'momentum', '--optim.momentum', '0', '--optim.weight_decay', '0', '--optim.epochs', '1']
    once += ['--optim.warmup_epochs', '0', '--data.batch_size', '72', '--optim.lr', '0.1']
    tuned(place, tmp_path / 'same', *once, '--optim.layer_decay', '1.0')
    tuned(place, tmp_path / 'decayed', *once, '--optim.layer_decay', '0.5')
    start, same, decayed = (
        load_file(folder / 'model.safetensors')
        for folder in (place / 'network', tmp_path / 'same', tmp_path / 'decayed')
    )
    step = same['conv1.weight'] - start['conv1.weight']
    assert step.abs().max() > 0
    share = ((decayed['conv1.weight'] - start['conv1.weight']) / step)[step.abs() > 1e-5]
    torch.testing.assert_close(share, torch.full_like(share, share.median().item()), rtol=1e-2, atol=1e-4)
    assert share.median() < 0.1


def test_mixing_accumulation_and_distillation(place, tmp_path):
    mixing = ['--augment.mixup', '0.4', '--augment.cutmix', '1.0', '--augment.erase_prob', '0.5']
    result = tuned(
        place,
        tmp_path / 'out',
        *mixing,
        *('--augment.auto_augment', 'rand-m9-mstd0.5-inc1', '--optim.accumulation_steps', '2'),
        *('--model.distillation', 'kd', '--model.drop_path_rate', '0.1'),
    )
    assert tuple(result.top1) == WIDTHS
    assert all('distillation/0.5' in record for record in read_metrics(tmp_path / 'out', 'train'))


# Where it starts


def test_starts(place, tmp_path):
    """From a folder, from a plain ResNet's checkpoint, from one width, and from random weights."""
    dense = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=(1.0,)).extract(1.0)
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'plain.pth')
    converted = open_start(str(tmp_path / 'plain.pth'), StartConfig(widths=(1.0, 0.25)))
    assert converted.widths == (1.0, 0.25)
    assert converted.conv1.weight.equal(dense.conv1.weight)
    drawn = [open_start(f'random weights of {place / "network"}', StartConfig()) for _ in range(2)]
    assert drawn[0].widths == WIDTHS
    assert not drawn[0].conv1.weight.equal(drawn[1].conv1.weight)
    statistics = [layer.num_batches_tracked for layer in drawn[0].modules() if isinstance(layer, _BatchNorm)]
    assert not any(statistics)
    apart = timm.create_model('slimclr_resnet20', num_classes=0, in_chans=1, widths=WIDTHS, overlap=False)
    pooled = timm.create_model('slimclr_resnet20', num_classes=3, in_chans=1, widths=WIDTHS, global_pool='catavgmax')
    for network, words in (apart, 'do not overlap'), (pooled, 'is no slimclr_resnet20 as this package builds it: '):
        torch.save(network.state_dict(), tmp_path / 'other.pth')
        with pytest.raises(InputError, match=words):
            open_start(str(tmp_path / 'other.pth'), StartConfig())
    for network in f'random weights of {place / "network"}', str(tmp_path / 'plain.pth'):
        with pytest.raises(InputError, match=r'model.frozen_norm: .* has no statistics of normalisation'):
            open_start(network, StartConfig(frozen_norm=True))
    with pytest.raises(InputError, match='there is no network'):
        open_start(str(place / 'nothing'), StartConfig())


def test_classifier_of_the_same_classes_is_kept(place, whole, tmp_path, capsys):
    tuned(place, tmp_path / 'kept', '--optim.lr', '1e-9', network=whole)
    assert 'the classifier is kept' in capsys.readouterr().out
    before, after = (load_file(path / 'model.safetensors') for path in (whole, tmp_path / 'kept'))
    torch.testing.assert_close(after['fc.w100.weight'], before['fc.w100.weight'], rtol=1e-4, atol=1e-6)
    other = tmp_path / 'other'
    shutil.copytree(place / 'photos', other / 'photos')
    first = sorted((other / 'photos').iterdir())[0]
    first.rename(first.with_name('zebra'))
    AcceleratorState._reset_state(True)
    config = parse_finetune(
        [*arguments(place, tmp_path / 'renamed', network=whole), '--data.root', str(other / 'photos')]
    )
    finetune(config)
    assert 'a new classifier of 3 classes' in capsys.readouterr().out


def test_classifier_is_fitted_first(place, tmp_path):
    """Where nothing else moves, accuracies are those of a regularised logistic regression on the network's features."""
    still = ['--optim.lr', '1e-12', '--model.frozen', '5', '--optim.epochs', '1']
    result = tuned(place, tmp_path / 'out', *still)
    config = parse_finetune(arguments(place, 'x'))
    model = open_start(str(place / 'network'), StartConfig()).eval()
    splits = [eval_loader(config.data, split, None, 0) for split in ('train', 'validation')]
    with torch.inference_mode():
        (bank, labels), (queries, truth) = (
            (torch.cat([model.forward_at(images, 0.5) for images, _ in loader]), torch.cat([of for _, of in loader]))
            for loader in splits
        )
    linear, mean, scale = fit_linear(bank, labels, 5 / len(bank), floor=0.1)
    right = (linear((queries - mean) * scale).argmax(1) == truth).double().mean().item()
    assert result.top1[0.5] == pytest.approx(100 * right)
    random = tuned(place, tmp_path / 'random', *still, '--model.fit_head', 'false')
    assert random.top1 != result.top1
    # Again after a kill in the first checkpoint, which has left a part of it.
    for path in (tmp_path / 'out').iterdir():
        if path.name != 'settings.json':
            path.unlink()
    (tmp_path / 'out' / 'checkpoints' / 'step-00000001.partial').mkdir(parents=True)
    assert tuned(place, tmp_path / 'out', *still).top1 == result.top1


# Few labels


def test_repetitions_tell_their_spread(place, tmp_path, capsys):
    config = parse_finetune(arguments(place, tmp_path / 'out', '--data.per_class', '6', '--seeds', '2'))
    results = []
    for each in repetitions(config):
        AcceleratorState._reset_state(True)
        results.append(finetune(each))
    print_spread(results)
    printed = capsys.readouterr().out
    assert '2 repetitions' in printed
    assert results[0].protocol == results[1].protocol
    assert results[0].protocol.choice == '6 labels a class'
    settings = [json.loads((tmp_path / 'out' / f'seed-{seed}' / 'settings.json').read_text()) for seed in (0, 1)]
    assert [each['data.choice_seed'] for each in settings] == [0, 1]
    means = np.mean([[*result.top1.values()] for result in results], 0)
    assert all(f'{mean:.1f} ± ' in printed for mean in means)


# Processes, kills


def test_two_processes_train_as_one(place, tmp_path):
    """The same losses on the same batches, as each is normalised over both processes.

    By plain SGD: Adam would divide a rounding of a gradient that is nearly zero by one as small.
    """
    more = ('--run.log_every', '1', '--optim.name', 'momentum', '--optim.lr', '0.01', '--model.fit_head', 'false')
    for processes in (1, 2):
        words = arguments(place, tmp_path / str(processes), *more)
        end_well(*start_together(processes, SCRIPT, *words, folder=place, variables=environment(place)))
    one, two = (read_metrics(tmp_path / name, 'train') for name in '12')
    assert [record['step'] for record in one] == [record['step'] for record in two]
    for ours, theirs in zip(one, two, strict=True):
        for width in WIDTHS:
            key = f'cross_entropy/{width:g}'
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3), (ours['step'], key)


# With all that draws: mixing, erasing, stochastic depth; and with a moving average.
DRAWS = ['--optim.epochs', '4', '--run.checkpoint_steps', '3', '--optim.ema', '0.9', '--augment.mixup', '0.4']
DRAWS += ['--augment.erase_prob', '0.5', '--model.drop_path_rate', '0.2', '--data.num_workers', '1']


def start(place: Path, output: Path) -> Script:
    return Script(SCRIPT, *arguments(place, output, *DRAWS), folder=place, variables=environment(place))


@pytest.fixture(scope='module')
def through(place) -> Path:
    end_well(start(place, place / 'through'))
    return place / 'through'


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_one_goes_on_bit_for_bit(place, through, tmp_path, number):
    ours = tmp_path / 'out'
    stopped = start(place, ours)
    assert stopped.wait_for(lambda: any((ours / 'checkpoints').glob('step-????????')))
    stopped.send(number)
    if number is signal.SIGKILL:
        assert stopped.end() == -number
    else:
        assert stopped.end() == os.EX_TEMPFAIL
        assert 'stopped by SIGTERM' in stopped.stderr
    assert 'Resuming after epoch' in end_well(start(place, ours))
    assert (ours / 'model.safetensors').read_bytes() == (through / 'model.safetensors').read_bytes()
    assert read_metrics(ours) == read_metrics(through)


# Bad input: one line, and nothing left behind


def photos(place: Path, change) -> Path:
    for split in 'train', 'val':
        shutil.copytree(place.parent / 'source', place / split)
    change(place)
    return place


def drop(*parts: str):
    def change(root: Path) -> None:
        shutil.rmtree(root.joinpath(*parts))

    return change


def of_one_class(root: Path) -> None:
    for split in 'train', 'val':
        for folder in sorted((root / split).iterdir())[1:]:
            shutil.rmtree(folder)


def unlabelled(root: Path) -> None:
    for split in 'train', 'val':
        shutil.rmtree(root / split)
        write_pngs(root / split, some_images('train', 12)[0])


def flat(root: Path) -> None:
    shutil.rmtree(root / 'val')
    write_pngs(root / 'val', some_images('train', 12)[0])


BAD = {
    'validation without classes': (flat, (), 'split validation has images without a label'),
    'a class that training does not have': (
        lambda root: (root / 'val' / sorted(path.name for path in (root / 'val').iterdir())[0]).rename(
            root / 'val' / 'zebra'
        ),
        (),
        r'the training images have no class zebra',
    ),
    'one class': (of_one_class, (), 'all training images are of one class'),
    'no classes': (unlabelled, (), 'let each class have a folder'),
    'more classes than asked for': (lambda root: None, ('--model.num_classes', '2'), 'give --model.num_classes 3'),
    'an odd microbatch of pairs': (
        lambda root: None,
        ('--augment.mixup', '0.2', '--data.batch_size', '15'),
        'take images in pairs, and a microbatch has 15',
    ),
    'a large batch': (lambda root: None, ('--data.batch_size', '5000'), 'data.batch_size 5000 is larger than'),
    'no such optimizer': (lambda root: None, ('--optim.name', 'adamz'), "optim.name 'adamz'"),
    'a width that is not there': (lambda root: None, ('--model.widths', '[0.3]'), r'0\.3'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(place, tmp_path, name):
    change, more, words = BAD[name]
    shutil.copytree(place / 'photos', tmp_path / 'source')
    root = photos(tmp_path / 'photos', change)
    AcceleratorState._reset_state(True)
    with pytest.raises(InputError, match=words):
        finetune(parse_finetune([*arguments(place, tmp_path / 'out'), '--data.root', str(root), *more]))
    assert not (tmp_path / 'out').exists()


def test_class_that_is_missing_in_validation_is_told(place, tmp_path, capsys):
    shutil.copytree(place / 'photos', tmp_path / 'source')
    first = sorted(path.name for path in (tmp_path / 'source').iterdir())[0]
    root = photos(tmp_path / 'photos', drop('val', first))
    AcceleratorState._reset_state(True)
    finetune(parse_finetune([*arguments(place, tmp_path / 'out'), '--data.root', str(root), '--optim.epochs', '1']))
    assert f'the split validation has no image of the classes {first}' in capsys.readouterr().out


def test_command_line_ends_in_one_line(place, tmp_path):
    words = arguments(place, tmp_path / 'out', '--data.hold_out', '2')
    script = Script(SCRIPT, *words, folder=place, variables=environment(place))
    assert script.end() == 2
    assert 'error: data.hold_out is 2' in script.stderr
    assert 'Traceback' not in script.stderr
