import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform, resolve_model_data_config

from slimclr_hub.errors import InputError
from slimclr_hub.inference.predict import ClassProbability, Prediction, predict, predictions_table
from tests.data_room.files import some_images, write_pngs

COUNT = 5
PIXELS = some_images('test', COUNT)[0]
GARMENTS = ('top', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')


def network(num_classes: int = 10, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        'slimclr_resnet20', width=0.5, num_classes=num_classes, zero_init_last=False, pretrained_cfg_overlay=config
    ).eval()


@pytest.fixture
def folder(tmp_path):
    return write_pngs(tmp_path / 'images', PIXELS)


@torch.no_grad()
def probabilities(model) -> torch.Tensor:
    """[N, classes], image by image."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = [transform(Image.fromarray(image).convert('RGB'))[None] for image in PIXELS]
    return torch.cat([model.forward_at(image, model.width) for image in images]).softmax(1)


def test_the_network_in_the_package_names_garments():
    model = timm.create_model('slimclr_resnet20', pretrained=True)
    assert [label.lower() for label in labels(model)] == ['t-shirt/top', *GARMENTS[1:]]
    assert labels(timm.create_model('slimclr_resnet20', num_classes=10)) == [str(index) for index in range(10)]
    assert labels(timm.create_model('slimclr_resnet20', pretrained=True, num_classes=3)) == ['0', '1', '2']


def labels(model) -> list[str]:
    """Names of all classes, in the order of the head's output."""
    (prediction,) = predict(model, Image.fromarray(PIXELS[0]), top=10**6)
    return [guess.label for guess in sorted(prediction.classes, key=lambda guess: guess.index)]


@pytest.mark.parametrize('width', [1.0, 0.5, 0.25])
def test_probabilities_are_those_of_single_images(folder, width):
    model = network()
    model.set_width(width)
    expected = probabilities(model)
    model.train()
    predictions = predict(model, folder, top=3, batch_size=2, workers=0)
    assert model.training
    assert [prediction.name for prediction in predictions] == [f'{i:04d}.png' for i in range(COUNT)]
    for prediction, row in zip(predictions, expected, strict=True):
        assert [guess.index for guess in prediction.classes] == row.topk(3).indices.tolist()
        assert [guess.probability for guess in prediction.classes] == pytest.approx(row.topk(3).values.tolist(), 1e-4)
        assert [guess.label for guess in prediction.classes] == [str(guess.index) for guess in prediction.classes]


def test_all_classes_where_there_are_fewer(folder):
    for prediction in predict(network(4), folder, top=5):
        assert sorted(guess.index for guess in prediction.classes) == [0, 1, 2, 3]
        assert sum(guess.probability for guess in prediction.classes) == pytest.approx(1)


def test_names_of_the_configuration():
    assert labels(network(label_names=list(GARMENTS))) == list(GARMENTS)
    described = {name: f'a {name}' for name in GARMENTS}
    assert labels(network(label_names=GARMENTS, label_descriptions=described)) == list(described.values())
    # JSON has no numbers as keys, and timm allows gaps.
    sparse = labels(network(label_names={'0': 'top', '3': 'dress'}))
    assert sparse == ['top', '1', '2', 'dress', *map(str, range(4, 10))]


def test_names_of_imagenet():
    names = labels(network(1000))
    assert len(names) == 1000
    assert names[0] == 'tench, Tinca tinca'
    assert names[281] == 'tabby, tabby cat'


def test_names_do_not_outlive_their_head():
    model = network(label_names=GARMENTS)
    model.reset_classifier(3)
    assert labels(model) == ['0', '1', '2']


def test_images_in_memory_and_unreadable(folder, capsys):
    images = [Image.fromarray(image) for image in PIXELS]
    assert [prediction.name for prediction in predict(network(), images)] == ['0', '1', '2', '3', '4']
    (folder / '0001.png').write_text('no image')
    with pytest.raises(InputError, match=r'cannot read 0001\.png'):
        predict(network(), folder)
    left = predict(network(), folder, skip_unreadable=True)
    assert [prediction.name for prediction in left] == ['0000.png', '0002.png', '0003.png', '0004.png']
    assert '0001.png' in capsys.readouterr().err


def test_network_without_a_head():
    with pytest.raises(InputError, match=r'no head .* such as slimclr_resnet50\.mocov3_300e_lincls_in1k, or embed'):
        predict(network(0), [Image.fromarray(PIXELS[0])])


def test_no_classes_asked_for():
    with pytest.raises(InputError, match='top is 0; give 1 or more'):
        predict(network(), [Image.fromarray(PIXELS[0])], top=0)


def test_table():
    long = f'a/{"very/" * 12}long/name[bold].png'
    predictions = [
        Prediction(long, (ClassProbability(3, 'dress [red]', 0.7512), ClassProbability(0, 'top', 0.2))),
        Prediction('b.png', (ClassProbability(0, 'top', 1.0),)),
    ]
    console = Console(width=60, record=True)
    console.print(predictions_table(predictions))
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in console.export_text().splitlines()]
    rows = [row for row in rows if row]
    # A long name goes on in the next line rather than being cut off, brackets and all.
    assert ''.join(row[0] for row in rows[:-1]) == long
    assert [row[1:] for row in rows if row[1]] == [['dress [red]', '75.1'], ['top', '20.0'], ['top', '100.0']]
    assert rows[-1] == ['b.png', 'top', '100.0']
