"""The teacher of a recipe: what can be one, how it sees views, mistakes, and a run that goes on."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from slimclr_hub.analysis.replay import Replay
from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.data.indexed import Known
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import DataError, InputError, PreemptedError
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.hub.open import open_network
from slimclr_hub.methods import Teacher
from slimclr_hub.methods.registry import settings_of
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import load_recipe, parse_pretrain
from slimclr_hub.train.config import MethodConfig, OptimConfig, PretrainConfig, RunConfig, TeacherConfig
from slimclr_hub.train.pretraining import pretrain
from slimclr_hub.train.teacher import _neighbours, known_images, open_teacher
from tests.data_room.files import some_images, write_classes, write_idx_set
from tests.scripts import end_well
from tests.train.runs import make_place, read_metrics, start_two

SHIPPED = 'slimclr_resnet20.mocov3_fashionmnist'
RGB = DataConfig(size=28, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope='module')
def networks(tmp_path_factory) -> Path:
    """A folder with two slimmable networks, a checkpoint of a plain ResNet, and a transformer of timm's."""
    place = tmp_path_factory.mktemp('networks')
    for seed, name in enumerate(('slim', 'other')):
        torch.manual_seed(seed)
        model = timm.create_model('slimclr_resnet20', num_classes=5, widths=(1.0, 0.5), in_chans=1)
        assert isinstance(model, SlimmableResNet)
        save_folder(model, place / name, size=28, mean=(0.3,), std=(0.2,), crop_pct=1.0, card='')
    torch.save(timm.create_model('resnet18', num_classes=0).state_dict(), place / 'plain.pth')
    save_for_hf(timm.create_model('test_vit'), place / 'vit', safe_serialization=True)
    # MoCo v2's of a small ResNet with its head, and of one whose head takes other features; a run's of two widths.
    head = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).state_dict()
    last = {name: tensor for name, tensor in head.items() if name.startswith('2')}
    slim = open_network(str(place / 'slim'))
    wide, both = (of.state_dict() for of in (slim.extract(1.0), slim))
    for name, body, tensors, backbone, at in (
        ('moco.pth', wide, head, 'module.encoder_q.', 'module.encoder_q.fc.'),
        ('odd.pth', wide, last, 'module.encoder_q.', 'module.encoder_q.fc.'),
        ('run.pth', both, {f'fc1.{key}': head[f'0.{key}'] for key in ('weight', 'bias')}, 'backbone.', 'head.'),
    ):
        whole = {f'{backbone}{key}': value for key, value in body.items() if not key.startswith('fc.')}
        whole |= {f'{at}{key}': value for key, value in tensors.items()}
        torch.save({'state_dict': whole}, place / name)
    save_file(whole, place / 'run.safetensors')
    return place


def opened(network, width=None, data=None, head=False):
    teacher = TeacherConfig(str(network), width, head)
    return open_teacher(
        PretrainConfig(method=MethodConfig('seed', queue_size=128), teacher=teacher, data=data or DataConfig())
    )


@pytest.mark.parametrize(
    ('name', 'width', 'dim'),
    [
        (SHIPPED, None, 64),
        (SHIPPED, 0.25, 16),
        ('slim', None, 64),
        ('slim', 0.5, 32),
        ('slim/model.safetensors', 0.5, 32),
        ('plain.pth', None, 512),
        ('run.safetensors', 0.5, 32),
    ],
)
def test_what_can_be_a_teacher(networks, name, width, dim):
    state = torch.get_rng_state()
    teacher = opened(name if name == SHIPPED else networks / name, width)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.dim == dim
    assert teacher(torch.randn(2, 1, 28, 28)).shape == (2, dim)
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_teacher_normalises_as_its_configuration_says():
    """Views in [0, 1] before normalisation, by the data's mean and std for students, by its own for the teacher."""
    pixels = torch.rand(2, 3, 28, 28)
    found = opened(SHIPPED, 0.5, RGB)((pixels - 0.5) / 0.25)
    network = open_network(SHIPPED, width=0.5).eval()
    torch.testing.assert_close(found, F.normalize(network((pixels - 0.286) / 0.353), dim=1))


def test_teacher_without_a_configuration_sees_what_students_see(networks):
    teacher = opened(networks / 'plain.pth', data=RGB)
    view = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(teacher(view), F.normalize(teacher.network(view), dim=1))


@pytest.mark.parametrize(
    ('name', 'width', 'data', 'named'),
    [
        ('nothing', None, None, 'there is no network'),
        ('slim', 0.3, None, r'0\.3 is not one of .*1\.0, 0\.5'),
        ('vit', 0.5, None, r'no widths; drop teacher\.width 0\.5'),
        ('slim', None, RGB, r'1 channels, and data\.channels is 3'),
        ('vit', None, None, r'does not take views of 28 pixels'),
    ],
)
def test_teacher_that_does_not_fit(networks, name, width, data, named):
    with pytest.raises(InputError, match=named) as caught:
        opened(networks / name, width, data)
    assert str(caught.value).startswith(f'teacher.network {networks / name}')
    assert '\n' not in str(caught.value)


def test_teacher_with_its_projection_head(networks):
    teacher, view = opened(networks / 'moco.pth', head=True), torch.randn(4, 1, 28, 28)
    plain = opened(networks / 'moco.pth')
    first, second = (
        [torch.load(networks / 'moco.pth')['state_dict'][f'module.encoder_q.fc.{n}.{of}'] for of in ('weight', 'bias')]
        for n in (0, 2)
    )
    expected = F.linear(F.linear(plain.network(view), *first).relu(), *second)
    assert (teacher.dim, plain.dim) == (8, 64)
    torch.testing.assert_close(teacher(view), F.normalize(expected, dim=1))
    torch.testing.assert_close(plain(view), F.normalize(plain.network(view), dim=1))
    assert teacher.hash().startswith(plain.hash())
    assert teacher.hash() != plain.hash()


@pytest.mark.parametrize(
    ('name', 'width', 'named'),
    [
        ('slim', None, r'neither the file of a checkpoint nor a run .*drop teacher\.head'),
        ('plain.pth', None, r'no projection head beside conv1\.weight'),
        ('run.pth', 0.5, r'its projection head is that of 1\.0; drop teacher\.width 0\.5'),
        ('odd.pth', None, r'its head does not take 64 features, as it has'),
    ],
)
def test_teacher_without_that_head(networks, name, width, named):
    with pytest.raises(InputError, match=named) as caught:
        opened(networks / name, width, head=True)
    assert str(caught.value).startswith(f'teacher.network {networks / name}: ')
    assert '\n' not in str(caught.value)


def test_size_of_views_counts(networks):
    """Not that of the images: of 28 pixels, as above, the transformer takes none."""
    teacher = TeacherConfig(str(networks / 'vit'))
    config = PretrainConfig(method=MethodConfig('seed', queue_size=128), teacher=teacher, views=ViewConfig(size=160))
    assert open_teacher(config).dim == 64


def test_methods_with_and_without():
    with pytest.raises(InputError, match=r'seed learns from a teacher; give --teacher\.network'):
        PretrainConfig(method=MethodConfig('seed'))
    with pytest.raises(InputError, match=rf'teacher\.network {SHIPPED} is for method\.name .*seed.*it is mocov2'):
        PretrainConfig(teacher=TeacherConfig(SHIPPED))
    with pytest.raises(InputError, match=r'teacher\.width 0\.5 is that of no teacher'):
        TeacherConfig(width=0.5)
    for name in 'head', 'cached':
        with pytest.raises(InputError, match=rf'teacher\.{name} is true, and there is no teacher'):
            TeacherConfig(**{name: True})


# What is known of all images


def place_of(tmp_path: Path, method: str, **sections: dict) -> Path:
    """A tiny recipe of a method with a teacher."""
    place = make_place(tmp_path, model={'widths': [1.0, 0.5]}, optim={'epochs': 2}, knn={'every': 0}, **sections)
    recipe = yaml.safe_load((place / 'tiny.yaml').read_text())
    known = settings_of(method)
    recipe['method'] = {'name': method, **{key: value for key, value in recipe['method'].items() if key in known}}
    if 'cross_after' in known:
        recipe['method']['cross_after'] = 1
    (place / 'tiny.yaml').write_text(yaml.safe_dump(recipe))
    return place


def test_neighbours_and_embeddings(networks, tmp_path):
    """As an exhaustive search among centre crops has them; an image's twin is a neighbour, the image itself is not."""
    root = write_idx_set(tmp_path, 40, 8)
    data = DataConfig(name='fashion-mnist', root=str(root), batch_size=16, size=16, num_workers=0)
    config = PretrainConfig(
        method=MethodConfig('bingo', queue_size=64, cross_after=0, neighbours=3),
        teacher=TeacherConfig(str(networks / 'slim'), cached=True),
        data=data,
        run=RunConfig(output=str(tmp_path)),
    )
    teacher = open_teacher(config)
    known = known_images(config, teacher, Accelerator(cpu=True))
    loader = eval_loader(data, 'train', None, 0)
    features = torch.cat([teacher.features(images) for images, _ in loader])
    torch.testing.assert_close(torch.tensor(known.features), features)
    expected = F.normalize(features, dim=1)
    nearest = (expected @ expected.T).fill_diagonal_(-2).topk(3, dim=1).indices
    assert known.neighbours.tolist() == nearest.tolist()

    twins = np.eye(6, dtype=np.float32)[[0, 0, 0, 0, 4, 5]]  # three images are as near to an image as itself
    found = _neighbours(twins, 2, Accelerator(cpu=True))
    assert all(row not in of.tolist() for row, of in enumerate(found))
    assert all(set(of.tolist()) <= {0, 1, 2, 3} for of in found[:4])
    with pytest.raises(InputError, match=r'method\.neighbours 6 is not below the 6 training images'):
        _neighbours(twins, 6, Accelerator(cpu=True))


def test_pairs_follow_from_seed_epoch_and_index(tmp_path):
    """A neighbour from the row of the image, other ones in other epochs; its views and embedding are its own."""
    root = write_idx_set(tmp_path, 40, 8)
    data = DataConfig(name='fashion-mnist', root=str(root), batch_size=8, size=16, num_workers=0)
    table = np.stack([(np.arange(40) + step) % 40 for step in (1, 2, 3)], 1)
    known = Known(np.arange(40, dtype=np.float32)[:, None], table)
    seen = {}
    for rank in 0, 1:
        feed = TrainData(data, ViewConfig(), seed=3, processes=2, rank=rank)
        feed.know(known)
        for epoch in 0, 1, 2:
            for batch in feed.epoch(epoch):
                own, its = (of[:, 0].int().tolist() for of in batch.features)
                assert [len(view) for view in batch.views] == [4] * 4
                assert all(b in table[a] for a, b in zip(own, its, strict=True))
                seen |= {(epoch, a): (b, views) for a, b, *views in zip(own, its, *batch.views, strict=True)}
    one = TrainData(data, ViewConfig(), seed=3)
    one.know(known)
    for epoch in 0, 1, 2:
        for batch in one.epoch(epoch, start=2):
            for a, b, *views in zip(*(of[:, 0].int().tolist() for of in batch.features), *batch.views, strict=True):
                neighbour, before = seen[epoch, a]
                assert b == neighbour
                assert all(map(torch.equal, views, before))
    assert len({seen[0, a][0] - a for a in range(40) if (0, a) in seen}) > 1
    assert any(seen[0, a][0] != seen[1, a][0] for a in range(40))


@pytest.mark.parametrize(
    ('method', 'cached', 'network'),
    [
        ('seed', True, 'slim'),
        ('compress', True, 'slim'),
        ('disco', True, 'slim'),
        ('bingo', True, 'moco.pth'),
        ('bingo', False, 'moco.pth'),
    ],
)
def test_resumed_run_is_the_same(networks, tmp_path, on_the_cpu, method, cached, network):
    place = place_of(tmp_path, method)
    options = ['--config', str(place / 'tiny.yaml'), '--teacher.network', str(networks / network)]
    options += ['--teacher.cached', str(cached).lower(), '--teacher.head', str(network == 'moco.pth').lower()]
    whole = pretrain(parse_pretrain(place, [*options, '--run.name', 'whole']))
    (table,) = (place / 'runs' / 'teacher_features').iterdir() if cached or method == 'bingo' else [None]
    part = place / 'runs' / 'part'
    shutil.copytree(whole, part)
    shutil.rmtree(max((part / 'checkpoints').iterdir()))
    (part / 'model.safetensors').unlink()
    pretrain(parse_pretrain(place, ['--resume', str(part)]))
    assert (part / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert [table] == list((place / 'runs' / 'teacher_features').iterdir())
    with pytest.raises(InputError, match='which a replay does not compute'):
        Replay(whole)


def test_two_processes_know_the_same(networks, tmp_path, on_the_cpu):
    """Neighbours are searched in shares; losses are those of one process on the same batch."""
    place = place_of(tmp_path, 'bingo')
    options = ['--config', str(place / 'tiny.yaml'), '--teacher.network', str(networks / 'slim'), '--optim.lr', '1e-3']
    options += ['--teacher.cached', 'true', '--method.sync_bn', 'true', '--run.name']
    pretrain(parse_pretrain(place, [*options, 'of1']))
    end_well(*start_two(place, *options, 'of2'))
    runs = [place / 'runs' / name for name in ('of1', 'of2')]
    losses = [[line['loss'] for line in read_metrics(run, 'train')] for run in runs]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ('sections', 'named'),
    [
        ({'data': DataConfig(name='wds/', root='x')}, r'bingo needs images by number, and data\.name wds/ is a stream'),
        ({'optim': OptimConfig(epochs=10)}, r'method\.cross_after 10 leaves no epoch of optim\.epochs 10'),
    ],
)
def test_recipes_of_bingo_that_do_not_fit(sections, named):
    with pytest.raises(InputError, match=named):
        PretrainConfig(
            **{
                'method': MethodConfig('bingo'),
                'teacher': TeacherConfig(SHIPPED),
                'optim': OptimConfig(epochs=20),
                'data': DataConfig(batch_size=64),
                **sections,
            }
        )


def test_unreadable_image_has_no_place_in_the_table(networks, tmp_path):
    write_classes(tmp_path / 'images', *some_images('train', 24))
    next((tmp_path / 'images').rglob('*.png')).write_bytes(b'none')
    data = DataConfig(
        name='folder', root=str(tmp_path / 'images'), batch_size=16, size=16, num_workers=0, max_corrupt=3
    )
    config = PretrainConfig(
        method=MethodConfig('seed', queue_size=64),
        teacher=TeacherConfig(str(networks / 'slim'), cached=True),
        data=data,
        run=RunConfig(output=str(tmp_path)),
    )
    with pytest.raises(DataError, match=r'^1 image cannot be read: .*\.png \(.*\); restore or remove them$'):
        known_images(config, open_teacher(config), Accelerator(cpu=True))
    assert not list((tmp_path / 'teacher_features').iterdir())


def test_a_look_at_all_images(networks, tmp_path, on_the_cpu, monkeypatch):
    """After all that can be refused; a signal stops it between two batches, and the run goes on from its beginning."""
    place = place_of(tmp_path, 'bingo')
    table = place / 'runs' / 'teacher_features'
    options = ['--config', str(place / 'tiny.yaml'), '--teacher.network', str(networks / 'slim'), '--run.name', 'run']
    with pytest.raises(InputError, match=r"optim\.name 'none'"):
        pretrain(parse_pretrain(place, [*options, '--optim.name', 'none']))
    (place / 'runs' / 'run' / 'mine').mkdir(parents=True)
    with pytest.raises(InputError, match=r'run\.name run: .* is there already'):
        pretrain(parse_pretrain(place, options))
    shutil.rmtree(place / 'runs' / 'run')
    assert not table.exists()

    features, seen = Teacher.features, []

    def interrupted(teacher, view):
        seen.append(len(view))
        os.kill(os.getpid(), signal.SIGTERM)
        return features(teacher, view)

    monkeypatch.setattr(Teacher, 'features', interrupted)
    with pytest.raises(PreemptedError, match=r'SIGTERM after step 0 .*no state yet'):
        pretrain(parse_pretrain(place, options))
    assert seen == [16]
    assert not list(table.iterdir())
    monkeypatch.setattr(Teacher, 'features', features)
    run = pretrain(parse_pretrain(place, ['--resume', str(place / 'runs' / 'run')]))
    assert (run / 'model.safetensors').exists()

    (place / 'file').mkdir()
    (place / 'file' / 'teacher_features').write_text('')
    config = replace(load_recipe(run / RECIPE), run=RunConfig(output=str(place / 'file')))
    monkeypatch.setattr(Teacher, 'features', interrupted)
    with pytest.raises(InputError, match=r'run\.output .* takes no files .* give another'):
        known_images(config, open_teacher(config), Accelerator(cpu=True))
    assert seen == [16]


def test_run_goes_on_with_its_teacher_alone(networks, tmp_path, on_the_cpu):
    place = place_of(tmp_path, 'seed')
    shutil.copytree(networks / 'slim', place / 'teacher')
    options = ['--config', str(place / 'tiny.yaml'), '--teacher.network', str(place / 'teacher')]
    whole = pretrain(parse_pretrain(place, [*options, '--run.name', 'whole']))

    last = max((whole / 'checkpoints').iterdir())
    tensors = load_file(last / 'model.safetensors')
    assert {'queue', 'queue_pointer', 'backbone.conv1.weight'} <= tensors.keys()
    assert not any(name.startswith('teacher') for name in tensors)
    # A run that has kept its checkpoint teaches with its own head.
    view, following = torch.randn(4, 1, 16, 16), opened(whole, head=True)
    hidden = F.linear(following.features(view), tensors['head.fc1.weight'], tensors['head.fc1.bias']).relu()
    expected = F.linear(hidden, tensors['head.fc2.weight'], tensors['head.fc2.bias'])
    torch.testing.assert_close(following(view), F.normalize(expected, dim=1))
    save_file({**tensors, 'backbone.conv1.weight': tensors['backbone.conv1.weight'] + 1}, last / 'model.safetensors')
    with pytest.raises(InputError, match='newest checkpoint has other weights than its network'):
        opened(whole, head=True)
    save_file(tensors, last / 'model.safetensors')
    part = place / 'runs' / 'part'
    shutil.copytree(whole, part)
    shutil.rmtree(part / 'checkpoints' / last.name)
    (part / 'model.safetensors').unlink()
    pretrain(parse_pretrain(place, ['--resume', str(part)]))
    assert (part / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()

    with pytest.raises(InputError, match=r'teacher\.network .*teacher -> .*other'):
        parse_pretrain(place, ['--resume', str(part), '--teacher.network', str(networks / 'other')])
    shutil.copy(networks / 'other' / 'model.safetensors', place / 'teacher')
    with pytest.raises(InputError, match=rf'has weights \w+, and the teacher of .*{last.name} had \w+; restore it'):
        pretrain(parse_pretrain(place, ['--resume', str(part)]))
