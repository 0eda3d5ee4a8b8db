import subprocess
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.images import CentreFirst
from slimclr_hub.inference.embed import embed
from slimclr_hub.inference.runner import preprocessing
from slimclr_hub.runs.progress import progress_bar
from tests.data_room.files import some_images, write_pngs

COUNT = 11
PIXELS = some_images('test', COUNT)[0]


def network(width: float = 0.5, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        'slimclr_resnet20', width=width, zero_init_last=False, **{'num_classes': 10, **kwargs}
    ).eval()


@pytest.fixture(scope='module')
def model():
    return network()


@pytest.fixture
def folder(tmp_path):
    return write_pngs(tmp_path / 'images', PIXELS)


@torch.no_grad()
def one_by_one(model, images) -> torch.Tensor:
    """Features by the dense network of the active width, image by image."""
    dense = model.extract(model.width).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    batches = [transform(image)[None] for image in images]
    return torch.cat([dense.forward_head(dense.forward_features(batch), pre_logits=True) for batch in batches])


def rgb(pixels=PIXELS) -> list[Image.Image]:
    return [Image.fromarray(image).convert('RGB') for image in pixels]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('batch_size', 'workers'), [(1, 0), (4, 0), (4, 2), (64, None)])
def test_features_are_those_of_single_images(model, folder, batch_size, workers):
    result = embed(model, folder, batch_size=batch_size, workers=workers)
    assert result.names == [f'{i:04d}.png' for i in range(COUNT)]
    assert result.features.shape == (COUNT, 32)
    assert result.features.dtype == torch.float32
    assert result.features.std() > 0.01
    assert close(result.features, one_by_one(model, rgb()))
    assert (result.architecture, result.width, result.skipped) == ('slimclr_resnet20', 0.5, [])


def test_width_is_the_active_one(model, folder):
    for width, length in (1.0, 64), (0.25, 16):
        with model.set_width(width):
            result = embed(model, folder, workers=0)
            assert close(result.features, one_by_one(model, rgb()))
        assert result.width == width
        assert result.features.shape == (COUNT, length)
    assert model.width == 0.5


def test_every_kind_of_image_is_read_as_timm_does(model, tmp_path):
    grey = Image.fromarray(PIXELS[0])
    colour = Image.merge('RGB', [Image.fromarray(image) for image in PIXELS[:3]])
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(PIXELS[3]))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    wide = colour.resize((48, 30))
    grey.save(tmp_path / '1-grey.png')
    colour.save(tmp_path / '2-rgb.bmp')
    alpha.save(tmp_path / '3-rgba.png')
    colour.quantize(16).save(tmp_path / '4-palette.png', transparency=3)
    colour.convert('CMYK').save(tmp_path / '5-cmyk.jpg')
    grey.convert('LA').save(tmp_path / '6-grey-alpha.png')
    grey.convert('1').save(tmp_path / '7-bit.tif')
    wide.save(tmp_path / '8-rotated.jpg', exif=exif)
    modes = [Image.open(path).mode for path in sorted(tmp_path.iterdir())]
    assert modes == ['L', 'RGB', 'RGBA', 'P', 'CMYK', 'LA', '1', 'RGB']

    result = embed(model, tmp_path, batch_size=4, workers=0)
    timms = ImageDataset(str(tmp_path), reader=None, input_key='.png;.bmp;.jpg;.tif')
    assert result.names == [timms.filename(index) for index in range(len(timms))]
    assert close(result.features, one_by_one(model, [image for image, _ in timms]))


def test_long_image_is_cropped_first(model):
    """Enlarged as a whole, one of 20,000 x 1 pixels takes gigabytes."""
    transform, mode = preprocessing(model)
    assert isinstance(transform, CentreFirst)
    long, centre = Image.new(mode, (20_000, 1)), Image.new(mode, (8, 1), 'white')
    long.paste(centre, (9_996, 0))
    assert transform(long).equal(transform(centre))


def test_16_bits_are_those_of_8(model, tmp_path):
    """timm clips them, to a white image."""
    Image.fromarray(PIXELS[0].astype(np.uint16) << 8).save(tmp_path / '16-bit.png')
    result = embed(model, tmp_path, workers=0)
    assert close(result.features, one_by_one(model, rgb(PIXELS[:1])))


def test_grey_network_from_its_folder(tmp_path, folder):
    """What a run leaves says its size and normalisation; images in colour become grey."""
    save_folder(
        network(in_chans=1, num_classes=0), tmp_path / 'run', size=20, mean=(0.3,), std=(0.4,), crop_pct=0.9, card=''
    )
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    transform, mode = preprocessing(model)
    tensor = transform(Image.new('L', (28, 28), 51))
    assert mode == 'L'
    assert tensor.shape == (1, 20, 20)
    assert torch.allclose(tensor, torch.tensor((0.2 - 0.3) / 0.4))
    expected = one_by_one(model, [Image.fromarray(image) for image in PIXELS])
    assert close(embed(model, folder).features, expected)
    assert close(embed(model, rgb()).features, expected)


def test_normalisation_of_a_grey_network_with_colour_values(folder):
    """timm leaves three means in the configuration; normalising by them would give three channels."""
    result = embed(network(in_chans=1), folder)
    assert result.features.shape == (COUNT, 32)


def test_images_in_memory(model, folder):
    expected = one_by_one(model, rgb())
    features = datasets.Features({'image': datasets.Image()})
    dataset = datasets.Dataset.from_dict({'image': rgb()}, features)
    # Files that Pillow has opened but not read yet: workers would share their position.
    opened = [Image.open(path) for path in sorted(folder.iterdir())]
    for images in rgb(), opened, dataset['image'], tuple(rgb()):
        result = embed(model, images, batch_size=3, workers=2)
        assert result.names == [str(index) for index in range(COUNT)]
        assert close(result.features, expected)
    assert close(embed(model, rgb()[0]).features, expected[:1])


@pytest.fixture
def broken(folder):
    (folder / '0002.png').write_text('<html>404</html>')
    (folder / '0007.png').write_bytes((folder / '0007.png').read_bytes()[:300])
    return folder


def test_file_that_is_no_image_is_named_before_the_work(model, broken):
    (broken / '0005.png').write_bytes(b'')
    ran = []
    hook = model.conv1.register_forward_hook(lambda *_: ran.append(True))
    with pytest.raises(InputError) as caught:
        embed(model, broken, batch_size=1, workers=0)
    hook.remove()
    assert not ran
    problem = '(not an image that Pillow can read)'
    assert str(caught.value) == (
        f'cannot read 0002.png {problem}; 0005.png {problem}; remove them, or give --skip-unreadable'
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_file_that_is_cut_off_is_named(model, broken, workers):
    (broken / '0002.png').unlink()
    with pytest.raises(
        InputError, match=r'^cannot read 0007.png \(.*\); remove it, or give --skip-unreadable$'
    ) as caught:
        embed(model, broken, batch_size=2, workers=workers)
    assert 'Traceback' not in str(caught.value)


class Unresizable(Image.Image):
    """An image for which memory does not suffice."""

    def resize(self, *args, **kwargs):
        raise MemoryError


def test_image_that_takes_all_memory_is_left_out(model):
    image = Image.new('RGB', (40, 40))
    image.__class__ = Unresizable
    result = embed(model, [*rgb()[:2], image], workers=0, skip_unreadable=True, progress=False)
    assert result.names == ['0', '1']
    assert result.skipped == [('2', 'MemoryError')]


@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_unreadable_are_left_out_and_listed(model, broken, capsys, batch_size):
    result = embed(model, broken, batch_size=batch_size, workers=0, skip_unreadable=True, progress=False)
    kept = [index for index in range(COUNT) if index not in (2, 7)]
    assert result.names == [f'{index:04d}.png' for index in kept]
    assert close(result.features, one_by_one(model, rgb(PIXELS[kept])))
    assert [name for name, _ in result.skipped] == ['0002.png', '0007.png']
    listed = capsys.readouterr().err.splitlines()
    assert listed[:2] == ['Left out 2 that could not be read:', '  0002.png: not an image that Pillow can read']
    assert listed[2].startswith('  0007.png: ')
    assert len(listed) == 3


@pytest.mark.parametrize('name', ['0002.png', '0007.png'])
def test_nothing_is_left(model, broken, name):
    with pytest.raises(InputError, match=f'cannot read .*{name}'):
        embed(model, broken / name, skip_unreadable=True)


def test_missing_image_of_a_data_set(model):
    features = datasets.Features({'image': datasets.Image()})
    column = datasets.Dataset.from_dict({'image': [*rgb()[:2], None]}, features)['image']
    with pytest.raises(InputError, match=r'cannot read 2 \(no image\)'):
        embed(model, column)
    assert embed(model, column, skip_unreadable=True).names == ['0', '1']


def test_network_is_left_as_it_was(folder):
    model = network().train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    undisturbed = torch.rand(2)
    torch.manual_seed(3)
    result = embed(model, folder, batch_size=4, workers=1)
    assert torch.rand(2).equal(undisturbed)
    assert [module.training for module in model.modules()] == modes
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert close(result.features, one_by_one(model, rgb()))

    (folder / '0007.png').write_bytes((folder / '0007.png').read_bytes()[:300])
    with pytest.raises(InputError):
        embed(model, folder, workers=0)
    assert [module.training for module in model.modules()] == modes


def test_classifier_trains_on_features(model, folder):
    """Which it could not on tensors of inference mode."""
    head = torch.nn.Linear(32, 2)
    head(embed(model, folder).features).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_precision(model, folder):
    expected = one_by_one(model, rgb())
    mixed = embed(model, folder, precision='bf16').features
    halved = embed(network().bfloat16(), folder).features
    for features in mixed, halved:
        assert features.dtype == torch.float32
        assert not close(features, expected)
        assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.99


def test_network_of_timm(folder):
    model = timm.create_model('resnet10t', num_classes=0)
    result = embed(model, folder / '0000.png')
    assert result.features.shape == (1, 512)
    assert (result.architecture, result.width) == ('resnet10t', None)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'batch_size': 0}, '--batch-size is 0; give 1 or more'),
        ({'workers': -1}, '--workers is -1; give 0 or more'),
        ({'precision': 'fp8'}, "--precision 'fp8' is not one of no, fp16, bf16"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(InputError, match=message):
        embed(model, rgb(), **arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'global_pool': '', 'num_classes': 0}, r"does not pool, its features have shape \[11, 32, 7, 7\]; .*'avg'"),
        ({'features_only': True}, 'without features_only'),
        ({'in_chans': 4}, r'the network takes 4 channels; images are read as grey \(1\) or RGB \(3\)'),
    ],
)
def test_wrong_network(arguments, message):
    if 'features_only' in arguments:
        arguments = {'num_classes': 0, **arguments}
    with pytest.raises(InputError, match=message):
        embed(network(**arguments), rgb())


def test_network_that_does_not_say_how_to_preprocess(model):
    """timm would take 224x224 pixels, whatever the network is made for."""
    dense = model.extract(0.5)
    dense.pretrained_cfg = None
    with pytest.raises(InputError, match=r'the network does not say .* no pretrained_cfg'):
        embed(dense, rgb())
    dense.pretrained_cfg = model.pretrained_cfg
    result = embed(dense, rgb())
    assert close(result.features, one_by_one(model, rgb()))
    assert result.width == 0.5


def test_batch_that_does_not_fit(folder):
    model = network()

    def forward(*_):
        raise torch.OutOfMemoryError('CUDA out of memory')

    model.conv1.register_forward_pre_hook(forward)
    with pytest.raises(InputError, match='--batch-size 64 is too large for cpu; halve it'):
        embed(model, folder)


def test_bar_shows_rate_and_time_left(capsys):
    with progress_bar(8, 'embedding', True) as bar:
        bar.start_t -= 10
        bar.mininterval = 0
        bar.update(4)
    shown = capsys.readouterr().err
    assert 'embedding:  50%' in shown
    assert 'img/s' in shown
    assert '00:10<00:10' in shown


def test_short_pass_shows_no_bar(model, folder, capsys):
    embed(model, folder)
    assert capsys.readouterr().err == ''


def test_runs_without_the_extras():
    """timm and torch are enough; rich and pyarrow are asked for where they are needed."""
    extras = ('accelerate', 'datasets', 'jsonargparse', 'matplotlib', 'pyarrow', 'rich', 'webdataset')
    blocked = f'import sys; sys.modules.update(dict.fromkeys({extras}))'
    modules = 'import slimclr_hub.inference.embed, slimclr_hub.inference.predict'
    subprocess.run([sys.executable, '-c', f'{blocked}; {modules}'], check=True)
