import numpy as np
import pytest
from PIL import Image

from slimclr_hub.hub.card import training_card
from slimclr_hub.models.cost import WidthFacts
from slimclr_hub.runs.result import Protocol, Result
from slimclr_hub.text import human
from slimclr_hub.train.report import draw_figure

WIDTHS = (1.0, 0.5)
FACTS = [WidthFacts(1.0, 272_184, 10_100_000), WidthFacts(0.5, 68_300, 2_540_000)]
KNN = Protocol('knn', 'fashion-mnist-6k', k=20, temperature=0.07, while_training=True)
RESULTS = [Result('my-run', KNN, {1.0: 73.44, 0.5: 68.0}, start={1.0: 37.5, 0.5: 40.0})]
ABOUT = {
    'name': 'my-run',
    'folder': 'runs/my-run',
    'architecture': 'slimclr_resnet20',
    'method': 'mocov2',
    'data': 'fashion-mnist-6k',
    'epochs': '8',
    'size': '28',
}


def metrics(evaluated: tuple[str, ...] = ('knn',), slow_epochs: int = 1) -> list[dict]:
    """Four epochs of five steps, of which the first train the full width alone."""
    records = []
    for epoch in range(5):
        if epoch:
            widths = WIDTHS[:1] if epoch <= slow_epochs else WIDTHS
            losses = {f'info_nce/{width:g}': 5.0 - epoch / width for width in widths}
            records.append({'kind': 'train', 'epoch': epoch, 'step': 5 * epoch, 'loss': 1.0, **losses})
        if evaluated:
            found = {f'{name}/{width:g}': 50 + 5 * epoch * width for name in evaluated for width in WIDTHS}
            records.append({'kind': 'eval', 'epoch': epoch, 'step': 5 * epoch, **found})
    return records


def read_png(path) -> np.ndarray:
    assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


@pytest.mark.parametrize(
    ('evaluated', 'width'),
    [(('knn', 'rank'), 2250), (('knn',), 1500), ((), 750)],
    ids=['with k-NN and rank', 'with k-NN', 'without'],
)
def test_figure(tmp_path, evaluated, width):
    path = tmp_path / 'training.png'
    draw_figure(metrics(evaluated), WIDTHS, path.with_suffix(''))
    pixels = read_png(path)
    assert pixels.shape == (600, width, 3)
    # A line in the colour of each width, on paper that is mostly white.
    for colour in (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00):
        assert (pixels == colour).all(2).sum() > 100
    assert (pixels == 255).all(2).mean() > 0.7


def test_figure_of_a_single_width(tmp_path):
    records = [{'kind': 'train', 'epoch': 1, 'step': 4, 'info_nce/0.5': 3.0}]
    draw_figure(records, [0.5], tmp_path / 'training')
    assert read_png(tmp_path / 'training.png').shape == (600, 750, 3)


def test_figure_of_slow_start_alone(tmp_path):
    """Narrower widths have no loss at all where slow start takes all epochs, which a configuration may ask for."""
    draw_figure(metrics(slow_epochs=4), WIDTHS, tmp_path / 'training')
    assert read_png(tmp_path / 'training.png').shape == (600, 1500, 3)


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (25_557_032, '25.6 M'),
        (1_993_976, '1.99 M'),
        (4_089_184_256, '4.09 G'),
        (278_000_000, '278 M'),
        (17_300, '17.3 k'),
        (1_000, '1.00 k'),
        (999, '999'),
        (999_999, '1.00 M'),
    ],
)
def test_human(number, text):
    assert human(number) == text


def test_card():
    card = training_card(FACTS, ABOUT, RESULTS)
    assert card.startswith('---\nlibrary_name: timm\nlicense: apache-2.0\n')
    assert '\n# my-run\n' in card
    assert "timm.create_model('local-dir:runs/my-run', pretrained=True, width=0.5)" in card
    assert '| 1 | 272 k | 10.1 M | 37.5 | 73.4 |' in card
    assert '| 0.5 | 68.3 k | 2.54 M | 40.0 | 68.0 |' in card
    assert '| width | parameters | multiply-adds | k-NN at start | k-NN |' in card
    assert '`k-NN` is the top-1 accuracy (%) on held-out images by k-NN, k=20, tau=0.07, while training.' in card
    assert '2 widths' in card
    assert '28x28' in card
    assert '8 epochs on `fashion-mnist-6k`' in card
    # Every row of the table has as many cells as its head.
    table = [line for line in card.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in table}) == 1
    assert '{' not in card


def test_card_without_accuracies():
    card = training_card(FACTS[1:], ABOUT)
    assert 'k-NN' not in card
    assert '| 0.5 | 68.3 k | 2.54 M |' in card
    assert '1 width.' in card
    table = [line for line in card.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in table}) == 1
