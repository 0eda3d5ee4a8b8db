"""Slimmable backbones in torchvision's Mask R-CNN: the pyramid, gradients of all widths, extraction, precision."""

import copy
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from slimclr_hub.detection.mmdetection.datasets import CocoFolder
from slimclr_hub.detection.torchvision_backbone import (
    SlimmableBackboneWithFPN,
    backward_widths,
    extract_width,
    slimmable_mask_rcnn,
)
from slimclr_hub.detection.torchvision_coco import CocoInstances, evaluate_widths
from slimclr_hub.detection.widths import InputSlicedConv2d
from slimclr_hub.errors import DataError, InputError
from slimclr_hub.models import DEFAULT_WIDTHS
from slimclr_hub.models.layers import SlimmableConv2d, SwitchableBatchNorm2d
from tests.hub.files import save_small, small_network
from tests.networks import randomise_batchnorm
from tests.scripts import Script, end_well, start_together

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'transfer' / 'torchvision_mask_rcnn.py'
WIDTHS = DEFAULT_WIDTHS


def images(count=2, size=48, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, generator=generator, dtype=torch.float64)


def make_backbone(name='slimclr_resnet20', **kwargs):
    network = small_network(name, num_classes=0, **kwargs)
    return SlimmableBackboneWithFPN(network, out_channels=8).double().eval()


def make_detector(widths=WIDTHS, **kwargs):
    """Build a detector of two classes with few channels, regions and hidden units."""
    backbone = SlimmableBackboneWithFPN(small_network(num_classes=0, widths=widths), out_channels=8)
    levels = [str(i) for i in range(len(backbone.strides))]
    model = MaskRCNN(
        backbone,
        min_size=48,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_pre_nms_top_n_train=40,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        box_head=TwoMLPHead(8 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 2),
        box_batch_size_per_image=8,
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 2),
        **kwargs,
    )
    return model.double()


def targets(count=2, size=48):
    """Return one rectangle for each image, each in another place."""
    made = []
    for i in range(count):
        box = [4.0 + 8 * i, 6.0, 28.0 + 8 * i, 40.0]
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[0, 6:40, 4 + 8 * i : 28 + 8 * i] = 1
        made.append({'boxes': torch.tensor([box]).double(), 'labels': torch.tensor([1]), 'masks': mask})
    return made


# The pyramid


def padded_pyramid(backbone):
    """Build torchvision's pyramid with the same weights."""
    channels = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    pyramid = FeaturePyramidNetwork(channels, backbone.out_channels, LastLevelMaxPool()).double()
    pyramid.load_state_dict(backbone.fpn.state_dict())
    return pyramid


def pad(x, channels):
    """Pad with zeros, as the reference code does."""
    return torch.cat([x, x.new_zeros(x.shape[0], channels - x.shape[1], *x.shape[2:])], 1)


@pytest.mark.parametrize('name', ['slimclr_resnet20', 'slimclr_resnet50'])
@pytest.mark.parametrize('widths', [WIDTHS, (0.75, 0.5)])
def test_maps_are_those_of_the_dense_network(name, widths):
    """Levels equal those of the dense network's stages through the pyramid padded with zeros, at every width."""
    backbone = make_backbone(name, widths=widths)
    padded = padded_pyramid(backbone)
    x = images(1, size=64)
    whole = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    assert whole[0] == int({'slimclr_resnet20': 16, 'slimclr_resnet50': 256}[name] * widths[0])
    for width in widths:
        with torch.inference_mode():
            dense = backbone.body.extract(width)
            maps = dense.forward_intermediates(x, intermediates_only=True)[1:]
            filled = [pad(level, channels) for level, channels in zip(maps, whole, strict=True)]
            expected = padded(OrderedDict((str(i), level) for i, level in enumerate(filled)))
            with backbone.set_width(width):
                assert backbone.width == width
                out = backbone(x)
        assert list(out) == [*map(str, range(len(whole))), 'pool']
        for level, value in expected.items():
            torch.testing.assert_close(out[level], value, rtol=1e-9, atol=1e-9)
        assert backbone.width == widths[0]
    assert backbone.widths == widths


def test_pyramid_begins_as_torchvision_begins_it():
    """Initial values are drawn from the same numbers, under the same names."""
    network = small_network(num_classes=0)
    torch.manual_seed(3)
    ours = SlimmableBackboneWithFPN(network, 8).fpn
    torch.manual_seed(3)
    theirs = FeaturePyramidNetwork([16, 32, 64], 8, LastLevelMaxPool())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())
    assert all(isinstance(block[0], InputSlicedConv2d) for block in ours.inner_blocks)


# The detector


def test_anchors_and_levels_of_resnet50_are_those_of_torchvision():
    ours = slimmable_mask_rcnn(None, (1.0, 0.5), 2)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios
    for pool in 'box_roi_pool', 'mask_roi_pool':
        a, b = getattr(ours.roi_heads, pool), getattr(theirs.roi_heads, pool)
        assert (a.featmap_names, a.output_size, a.sampling_ratio) == (b.featmap_names, b.output_size, b.sampling_ratio)
    assert list(ours.transform.image_mean) == theirs.transform.image_mean
    assert list(ours.transform.image_std) == theirs.transform.image_std


def test_wrong_network_or_weights(tmp_path):
    with pytest.raises(InputError, match="name 'resnet50' is none of slimclr_resnet18"):
        slimmable_mask_rcnn(None, WIDTHS, 2, 'resnet50')
    with pytest.raises(InputError, match='does not exist'):
        slimmable_mask_rcnn(str(tmp_path / 'nothing.pth'), WIDTHS, 2, 'slimclr_resnet20')


# Training


def seed_each_width(model):
    """Sample the same regions in each forward, and record the widths that ran."""
    ran = []

    def seed(*_):
        torch.manual_seed(5)
        ran.append(model.backbone.width)

    model.register_forward_pre_hook(seed)
    return ran


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('widths', [None, (0.5, 1.0)])
def test_gradients_are_the_sum_over_widths(widths):
    model = make_detector().train()
    ran = seed_each_width(model)
    expected, losses = {}, {}
    for width in widths or WIDTHS:
        model.zero_grad()
        with model.backbone.set_width(width):
            losses[width] = model([*images()], targets())
            sum(losses[width].values()).backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient
    model.zero_grad()
    ran.clear()
    found = backward_widths(model, [*images()], targets(), widths)
    assert ran == [*found] == sorted(widths or WIDTHS)
    assert model.backbone.width == 1.0
    for width, of_width in losses.items():
        assert found[width].keys() == of_width.keys()
        for name, loss in of_width.items():
            assert not found[width][name].requires_grad
            torch.testing.assert_close(found[width][name], loss, rtol=1e-12, atol=1e-12)
    result = gradients(model)
    assert result.keys() == expected.keys()
    assert ('backbone.body.bn1.w075.weight' in result) == (widths is None)
    for name, gradient in expected.items():
        torch.testing.assert_close(result[name], gradient, rtol=1e-9, atol=1e-12)


def test_scale_and_backward_of_ones_own():
    model = make_detector((1.0, 0.5)).train()
    seed_each_width(model)
    whole = backward_widths(model, [*images()], targets())
    expected = gradients(model)
    model.zero_grad()
    passed = []

    def backward(loss):
        passed.append(loss.detach())
        (2 * loss).backward()

    backward_widths(model, [*images()], targets(), scale=0.25, backward=backward)
    sums = [0.25 * sum(of_width.values()) for of_width in whole.values()]
    torch.testing.assert_close(passed, sums)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name] / 2, rtol=1e-9, atol=1e-12)


def test_training_needs_training_mode_and_a_slimmable_backbone():
    model = make_detector((1.0, 0.5))
    with pytest.raises(InputError, match=r'call model\.train\(\) first'):
        backward_widths(model.eval(), [*images()], targets())
    with pytest.raises(InputError, match=r'not one of this network'):
        backward_widths(model.train(), [*images()], targets(), widths=(0.3,))
    with pytest.raises(InputError, match='backbone of the model is a BackboneWithFPN'):
        backward_widths(extract_width(model, 0.5), [*images()], targets())


TWO = """
import copy, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from slimclr_hub.detection.torchvision_backbone import backward_widths
from slimclr_hub.detection.torchvision_coco import evaluate_widths
from tests.detection.test_torchvision import gradients, images, make_detector, seed_each_width, targets

dist.init_process_group('gloo')
rank = dist.get_rank()
model = make_detector((1.0, 0.5, 0.25)).train()
alone = copy.deepcopy(model)
mine = [images()[rank]], [targets()[rank]]
seed_each_width(alone)
backward_widths(alone, *mine)
expected = gradients(alone)
for gradient in expected.values():
    dist.all_reduce(gradient)
    gradient /= 2
seed_each_width(model)
wrapped = DistributedDataParallel(model, find_unused_parameters=True)
backward_widths(wrapped, *mine)
found = gradients(model)
assert found.keys() == expected.keys()
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)

truth = [{**target, 'image_id': i} for i, target in enumerate(targets())]
share = [([images()[0]], [truth[0]]), ([images()[rank]], [truth[rank]])]  # the first twice
found = evaluate_widths(wrapped, share)
dist.destroy_process_group()
assert found == evaluate_widths(model, [([*images()], truth)])
assert model.training
print('equal')
"""


def test_two_processes(tmp_path):
    """Gradients of all widths are the mean over processes, and precision is that of all images."""
    (tmp_path / 'two.py').write_text(TWO)
    processes = start_together(2, tmp_path / 'two.py', folder=tmp_path, variables=os.environ)
    end_well(*processes)
    assert [process.stdout for process in processes] == ['equal\n'] * 2


# One width as an ordinary detector


def assert_equal_detections(model, other, x):
    with torch.inference_mode():
        ours, theirs = model([*x]), other([*x])
    for a, b in zip(ours, theirs, strict=True):
        assert len(a['boxes']) > 0
        assert a.keys() == b.keys() == {'boxes', 'labels', 'scores', 'masks'}
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('width', WIDTHS)
def test_extracted_detector(width):
    model = make_detector(box_detections_per_img=4, box_score_thresh=-1.0).eval()
    plain = extract_width(model, width)
    with model.backbone.set_width(width):
        assert_equal_detections(model, plain, images())
    kinds = (SlimmableConv2d, SwitchableBatchNorm2d, InputSlicedConv2d, SlimmableBackboneWithFPN)
    assert not any(isinstance(module, kinds) for module in plain.modules())
    assert not plain.training
    assert isinstance(model.backbone, SlimmableBackboneWithFPN)
    with torch.no_grad():
        before = copy.deepcopy(model.state_dict())
        for parameter in plain.parameters():
            parameter.fill_(0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_extracted_resnet50_is_that_of_torchvision():
    """The state dict loads into torchvision's own detector, which then detects the same."""
    about = {'min_size': 48, 'box_detections_per_img': 4, 'box_score_thresh': -1.0, 'num_classes': 3}
    torch.manual_seed(0)
    model = slimmable_mask_rcnn(None, (1.0, 0.5), **about).double().eval()
    randomise_batchnorm(model)
    with torch.no_grad():
        for block in model.backbone.fpn.inner_blocks:
            block[0].weight.mul_(0.01)  # maps of random weights are large, and all boxes would leave the image
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, norm_layer=nn.BatchNorm2d, **about
    )
    theirs.double().eval().load_state_dict(extract_width(model, 1.0).state_dict())
    assert_equal_detections(model, theirs, images(1))


# Data and precision


def write_set(folder, count=2, size=64, val=2):
    """Write grey squares on noise in COCO's format, with gaps in the ids of its classes."""
    generator = np.random.default_rng(0)
    for split in 'train', 'val':
        (folder / split).mkdir(parents=True)
        pictures, annotations = [], []
        for i in range(count if split == 'train' else val):
            pixels = generator.integers(0, 120, (size, size), dtype=np.uint8)
            left = 8 + 4 * i
            pixels[10:50, left : left + 30] = 220
            Image.fromarray(pixels).save(folder / split / f'{i}.png')
            pictures.append({'id': 10 + i, 'file_name': f'{i}.png', 'height': size, 'width': size})
            corners = [left, 10, left + 30, 10, left + 30, 50, left, 50]
            about = {'image_id': 10 + i, 'category_id': 7, 'area': 1200, 'segmentation': [corners]}
            annotations.append({'id': 1 + 3 * i, 'bbox': [left, 10, 30, 40], 'iscrowd': 0, **about})
            annotations.append({'id': 2 + 3 * i, 'bbox': [left, 10, 30, 40], 'iscrowd': 1, **about})
            annotations.append({'id': 3 + 3 * i, 'bbox': [left, 10, 0, 40], 'iscrowd': 0, **about})
        classes = [{'id': 7, 'name': 'square'}, {'id': 3, 'name': 'circle'}]
        content = {'images': pictures, 'annotations': annotations, 'categories': classes}
        (folder / 'annotations').mkdir(exist_ok=True)
        (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return folder


def test_data_set_by_the_names_of_coco(tmp_path):
    expected = CocoInstances(write_set(tmp_path), 'val')
    (tmp_path / 'val').rename(tmp_path / 'val2017')
    (tmp_path / 'annotations' / 'val.json').rename(tmp_path / 'annotations' / 'instances_val2017.json')
    data = CocoInstances(tmp_path, 'val')
    assert len(data) == len(expected) == 2
    assert data[1][0].shape == (3, 64, 64)
    with pytest.raises(InputError, match=r'no annotations/instances_test2017\.json and no test2017 in .*test\.json'):
        CocoInstances(tmp_path, 'test')


@pytest.mark.parametrize('crowds', [False, True])
def test_data_set(tmp_path, crowds):
    data = CocoInstances(write_set(tmp_path), 'train', crowds=crowds)
    assert len(data) == 2
    assert data.names == ('circle', 'square')
    image, target = data[1]
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert image[:, 20, 20].tolist() == [220] * 3
    count = 2 if crowds else 1  # that without any area is left out
    assert target['boxes'].tolist() == [[12, 10, 42, 50]] * count
    assert target['labels'].tolist() == [2] * count
    assert target['iscrowd'].tolist() == [0, 1][:count]
    assert target['image_id'] == 11
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[10:50, 12:42] = 1
    assert all(torch.equal(mask, expected) for mask in target['masks'].as_subclass(torch.Tensor))


def test_data_set_that_is_not_one(tmp_path):
    with pytest.raises(InputError, match=r'annotations/train\.json and train$'):
        CocoInstances(tmp_path, 'train')
    folder = write_set(tmp_path / 'set')
    (folder / 'train' / '0.png').unlink()
    with pytest.raises(InputError, match=r'1 of 2 images are not in .*train: 0\.png'):
        CocoInstances(folder, 'train')
    (folder / 'train' / '0.png').write_text('no image')
    with pytest.raises(DataError, match=r'train/0\.png cannot be read'):
        CocoInstances(folder, 'train')[0]
    Image.new('L', (64, 32)).save(folder / 'train' / '0.png')
    with pytest.raises(DataError, match=r'train/0\.png is of 64 x 32 pixels, and annotations say 64 x 64; correct'):
        CocoInstances(folder, 'train')[0]


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda content: content['annotations'][1].pop('segmentation'), 'annotation 2 has no segmentation; each needs'),
        (lambda content: content['annotations'][0].pop('bbox'), 'annotation 1 has no bbox; each needs'),
        (
            lambda content: content['annotations'][0].update(category_id=9),
            'annotation 1 has the category_id 9, which is',
        ),
        (lambda content: content['images'][0].pop('file_name'), 'image 10 has no file_name; each needs id'),
        (lambda content: content['images'][0].pop('height'), 'image 10 has no height; each needs id'),
        (lambda content: content.pop('images'), "is not in COCO's format: KeyError 'images'"),
        (lambda content: content.pop('categories'), "is not in COCO's format: KeyError 'categories'"),
        (lambda content: content.update(categories=3), "is not in COCO's format: TypeError"),
    ],
)
def test_annotations_that_would_end_a_run(tmp_path, change, words):
    """Both of torchvision's data set and of MMDetection's."""
    folder = write_set(tmp_path / 'set')
    file = folder / 'annotations' / 'train.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    about = {'data_root': str(folder), 'ann_file': 'annotations/train.json', 'data_prefix': {'img': 'train/'}}
    classes, steps = {'classes': ('square', 'circle')}, [{'type': 'LoadAnnotations', 'with_mask': True}]
    for read in (
        lambda: CocoInstances(folder, 'train'),
        lambda: CocoFolder(**about, metainfo=classes, pipeline=steps).full_init(),
    ):
        with pytest.raises(InputError, match=words) as refused:
            read()
        assert '\n' not in str(refused.value)


@pytest.mark.parametrize('text', ['[]', '{"images": [', '3'])
def test_annotations_that_are_none(tmp_path, text):
    folder = write_set(tmp_path / 'set')
    (folder / 'annotations' / 'train.json').write_text(text)
    with pytest.raises(InputError, match=r"train\.json is not in COCO's format: "):
        CocoInstances(folder, 'train')


class Scripted(nn.Module):
    """Detector with given detections at each width, whatever the image."""

    def __init__(self, found):
        super().__init__()
        self.backbone = make_backbone()
        self.found = found

    def forward(self, images):
        return [self.found[self.backbone.width][round(image.mean().item())] for image in images]


def squares(*lefts):
    """Return squares of ten pixels in a detector's form, the first with the highest score."""
    masks = torch.zeros(len(lefts), 1, 32, 48)
    for mask, left in zip(masks, lefts, strict=True):
        mask[0, 5:15, left : left + 10] = 1
    boxes = torch.tensor([[left, 5, left + 10, 15] for left in lefts], dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.9, 0.5, len(lefts))
    return {'boxes': boxes, 'labels': torch.ones(len(lefts), dtype=torch.int64), 'scores': scores, 'masks': masks}


def test_average_precision():
    """AP has closed forms if all are found, one of two, all of them two pixels beside (IoU 2/3), and none."""
    lefts = [(0, 30), (4, 20)]
    found = {
        1.0: [squares(*of_image) for of_image in lefts],
        0.75: [squares(of_image[0]) for of_image in lefts],
        0.5: [squares(*(left + 2 for left in of_image)) for of_image in lefts],
        0.25: [squares() for _ in lefts],
    }
    batches = []
    for i, of_image in enumerate(lefts):
        truth = {**squares(*of_image), 'image_id': i}
        del truth['scores']
        batches.append(([torch.full((3, 32, 48), float(i))], [{**truth, 'masks': truth['masks'].squeeze(1)}]))
    model = Scripted(found).train()
    result = evaluate_widths(model, batches)
    assert model.training
    assert model.backbone.width == 1.0
    assert [*result] == [1.0, 0.75, 0.5, 0.25]
    for kind in 'bbox', 'segm':
        values = {w: [of[f'{kind}/{name}'] for name in ('AP', 'AP50', 'AP75')] for w, of in result.items()}
        assert values[1.0] == pytest.approx([1, 1, 1])
        assert values[0.75] == pytest.approx([51 / 101] * 3)  # at 51 of 101 recalls
        assert values[0.5] == pytest.approx([0.4, 1, 0])  # of the thresholds 0.5, 0.55, ..., 0.95 the first four
        assert values[0.25] == pytest.approx([0, 0, 0])
    assert [*evaluate_widths(model, batches, (0.25,))] == [0.25]


def test_average_precision_leaves_crowds_out():
    """A crowd counts neither if it is found, nor how often, nor if it is missed."""
    batch = [torch.zeros(3, 32, 48)]
    truth = {**squares(0, 30), 'image_id': 4, 'iscrowd': torch.tensor([0, 1])}
    truth['masks'] = truth['masks'].squeeze(1)
    found = {width: [squares(0, *[30] * i)] for i, width in enumerate(WIDTHS)}
    result = evaluate_widths(Scripted(found), [(batch, [truth])])
    assert all(value == pytest.approx(1) for of_width in result.values() for value in of_width.values())


# The script


def start(folder, *arguments):
    variables = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}
    return Script(SCRIPT, *arguments, folder=folder, variables=variables)


def test_script(tmp_path):
    """A step, from weights to a table and a file that opens."""
    folder = write_set(tmp_path / 'data', val=1)
    trained = save_small(tmp_path / 'network')
    options = {
        'data': folder,
        'weights': tmp_path / 'network',
        'name': 'slimclr_resnet20',
        'widths': '1.0,0.25',
        'epochs': 1,
        'min-size': 32,
        'workers': 0,
        'out': tmp_path / 'out',
    }
    finished = start(tmp_path, *(word for name, value in options.items() for word in (f'--{name}', value)))
    assert finished.end() == 0, finished.stderr
    assert 'Backbone weights from' in finished.stderr
    assert '1/1' in finished.stderr
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in finished.stdout.splitlines()]
    metrics = [f'{kind} AP{threshold}' for kind in ('box', 'mask') for threshold in ('', 50, 75)]
    table = rows[rows.index(['width', 'backbone', *metrics]) :]
    assert [row[0] for row in table[2:4]] == ['1', '0.25']
    assert all(0 <= float(cell) <= 100 for row in table[2:4] for cell in row[2:])
    model = slimmable_mask_rcnn(None, (1.0, 0.25), 3, 'slimclr_resnet20')
    model.load_state_dict(load_file(tmp_path / 'out' / 'model.safetensors'))
    for key in 'w100', 'w025':
        norm = model.backbone.body.layer3[2].bn2[key]
        assert norm.num_batches_tracked == 9 + 1
        assert not torch.equal(norm.weight, trained.layer3[2].bn2[key].weight)


def test_script_says_what_is_missing(tmp_path):
    finished = start(tmp_path, '--data', tmp_path / 'nothing')
    assert finished.end() == 2
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith('error: '))
    assert 'nothing; a data set other than COCO 2017 has annotations/train.json and train' in line
    for option in '--epochs', '--batch-size', '--min-size':
        refused = start(tmp_path, '--data', tmp_path / 'nothing', option, 0)
        assert refused.end() == 2
        assert 'Traceback' not in refused.stderr


def test_script_names_an_image_that_a_worker_cannot_read(tmp_path):
    folder = write_set(tmp_path / 'data', val=1)
    (folder / 'train' / '1.png').write_text('no image')
    options = ['--data', folder, '--name', 'slimclr_resnet20', '--min-size', 32, '--workers', 1, '--widths', '1.0']
    finished = start(tmp_path, *options)
    assert finished.end() == 2
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith('error: '))
    assert 'train/1.png cannot be read' in line
    assert 'Traceback' not in finished.stderr
