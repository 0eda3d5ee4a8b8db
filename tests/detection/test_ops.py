"""mmcv's operators by torchvision: against loops over the definitions, and against the compiled ones if there are any.

The tests through `mmcv.ops` hold for both kinds. What only the stand-in does is asked of its own functions, or in
a process in which `mmcv._ext` cannot be imported.
"""

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch

from slimclr_hub.detection import ops
from slimclr_hub.errors import InputError

SIZE = (2, 3, 7, 9)  # [N, C, H, W]
SCALE = 0.25  # as of the first level of an FPN, and exact
# index, x1, y1, x2, y2: inside; over the right and lower border; wholly outside; thinner than a pixel; without an area
ROIS = [[0, 3.3, 5.1, 20.7, 17.9], [1, 22, 14, 55, 47], [1, 80, 80, 99, 90], [0, 9.5, 2, 10.25, 27], [1, 8, 8, 8, 8]]


@pytest.fixture(scope='module')
def mmcv_ops():
    ops.install_ops()
    return importlib.import_module('mmcv.ops')


@pytest.fixture(scope='module')
def compiled():
    if ops.install_ops() != 'compiled':
        pytest.skip(f'mmcv is not compiled; to compile it: {ops.build_command()}')
    return importlib.import_module('mmcv._ext')


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, count, 2, generator=generator) * 20
    size = size + 10
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)  # no two alike
    return torch.cat([corner, corner + size], dim=1), scores


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def greedy(boxes, scores, threshold, groups=None):
    """Return indices of boxes that no better kept box of the same group overlaps by more than the threshold."""
    boxes, scores = boxes.tolist(), scores.tolist()
    groups = [0] * len(boxes) if groups is None else groups.tolist()
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(groups[i] != groups[j] or iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.7])
def test_nms_is_greedy(mmcv_ops, threshold):
    boxes, scores = random_boxes(80, seed=0)
    kept = greedy(boxes, scores, threshold)
    assert 1 < len(kept) < 79
    detections, indices = mmcv_ops.nms(boxes, scores, threshold)
    assert indices.tolist() == kept
    torch.testing.assert_close(detections, torch.cat([boxes, scores[:, None]], dim=1)[kept], rtol=0, atol=0)


def test_nms_of_scores_above_a_threshold(mmcv_ops):
    boxes, scores = random_boxes(80, seed=1)
    kept = [i for i in greedy(boxes, scores, 0.5) if scores[i] > 0.4]
    assert len(kept) > 7
    assert mmcv_ops.nms(boxes, scores, 0.5, score_threshold=0.4)[1].tolist() == kept
    assert mmcv_ops.nms(boxes, scores, 0.5, score_threshold=0.4, max_num=7)[1].tolist() == kept[:7]
    assert mmcv_ops.nms(boxes, scores, 0.5, score_threshold=1.0)[1].tolist() == []


@pytest.mark.parametrize('split', [10000, 10])
def test_batched_nms_as_mmdet_calls_it(mmcv_ops, split):
    boxes, scores = random_boxes(60, seed=2)
    classes = torch.arange(60) % 3
    kept = greedy(boxes, scores, 0.5, classes)
    assert len(kept) > len(greedy(boxes, scores, 0.5))
    detections, indices = mmcv_ops.batched_nms(
        boxes, scores, classes, {'type': 'nms', 'iou_threshold': 0.5, 'split_thr': split}
    )
    assert indices.tolist() == kept
    torch.testing.assert_close(detections, torch.cat([boxes, scores[:, None]], dim=1)[kept], rtol=0, atol=0)


def test_an_iou_of_the_threshold_keeps_both(mmcv_ops):
    """The compiled operator compares in float32, where 3/10 is not greater than 0.3; in float64 it would be."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [7, 0, 10, 1]])
    assert mmcv_ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.3)[1].tolist() == [0, 1]


def bilinear(x, y, height, width):
    """Return {(row, column): weight} of a point; beyond one pixel outside it counts for nothing."""
    if not (-1 <= y <= height and -1 <= x <= width):
        return {}
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    weights: dict[tuple[int, int], float] = {}
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            if weight > 0:
                weights[row, column] = weight
    return weights


def roi_weights(roi, height, width, cells, sampling_ratio, aligned):
    """Yield (cell's row, cell's column, row, column, weight) for every pixel in a mean of the region."""
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (SCALE * side - shift for side in roi)
    extent_x, extent_y = x2 - x1, y2 - y1
    if not aligned:
        extent_x, extent_y = max(extent_x, 1.0), max(extent_y, 1.0)
    step_x, step_y = extent_x / cells[1], extent_y / cells[0]
    points_x, points_y = (sampling_ratio or math.ceil(step) for step in (step_x, step_y))
    for i in range(cells[0]):
        for j in range(cells[1]):
            for a in range(points_y):
                for b in range(points_x):
                    y, x = y1 + (i + (a + 0.5) / points_y) * step_y, x1 + (j + (b + 0.5) / points_x) * step_x
                    for (row, column), weight in bilinear(x, y, height, width).items():
                        yield i, j, row, column, weight / (points_x * points_y)


@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_is_a_mean_of_interpolated_points(mmcv_ops, aligned, sampling_ratio):
    torch.manual_seed(0)
    cells = (2, 3)
    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    gradient = torch.randn(len(ROIS), SIZE[1], *cells, dtype=torch.float64)
    expected, expected_gradient = torch.zeros_like(gradient), torch.zeros_like(x)
    for k, (image, *roi) in enumerate(ROIS):
        for i, j, row, column, weight in roi_weights(roi, *SIZE[2:], cells, sampling_ratio, aligned):
            expected[k, :, i, j] += weight * x.detach()[int(image), :, row, column]
            expected_gradient[int(image), :, row, column] += weight * gradient[k, :, i, j]

    layer = mmcv_ops.RoIAlign(cells, SCALE, sampling_ratio, aligned=aligned)
    output = layer(x, rois)
    output.backward(gradient)
    assert expected[0].abs().min() > 0
    assert expected[2].abs().max() == 0
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_gradient, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: layer(x, rois), x)


def test_roi_align_without_regions(mmcv_ops):
    x = torch.randn(SIZE, requires_grad=True)
    output = mmcv_ops.RoIAlign(2, SCALE)(x, torch.zeros(0, 5))
    assert output.shape == (0, 3, 2, 2)
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(SIZE))


def pooled(extension, x, rois, gradient, sampling_ratio, aligned):
    """Return output and gradient of an extension's RoIAlign by the calls of mmcv.ops.roi_align."""
    options = dict(
        aligned_height=gradient.shape[2],
        aligned_width=gradient.shape[3],
        spatial_scale=SCALE,
        sampling_ratio=sampling_ratio,
        pool_mode=1,
        aligned=aligned,
    )
    output, grad_input, unused = torch.zeros_like(gradient), torch.zeros_like(x), x.new_zeros(0)
    extension.roi_align_forward(x, rois, output, unused, unused, **options)
    extension.roi_align_backward(gradient, rois, unused, unused, grad_input, **options)
    return output, grad_input


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_in_mixed_precision(dtype):
    """Input and output have half precision, the computation float32."""
    torch.manual_seed(0)
    arguments = [torch.randn(SIZE).to(dtype), torch.tensor(ROIS).to(dtype), torch.randn(len(ROIS), 3, 2, 2).to(dtype)]
    for result, wide in zip(
        pooled(ops, *arguments, 0, True), pooled(ops, *(x.float() for x in arguments), 0, True), strict=True
    ):
        assert result.dtype == dtype
        assert result.abs().max() > 0
        torch.testing.assert_close(result, wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize('seed', range(5))
def test_nms_equals_the_compiled_one(compiled, seed):
    boxes, scores = random_boxes(300, seed)
    for threshold in (0.1, 0.3, 0.5, 0.7):
        kept = ops.nms(boxes, scores, threshold, 0)
        assert kept.tolist() == compiled.nms(boxes, scores, threshold, 0).tolist()
        assert 0 < len(kept) < 300


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_equals_the_compiled_one(compiled, aligned, sampling_ratio, dtype):
    torch.manual_seed(0)
    corners = random_boxes(40, seed=3)[0].to(dtype)
    random_rois = torch.cat([torch.randint(2, (40, 1)).to(dtype), corners], dim=1)
    rois = torch.cat([torch.tensor(ROIS, dtype=dtype), random_rois])
    arguments = torch.randn(SIZE, dtype=dtype), rois, torch.randn(len(rois), 3, 7, 7, dtype=dtype)
    for result, expected in zip(
        pooled(ops, *arguments, sampling_ratio, aligned),
        pooled(compiled, *arguments, sampling_ratio, aligned),
        strict=True,
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_what_torchvision_cannot_do():
    with pytest.raises(InputError, match=r'offset=1.*mmcv==2\.1\.0'):
        ops.nms(*random_boxes(3, seed=0), 0.5, 1)
    x = torch.zeros(1)
    options = dict(aligned_height=1, aligned_width=1, spatial_scale=1.0, sampling_ratio=0, pool_mode=0, aligned=True)
    for operator in (ops.roi_align_forward, ops.roi_align_backward):
        with pytest.raises(InputError, match=r"pool_mode='max'.*mmcv==2\.1\.0"):
            operator(x, x, x, x, x, **options)


WITHOUT_COMPILED = """
import importlib.util, json, sys
sys.modules['mmcv._ext'] = None  # not importable, compiled or not
sys.modules['transformers'] = None  # whose optimizers mmengine would import for seconds
from slimclr_hub.detection.ops import install_ops
from slimclr_hub.errors import InputError
told = {'installed': install_ops(), 'early': sorted(m for m in sys.modules if m.startswith(('mmcv.ops', 'mmdet')))}

import torch, mmcv, mmcv._ext, mmcv.ops, mmcv.utils, mmdet.models
extension = mmcv._ext
told['again'] = [install_ops(), mmcv._ext is extension, sys.modules['mmcv._ext'] is extension]
told['bound'] = sys.modules['mmcv.ops.nms'].ext_module is extension
told['dunder'] = [hasattr(extension, name) for name in ('__path__', '__file__', '__wrapped__', '_ipython_display_')]
told['spec'] = importlib.util.find_spec('mmcv._ext').name
told['compiler'] = mmcv.utils.collect_env()['MMCV Compiler']

from mmdet.registry import MODELS
extractor = MODELS.build(dict(
    type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    out_channels=2, featmap_strides=[4, 8],
))
features = [torch.randn(1, 2, size, size, requires_grad=True) for size in (16, 8)]
output = extractor(features, torch.tensor([[0., 0, 0, 30, 30], [0, 0, 0, 200, 200]]))
output.sum().backward()
told['extractor'] = [list(output.shape), [bool(f.grad.abs().sum() > 0) for f in features]]

x = torch.zeros(1, 1, 4, 4)
try:
    mmcv.ops.deform_conv2d(x, torch.zeros(1, 18, 4, 4), torch.zeros(1, 1, 3, 3), 1, 1)
except InputError as error:
    told['deform'] = str(error)
try:
    mmcv.ops.soft_nms(torch.rand(2, 4), torch.rand(2))
except InputError as error:
    told['soft'] = str(error)
print(json.dumps(told))
"""


def test_mmdet_without_compiled_operators():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT_COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told['installed'] == 'torchvision'
    assert told['early'] == []
    assert told['again'] == ['torchvision', True, True]
    assert told['bound']
    assert told['dunder'] == [False] * 4
    assert told['spec'] == 'mmcv._ext'
    assert 'not compiled' in told['compiler']
    assert told['extractor'] == [[2, 2, 7, 7], [True, True]]
    for key, name in ('deform', 'deform_conv_forward'), ('soft', 'softnms'):
        assert f"'{name}'" in told[key]
        assert ops.build_command() in told[key]


def test_operators_compiled_for_another_torch(tmp_path):
    """A file that does not load is reported, and torchvision stands in."""
    suffix = '.abi3.so' if sys.platform != 'win32' else '.pyd'
    (tmp_path / f'_ext{suffix}').write_bytes(b'of another torch')
    code = (
        f'import mmcv; mmcv.__path__.insert(0, {str(tmp_path)!r})\n'
        'from slimclr_hub.detection.ops import install_ops\n'
        'print(install_ops())'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['torchvision']
    assert 'compiled operators of mmcv do not load' in done.stderr


def test_mmcv_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(InputError, match=r'needs mmcv, which .*pip install "slimclr-hub\[transfer\]"'):
        ops.install_ops()


def test_how_to_compile_the_fork(monkeypatch, tmp_path):
    """Upstream's mmcv over the fork's would break it."""
    assert 'mmcv==2.1.0' in ops.build_command()
    about = tmp_path / 'onedl_mmcv-2.3.6.dist-info'
    about.mkdir()
    (about / 'METADATA').write_text('Metadata-Version: 2.1\nName: onedl-mmcv\nVersion: 2.3.6\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r'compile mmcv.*--no-build-isolation.* onedl-mmcv\)$') as raised:
        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, offset=1)
    assert 'mmcv==' not in str(raised.value)
