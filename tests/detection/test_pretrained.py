"""A backbone loaded from every kind of source: its outputs, the report, and refused sources."""

import shutil

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from slimclr_hub.detection.pretrained import load_backbone
from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import convert_file
from slimclr_hub.models import DEFAULT_WIDTHS
from tests.hub.files import checkpoint, save_small, small_network
from tests.networks import randomise_batchnorm
from tests.reference import DATA, image

WIDTHS = DEFAULT_WIDTHS
TAG = 'mocov2_200e_lincls_in1k'
FORWARD = load_file(DATA / 'forward.safetensors')


def backbone(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(7)
    return timm.create_model(name, **{'num_classes': 0, **kwargs}).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_equal_maps(network, expected):
    """Compare the maps of the stem and of every stage at every width that the network holds."""
    for width in network.widths:
        with network.set_width(width), expected.set_width(width):
            ours = network.forward_intermediates(images(), intermediates_only=True)
            theirs = expected.forward_intermediates(images(), intermediates_only=True)
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A network with a head of ten classes, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp('saved') / 'network'
    return save_small(folder), folder


# Sources in this package's names


@pytest.mark.parametrize('kind', ['folder', 'local-dir', 'file'])
@pytest.mark.parametrize(
    ('widths', 'listed', 'left_out'),
    [
        (WIDTHS, 'widths 1.0, 0.75, 0.5, 0.25', ''),
        ((0.5,), 'width 0.5', ', widths 1.0, 0.75, 0.25'),
        ((0.75, 0.25), 'widths 0.75, 0.25', ', widths 1.0, 0.5'),
        ((1.0, 0.75, 0.25), 'widths 1.0, 0.75, 0.25', ', width 0.5'),
    ],
)
def test_network_as_saved(saved, kind, widths, listed, left_out):
    model, folder = saved
    source = {'folder': f'{folder}', 'local-dir': f'local-dir:{folder}', 'file': f'{folder / "model.safetensors"}'}
    network = backbone(widths=widths)
    report = load_backbone(network, source[kind])
    assert_equal_maps(network, model)
    assert report == (
        f'Backbone weights from {source[kind]}: all {len(network.state_dict())} tensors of the network were loaded, '
        f'{sum(p.numel() for p in network.parameters()):,} parameters, for {listed}. '
        f'Left out of the source: its head of 10 classes{left_out}.'
    )


def test_report_without_anything_left_out(tmp_path):
    model = save_small(tmp_path / 'bare', num_classes=0)
    network = backbone()
    report = load_backbone(network, str(tmp_path / 'bare'))
    assert_equal_maps(network, model)
    assert report.endswith('Left out of the source: nothing.')


def test_tensors_are_the_networks_own(saved):
    """Training the backbone changes neither its source nor a second backbone."""
    model, folder = saved
    first, second = backbone(), backbone()
    load_backbone(first, str(folder))
    load_backbone(second, str(folder))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert_equal_maps(second, model)


def test_grey_images(saved):
    """The first convolution for grey images sums the weights over the colours, as in timm."""
    model, folder = saved
    network = backbone(in_chans=1, widths=(0.5,))
    report = load_backbone(network, str(folder))
    torch.testing.assert_close(network.conv1.weight, model.conv1.weight[:8].sum(1, keepdim=True))
    assert 'from images of 3 channels to 1' in report


def test_widths_that_do_not_overlap(tmp_path):
    widths = (1.0, 0.5, 0.25)
    model = save_small(tmp_path / 'disjoint', widths=widths, overlap=False)
    network = backbone(widths=widths, overlap=False)
    load_backbone(network, str(tmp_path / 'disjoint'))
    assert_equal_maps(network, model)
    with pytest.raises(InputError, match=r'disjoint: .*do not overlap'):
        load_backbone(backbone(widths=widths), str(tmp_path / 'disjoint'))


@pytest.fixture(scope='module')
def authors(tmp_path_factory):
    """A checkpoint like the authors', with the switchable probe and values by the formula."""
    path = tmp_path_factory.mktemp('authors') / 'slimclr.pth.tar'
    torch.save(checkpoint('probe'), path)
    yield path
    path.unlink()


@torch.inference_mode()
def assert_authors_numbers(network):
    """Compare with the pooled features of the authors' implementation with these weights."""
    for width, output in network.forward_widths(image('input', 2)).items():
        expected = FORWARD[f'backbone/pooled/{width}']
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


ON_THE_HUB = """
import timm, torch, slimclr_hub
from safetensors.torch import load_file, save_file
from slimclr_hub.detection.pretrained import load_backbone

network = timm.create_model('slimclr_resnet50', num_classes=0, widths=(0.5, 0.25)).eval()
x, outputs, result = load_file(IMAGE)['image'], {}, []
for source in ('hf-hub:me/net', 'slimclr_resnet50.TAG'):
    network.load_state_dict({name: torch.zeros_like(t) for name, t in network.state_dict().items()})
    result.append(load_backbone(network, source))
    with torch.inference_mode():
        outputs |= {f'{source} {width}': y for width, y in network.forward_widths(x).items()}
save_file(outputs, OUTPUTS)
"""


def test_sources_on_the_hub(hub, reader, authors, tmp_path):
    """A repository's name and a tag of the zoo load from the Hub."""
    convert_file(authors, tmp_path / 'network')
    names = ('me/net', f'me/slimclr_resnet50.{TAG}')
    for name in names:
        hub.add_repo(name, tmp_path / 'network')
    save_file({'image': image('input', 2)}, tmp_path / 'image.safetensors')
    code = ON_THE_HUB.replace('TAG', TAG).replace('IMAGE', repr(str(tmp_path / 'image.safetensors')))
    code = code.replace('OUTPUTS', repr(str(tmp_path / 'outputs.safetensors')))
    reports = reader.run(code, SLIMCLR_HUB_ORG='me')
    outputs = load_file(tmp_path / 'outputs.safetensors')
    assert len(outputs) == 4
    for name, output in outputs.items():
        expected = FORWARD[f'backbone/pooled/{name.rpartition(" ")[2]}']
        assert (output - expected).abs().max() < 1e-4 * expected.abs().max(), name
    starts = [
        f'Backbone weights from {source}: all 583 tensors' for source in ('hf-hub:me/net', f'slimclr_resnet50.{TAG}')
    ]
    assert all(report.startswith(start) for report, start in zip(reports, starts, strict=True))
    assert all('its head of 1000 classes, widths 1.0, 0.75.' in report for report in reports)
    for name in names:
        del hub.repos[name]


# Checkpoints


def test_checkpoint_of_a_run(saved, tmp_path):
    """The folder of a step holds the method's tensors, the backbone's among them."""
    model, _ = saved
    step = tmp_path / 'runs' / 'one' / 'checkpoints' / 'step-00000006'
    step.mkdir(parents=True)
    tensors = {f'backbone.{name}': t for name, t in model.state_dict().items() if not name.startswith('fc.')}
    save_file({**tensors, 'projector.0.weight': torch.ones(2, 2)}, step / 'model.safetensors')
    network = backbone()
    load_backbone(network, str(step))
    assert_equal_maps(network, model)
    with pytest.raises(InputError, match=rf'has not finished; give one of its checkpoints, {step}'):
        load_backbone(network, str(tmp_path / 'runs' / 'one'))


@pytest.mark.parametrize('widths', [WIDTHS, (0.5,)])
def test_checkpoint_of_the_authors(authors, widths):
    network = backbone('slimclr_resnet50', widths=widths)
    report = load_backbone(network, str(authors))
    assert_authors_numbers(network)
    assert 'Left out of the source: its head of 1000 classes' in report
    assert 'counted no batch' not in report


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """torchvision's ResNet-50, and the file of its state dict."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    randomise_batchnorm(network)
    path = tmp_path_factory.mktemp('plain') / 'resnet50.pth'
    torch.save(network.state_dict(), path)
    yield network, path
    path.unlink()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_network_of_one_width(plain, tmp_path, suffix):
    """Width 1.0 equals that network; narrow widths start with slices, and the report says so."""
    single, path = plain
    if suffix == '.safetensors':
        path = tmp_path / 'model.safetensors'
        save_file(single.state_dict(), path)
    network = backbone('slimclr_resnet50', widths=(1.0, 0.5))
    report = load_backbone(network, str(path))
    pooled = nn.Sequential(*[*single.children()][:-1], nn.Flatten())
    with torch.inference_mode():
        expected = pooled(image('input', 2))
        assert (network(image('input', 2)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(network.layer3[0].bn2['w050'].running_var, single.layer3[0].bn2.running_var[:128])
    assert 'The normalisations of width 0.5 have counted no batch' in report


def test_network_of_one_width_for_a_narrow_one(plain):
    """The source has width 1.0, whichever widths the backbone holds."""
    single, path = plain
    network = backbone('slimclr_resnet50', widths=(0.5, 0.25))
    report = load_backbone(network, str(path))
    assert torch.equal(network.layer4[2].conv3.weight, single.layer4[2].conv3.weight[:1024, :256])
    assert torch.equal(network.layer4[2].bn3['w025'].bias, single.layer4[2].bn3.bias[:512])
    assert 'Left out of the source: width 1.0. The normalisations of widths 0.5, 0.25 have counted no batch' in report


# Sources that do not fit


def refused(source, match, **kwargs):
    """Check that loading fails with an error that names the source, and changes nothing in the network."""
    network = backbone(**kwargs)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(InputError, match=match) as error:
        load_backbone(network, str(source))
    assert str(source) in str(error.value)
    assert str(error.value).count(str(source)) == 1
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_a_width_that_the_source_lacks(tmp_path):
    save_small(tmp_path / 'two', widths=(1.0, 0.5))
    refused(tmp_path / 'two', r'missing .*The file holds the widths 1\.0, 0\.5, not 0\.25', widths=(1.0, 0.25))


def test_another_network(saved, authors):
    _, folder = saved
    refused(folder, r'the network is a ResNet of bottleneck blocks', name='slimclr_resnet50')
    refused(folder, r'with 16 channels in its stem.*the network is .* with 64 channels', name='slimclr_resnet20x4')
    refused(authors, r'The file is of a ResNet of bottleneck blocks')


@pytest.mark.parametrize('name', ['conv1.weight', 'layer2.0.conv2.weight', 'layer1.1.bn2.w025.running_mean'])
@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_a_tensor_is_missing(saved, tmp_path, name, kind):
    _, folder = saved
    shutil.copytree(folder, tmp_path / 'bad')
    file = tmp_path / 'bad' / 'model.safetensors'
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    refused({'file': file, 'folder': tmp_path / 'bad'}[kind], name.replace('.', r'\.'))


def test_a_tensor_of_another_shape(saved, tmp_path):
    tensors = load_file(saved[1] / 'model.safetensors')
    save_file({**tensors, 'layer1.0.bn1.w050.bias': torch.zeros(9)}, tmp_path / 'bad.safetensors')
    refused(tmp_path / 'bad.safetensors', r'layer1\.0\.bn1\.w050\.bias')


def test_authors_checkpoint_without_a_tensor(tmp_path):
    content = checkpoint('probe')
    del content['state_dict']['module.features.3.conv2.weight']
    torch.save(content, tmp_path / 'bad.pth.tar')
    refused(tmp_path / 'bad.pth.tar', r'layer2\.0\.conv2\.weight is missing', name='slimclr_resnet50')


@pytest.mark.parametrize('name', ['model.safetensors', 'resnet.pth'])
def test_damaged_file(saved, tmp_path, name):
    model, folder = saved
    torch.save(model.state_dict(), tmp_path / 'resnet.pth')
    shutil.copy(folder / 'model.safetensors', tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, 'truncated|damaged')


def test_a_whole_pickle_is_read_and_code_in_it_is_not_run(tmp_path):
    torch.save({'state_dict': {'conv1.weight': torch.ones(1)}, 'hook': shutil.rmtree}, tmp_path / 'bad.pth')
    refused(tmp_path / 'bad.pth', r'refused and nothing of it was run')


@pytest.mark.parametrize(
    ('source', 'match'),
    [
        ('nowhere.pth.tar', 'does not exist'),
        ('nowhere/model.safetensors', 'does not exist'),
        ('nowhere', 'is not a tag such as'),
        ('resnet50.a1_in1k', 'is not a tag such as'),
        ('slimclr_resnet50.mocov9_in1k', 'mocov9_in1k'),
        ('slimclr_resnet20x4', 'there are no pretrained weights of slimclr_resnet20x4'),
        ('local-dir:nowhere', 'does not exist'),
    ],
)
def test_no_such_source(source, match):
    refused(source, match)


def test_folder_of_something_else(tmp_path):
    refused(tmp_path, r'neither config\.json nor model\.safetensors')
    (tmp_path / 'config.json').write_text('{"architecture": "vit_base"}')
    refused(tmp_path, 'is a vit_base, not a slimmable network')


def test_backbone_with_a_head(saved):
    refused_head = small_network(num_classes=3)
    with pytest.raises(InputError, match='a head of 3 classes; a backbone needs num_classes=0'):
        load_backbone(refused_head, str(saved[1]))
