"""The teacher of a recipe: what can be one, how it sees views, mistakes, and a run that goes on."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import save_for_hf

from slimclr_hub.data import DataConfig, ViewConfig
from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.hub.open import open_network
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.train.command import parse_pretrain
from slimclr_hub.train.config import MethodConfig, PretrainConfig, TeacherConfig
from slimclr_hub.train.pretraining import pretrain
from slimclr_hub.train.teacher import open_teacher
from tests.train.runs import make_place

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
    return place


def opened(network, width=None, data=None):
    teacher = TeacherConfig(str(network), width)
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


def test_run_goes_on_with_its_teacher_alone(networks, tmp_path, on_the_cpu):
    place = make_place(tmp_path, model={'widths': [1.0, 0.5]}, optim={'epochs': 2}, knn={'every': 0})
    shutil.copytree(networks / 'slim', place / 'teacher')
    recipe = (place / 'tiny.yaml').read_text().replace('bn_splits: 2', 'name: seed')
    for gone in 'dim: 16', 'momentum: 0.9':
        recipe = recipe.replace(f'  {gone}\n', '')
    (place / 'tiny.yaml').write_text(recipe)
    options = ['--config', str(place / 'tiny.yaml'), '--teacher.network', str(place / 'teacher')]
    whole = pretrain(parse_pretrain(place, [*options, '--run.name', 'whole']))

    last = max((whole / 'checkpoints').iterdir())
    tensors = load_file(last / 'model.safetensors')
    assert {'queue', 'queue_pointer', 'backbone.conv1.weight'} <= tensors.keys()
    assert not any(name.startswith('teacher') for name in tensors)
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
