"""Pushed networks opened by the real transformers and datasets, with a Hub on loopback, in one process."""

import pytest

from tests.hub.files import save_small

PREPARE = """
import io
import numpy as np, timm, torch, slimclr_hub
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, TimmBackbone

torch.set_grad_enabled(False)
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
quarter = timm.create_model('hf-hub:me/probe', pretrained=True, width=0.25).eval()
assert quarter.bn1.w025.running_mean.any()  # or the tests would not notice that statistics are reset

def pooled(model, width=0.25):
    with model.set_width(width):
        return model.forward_head(model.forward_features(x), pre_logits=True)
"""


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A network with ten classes and a backbone."""
    home = tmp_path_factory.mktemp('networks')
    save_small(home / 'probe')
    save_small(home / 'backbone', num_classes=0)
    return home


@pytest.fixture(scope='module')
def run(hub, publisher, reader, folders):
    for name in ('probe', 'backbone'):
        ended = publisher.command('push', folders / name, f'me/{name}', HF_TOKEN=hub.token)
        assert ended.status == 0, ended.err
    reader.run(PREPARE)
    return reader.run


@pytest.fixture(params=['Hub', 'folder'])
def where(request, folders):
    """Prefixes of repositories' names, for transformers and for timm."""
    return ('me', 'hf-hub:me') if request.param == 'Hub' else (str(folders), f'local-dir:{folders}')


def test_auto_model(run, where):
    run(f"""
model = AutoModel.from_pretrained('{where[0]}/probe', model_args={{'width': 0.25}}).eval()
assert model.timm_model.width == 0.25
output = model(x)
assert_close(output.last_hidden_state, quarter.forward_features(x))
assert_close(output.pooler_output, pooled(quarter))
model.timm_model.set_width(0.75)
assert_close(model(x).pooler_output, pooled(quarter, 0.75))

whole = AutoModel.from_pretrained('{where[0]}/backbone').eval()
assert whole.timm_model.width == 1.0
backbone = timm.create_model('{where[1]}/backbone', pretrained=True).eval()
assert_close(whole(x).pooler_output, backbone(x))
""")


def test_auto_model_with_some_of_the_widths(run, where):
    """`model_args` replaces what config.json says, so it names all that differs from the architecture's default."""
    run(f"""
model = AutoModel.from_pretrained('{where[0]}/probe', model_args={{'widths': (1.0, 0.25)}}, output_loading_info=True)
model, report = model
assert model.timm_model.widths == (1.0, 0.25)
assert not report['missing_keys'] and not report['mismatched_keys'], report
assert_close(model.eval()(x).pooler_output, pooled(quarter, 1.0))
""")


def test_image_classification(run, where):
    run(f"""
model, report = AutoModelForImageClassification.from_pretrained(
    '{where[0]}/probe', model_args={{'width': 0.25}}, output_loading_info=True
)
assert not any(report.values()), report
model.eval()
assert_close(model(x).logits, quarter(x))
output = model(x, labels=torch.tensor([1, 2]), output_hidden_states=True)
assert_close(output.loss, torch.nn.functional.cross_entropy(quarter(x), torch.tensor([1, 2])))
assert [state.shape[1] for state in output.hidden_states] == [4, 4, 8, 16]
model.timm_model.set_width(1.0)
assert_close(model(x).logits, quarter.forward_at(x, 1.0))
""")


def test_saved_and_opened_again(run, where):
    run(f"""
for cls in (AutoModel, AutoModelForImageClassification):
    model = cls.from_pretrained('{where[0]}/probe', model_args={{'width': 0.25}}).eval()
    model.save_pretrained(cls.__name__)
    again = cls.from_pretrained(cls.__name__).eval()
    assert again.timm_model.width == 0.25
    assert again.timm_model.state_dict().keys() == model.timm_model.state_dict().keys()
    assert_close(again(x)[-1], model(x)[-1])
opened = timm.create_model('local-dir:AutoModelForImageClassification', pretrained=True).eval()
assert opened.width == 0.25
assert_close(opened(x), quarter(x))
""")


def test_new_head(run, where):
    run(f"""
for name, options in (('backbone', {{}}), ('probe', {{'ignore_mismatched_sizes': True}})):
    model = AutoModelForImageClassification.from_pretrained(
        f'{where[0]}/{{name}}', model_args={{'width': 0.25}}, num_labels=7, **options
    ).eval()
    assert model(x).logits.shape == (2, 7)
    assert model(x).logits.std() > 0
    network = timm.create_model(f'{where[1]}/{{name}}', pretrained=True, width=0.25).eval()
    assert_close(model.timm_model.forward_features(x), network.forward_features(x))
    model.timm_model.set_width(0.5)
    assert model(x).logits.shape == (2, 7)
""")


def test_timm_backbone(run, where):
    """Of what timm loaded, TimmBackbone resets the normalisations, unless they are marked as loaded."""
    run(f"""
backbone = TimmBackbone.from_pretrained('{where[1]}/probe', out_indices=(1, 2, 3), width=0.25).eval()
assert backbone.channels == [4, 8, 16]
maps = quarter.forward_intermediates(x, [1, 2, 3], intermediates_only=True)
for ours, expected in zip(backbone(x).feature_maps, maps, strict=True):
    assert_close(ours, expected)
backbone._backbone.set_width(0.5)
with quarter.set_width(0.5):
    maps = quarter.forward_intermediates(x, [1, 2, 3], intermediates_only=True)
for ours, expected in zip(backbone(x).feature_maps, maps, strict=True):
    assert_close(ours, expected)
random = TimmBackbone.from_pretrained('{where[1]}/probe', out_indices=(3,), in_chans=1).eval()
assert random(x[:, :1]).feature_maps[0].shape == (2, 64, 8, 8)
""")


def test_timm_backbone_of_a_resnet50(hub, run, published):
    """Four levels and the dense network of one width, out of one published file."""
    files = {path.name: path.read_bytes() for path in published['mocov2_200e_in1k'].iterdir()}
    hub.add_repo('backbones/slimclr_resnet50.mocov2_200e_in1k', files)
    code = """
from safetensors.torch import load_file
y = torch.randn(1, 3, 64, 64)
options = {'out_indices': (1, 2, 3, 4)}
narrow = TimmBackbone.from_pretrained('slimclr_resnet50.mocov2_200e_in1k', width=0.25, **options).eval()
dense = TimmBackbone.from_pretrained('slimclr_resnet50_025.mocov2_200e_in1k', **options).eval()
assert narrow.channels == dense.channels == [64, 128, 256, 512]
network = timm.create_model('slimclr_resnet50.mocov2_200e_in1k', pretrained=True, width=0.25).eval()
expected = network.forward_intermediates(y, [1, 2, 3, 4], intermediates_only=True)
for maps in narrow(y).feature_maps, dense(y).feature_maps:
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close(ours, theirs)
"""
    run(code, SLIMCLR_HUB_ORG='backbones')
    del hub.repos['backbones/slimclr_resnet50.mocov2_200e_in1k']


TASKS = """
from transformers import (
    DetrConfig, DetrForObjectDetection, RTDetrConfig, RTDetrForObjectDetection, UperNetConfig,
    UperNetForSemanticSegmentation,
)

y = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
masks = (y[:, 0] > 0).long()
boxes = [{'class_labels': torch.tensor([1]), 'boxes': torch.tensor([[0.5, 0.5, 0.3, 0.4]])}] * 2
small = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
             encoder_attention_heads=2, decoder_attention_heads=2, num_labels=2)

def backbone_of(width, levels):
    return TimmBackbone.from_pretrained(f'slimclr_resnet50_{width}.mocov2_200e_in1k', out_indices=levels).eval()

def check(model, inside, backbone, labels):
    torch.manual_seed(0)
    model.eval()
    maps = inside(y)
    for ours, expected in zip(getattr(maps, 'feature_maps', maps), backbone(y).feature_maps, strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # DETRs compute frozen normalisations in another order
    model.save_pretrained('task')
    opened = type(model).from_pretrained('task').eval()
    assert_close(opened(y).logits, model(y).logits)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    stem = next(inside.parameters()).clone()
    with torch.enable_grad():
        loss = model(y, labels=labels).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert (next(inside.parameters()) != stem).any()
"""


@pytest.fixture
def tasks(hub, run, published):
    """Run code beside TASKS with a published ResNet-50 on the Hub."""
    files = {path.name: path.read_bytes() for path in published['mocov2_200e_in1k'].iterdir()}
    hub.add_repo('tasks/slimclr_resnet50.mocov2_200e_in1k', files)
    yield lambda code: run(TASKS + code, SLIMCLR_HUB_ORG='tasks')
    del hub.repos['tasks/slimclr_resnet50.mocov2_200e_in1k']


@pytest.mark.parametrize('width', ['050', '025'])
def test_upernet(tasks, width):
    tasks(f"""
backbone = backbone_of('{width}', (1, 2, 3, 4))
config = UperNetConfig(backbone_config=backbone.config, num_labels=2, hidden_size=16, auxiliary_channels=8)
model = UperNetForSemanticSegmentation(config)
model.backbone.load_state_dict(backbone.state_dict())
check(model, model.backbone, backbone, masks)
""")


@pytest.mark.parametrize('width', ['050', '025'])
def test_detr(tasks, width):
    tasks(f"""
backbone = backbone_of('{width}', (4,))
model = DetrForObjectDetection(DetrConfig(backbone_config=backbone.config, **small))
model.model.backbone.model.load_state_dict(backbone._backbone.state_dict())
check(model, model.model.backbone.model, backbone, boxes)
""")


@pytest.mark.parametrize('width', ['050', '025'])
def test_rt_detr(tasks, width):
    tasks(f"""
backbone = backbone_of('{width}', (2, 3, 4))
narrow = dict(encoder_hidden_dim=32, decoder_in_channels=[32] * 3, num_denoising=4)
config = RTDetrConfig(
    backbone_config=backbone.config, encoder_in_channels=backbone.channels, **small, **narrow
)
model = RTDetrForObjectDetection(config)
model.model.backbone.model.load_state_dict(backbone.state_dict())
check(model, model.model.backbone.model, backbone, boxes)
""")


def test_images_of_datasets(run, where):
    run(f"""
import datasets
from slimclr_hub.inference.embed import embed

pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 36, 3), dtype=np.uint8)
data = datasets.Dataset.from_dict({{'image': [*pixels]}}, features=datasets.Features({{'image': datasets.Image()}}))
processor = AutoImageProcessor.from_pretrained('{where[0]}/probe')
model = AutoModel.from_pretrained('{where[0]}/probe', model_args={{'width': 0.25}}).eval()

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(quarter), is_training=False)
expected = torch.stack([transform(image) for image in data['image']])
inputs = processor(data[:]['image'])
assert_close(inputs.pixel_values, expected)
features = model(**inputs).pooler_output
assert_close(features, quarter.forward_head(quarter.forward_features(expected), pre_logits=True))

embeddings = embed(quarter, data['image'], progress=False)
assert embeddings.names == ['0', '1', '2', '3', '4'] and embeddings.width == 0.25
assert_close(embeddings.features, features)

# As in a loader of transformers' Trainer.
batch = data.with_transform(lambda rows: processor(rows['image']))[:2]
assert_close(model(pixel_values=torch.as_tensor(batch['pixel_values'])).pooler_output, features[:2])
""")
