"""The published networks' model cards: what they tell, and that everything in them runs as it stands there."""

import re

import pytest
import timm
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from slimclr_hub.hub.card import all_cards
from slimclr_hub.models.cost import width_facts
from slimclr_hub.models.registry import slimmable_models
from slimclr_hub.runs.result import load
from slimclr_hub.weights.published import ARCHITECTURE, PUBLISHED, SHIPPED, published_facts
from tests.hub.files import ROOT

CARDS = {path.name: path.read_text() for path in sorted((ROOT / 'model_cards').glob('*.md'))}
TAGS = pytest.mark.parametrize('tag', PUBLISHED)
# Parameters with 1000 classes, and multiply-adds at 224x224, as the design has them.
COSTS = {
    1.0: (25_557_032, '4.09 G'),
    0.75: (14_771_992, '2.32 G'),
    0.5: (6_917_640, '1.05 G'),
    0.25: (1_993_976, '278 M'),
}
HEAD = 'import timm, torch, slimclr_hub'


def card(tag):
    return CARDS[f'{PUBLISHED[tag].name}.md']


def blocks(text, language='python'):
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def table(text):
    """Width -> the other cells of the card's table."""
    lines = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
    return {float(cells[0]): cells[1:] for cells in lines[2:]}


def test_cards_are_what_the_command_writes():
    assert all_cards() == CARDS, 'run `slimclr-hub cards`'
    assert CARDS.keys() == {f'{network.name}.md' for network in (*PUBLISHED.values(), *SHIPPED.values())}


@pytest.mark.parametrize('num_classes', [0, 1000])
def test_costs_in_the_table_are_those_of_the_network(num_classes):
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, device='meta')
    assert published_facts(num_classes) == width_facts(model, 224)


def test_slimmable_networks_are_those_with_widths():
    for name in timm.list_models('slimclr_*'):
        assert hasattr(timm.create_model(name, device='meta'), 'widths') == (name in slimmable_models())


@TAGS
def test_numbers_are_those_of_the_facts(tag):
    published, rows = PUBLISHED[tag], table(card(tag))
    assert list(rows) == list(published.reported)
    for width, (parameters, multiply_adds, *accuracies) in rows.items():
        whole, expected = COSTS[width]
        held = whole if published.num_classes else whole - 1000 * (int(2048 * width) + 1)
        assert parameters == f'{held / 1e6:#.3g} M'
        assert multiply_adds == expected
        reported = published.reported[width]
        numbers = (reported.top1, reported.top5, reported.box_ap, reported.mask_ap)
        assert [float(cell) for cell in accuracies] == [number for number in numbers if number is not None]


@TAGS
def test_front_matter_is_what_the_hub_asks_for(tag):
    text = card(tag)
    data = yaml.safe_load(re.match(r'---\n(.*?\n)---\n', text, re.DOTALL)[1])
    assert data['library_name'] == 'timm'
    task = 'image-classification' if PUBLISHED[tag].num_classes else 'image-feature-extraction'
    assert data['pipeline_tag'] == task
    assert task in data['tags']
    # Of a licence that is none of its list, the Hub wants a name and a link.
    assert data['license'] == 'other'
    assert re.fullmatch(r'[a-z0-9-]+', data['license_name'])
    assert data['license_link'].startswith('https://')
    assert ModelCardData(**data).to_dict() == data
    assert ModelCard(text).data.to_dict() == data


@TAGS
def test_files_that_commands_name_are_there(tag):
    commands = ' '.join(blocks(card(tag), '(?:bash)?'))
    files = re.findall(r'\S+\.(?:py|yaml)\b', commands)
    assert all((ROOT / file).is_file() for file in files)
    assert files


RUN = """
space = {}
for block in BLOCKS:
    exec(block, space)
tensors = space.get('features', space.get('classes')), *space['maps']
result = {
    'shapes': [list(tensor.shape) for tensor in tensors],
    'dense': space['dense'].num_features,
    'lazy': [space['model'].width, space['model'].held],
}
"""
MAPS = [
    [1, int(channels * 0.5), size, size] for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
]


def test_all_python_runs_as_printed(hub, reader, published):
    files = {
        bool(PUBLISHED[tag].num_classes): {path.name: path.read_bytes() for path in folder.iterdir()}
        for tag, folder in published.items()
    }
    Image.radial_gradient('L').resize((300, 240)).save(reader.folder / 'image.jpg')
    # Of one tag with a probe and one without; the cards of the others have the same code.
    run: dict[bool, list[str]] = {}
    for tag in PUBLISHED:
        with_probe = PUBLISHED[tag].num_classes > 0
        code = [block.replace(tag, 'TAG') for block in blocks(card(tag))]
        if with_probe in run:
            assert code == run[with_probe]
            continue
        run[with_probe] = code
        repo = f'slimclr-hub/{PUBLISHED[tag].name}'
        hub.add_repo(repo, files[with_probe])
        hub.requests.clear()
        found = blocks(card(tag))
        assert len(found) == 4
        assert found[0].startswith(HEAD)
        result = reader.run(RUN.replace('BLOCKS', repr(found)))
        assert result == {'shapes': [[1, 5 if with_probe else 512], *MAPS], 'dense': 1024, 'lazy': [1.0, [1.0, 0.25]]}
        assert [request.path for request in hub.requests if request.path.startswith('/cdn/')]
        del hub.repos[repo]


def test_the_hub_takes_the_front_matter(reader):
    reader.run(f'from huggingface_hub import ModelCard\nfor text in {[*CARDS.values()]!r}: ModelCard(text).validate()')


# Of the networks in the package


def shipped_text(tag):
    return CARDS[f'{SHIPPED[tag].name}.md']


@pytest.mark.parametrize('tag', SHIPPED)
def test_numbers_of_a_shipped_network_are_those_of_its_evaluations(tag):
    text, results = shipped_text(tag), load(SHIPPED[tag].results)
    rows = table(text)
    for kind in 'linear', 'knn':
        result = next(each for each in results if each.protocol.kind == kind and not each.protocol.while_training)
        assert result.images == 10_000
        for width, value in result.top1.items():
            assert f'{value:.1f}' in rows[width]
    assert ModelCard(text).data.to_dict()['license'] == 'apache-2.0'
    assert (ROOT / 'model_cards' / re.search(r'\]\((\S+\.png)\)', text)[1]).is_file()
    files = re.findall(r'\S+\.(?:py|yaml)\b', ' '.join(blocks(text, '(?:bash)?')))
    assert files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize('tag', SHIPPED)
def test_python_of_a_shipped_network_runs_without_a_connection(reader, tag):
    Image.radial_gradient('L').resize((28, 28)).save(reader.folder / 'image.jpg')
    run = """
space = {}
for block in BLOCKS:
    exec(block, space)
result = [list(space.get('features', space.get('classes')).shape), space['dense'].num_features]
"""
    found = blocks(shipped_text(tag))
    assert len(found) == 2
    result = reader.run(run.replace('BLOCKS', repr(found)), HF_HUB_OFFLINE='1')
    assert result == [[1, 3 if SHIPPED[tag].num_classes else 16], 32]
