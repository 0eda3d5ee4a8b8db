"""Networks exported to ONNX and `.pt2`, run by onnxruntime and by PyTorch without the network."""

import resource
import sys
import zipfile
from math import prod
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.hub.export import export_onnx, export_pt2
from slimclr_hub.hub.export.onnx import DEFAULT_OPSET
from slimclr_hub.models import DEFAULT_WIDTHS
from tests.networks import randomise_batchnorm
from tests.scripts import Script, end_well

WIDTHS = DEFAULT_WIDTHS
SHALLOW = {'layers': (1, 1, 1)}  # as quick to export as can be


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{'num_classes': 10, **kwargs})
    randomise_batchnorm(model)
    return model.eval()


def images(batch=2, size=32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def run_onnx(path, x, output='logits'):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run([output], {'pixel_values': x.numpy()})[0])


def run_pt2(path, x):
    with torch.no_grad():
        return torch.export.load(path).module()(x)


def assert_computes(run, expected):
    """A batch size that export has not looked at."""
    with torch.no_grad():
        torch.testing.assert_close(run, expected, rtol=1e-4, atol=1e-5)


# What the files compute


@pytest.mark.parametrize('width', WIDTHS)
def test_onnx_at_each_width(tmp_path, width):
    model, path = make(width=width, **SHALLOW), tmp_path / 'network.onnx'
    assert export_onnx(model, path, size=32).difference < 1e-5
    assert_computes(run_onnx(path, images(5)), model.forward_at(images(5), width))
    assert onnx.load(path).opset_import[0].version == DEFAULT_OPSET


@pytest.mark.parametrize('width', WIDTHS)
def test_pt2_at_each_width(tmp_path, width):
    model, path = make(width=width, **SHALLOW), tmp_path / 'network.pt2'
    assert export_pt2(model, path, size=32).difference < 1e-5
    assert_computes(run_pt2(path, images(5)), model.forward_at(images(5), width))


def test_resnet50_without_head(tmp_path):
    model, x = make('slimclr_resnet50', width=0.25, num_classes=0, layers=(1,) * 4), images(4, 64)
    assert export_onnx(model, tmp_path / 'network.onnx', size=64).difference < 1e-4
    assert export_pt2(model, tmp_path / 'network.pt2', size=64).difference < 1e-4
    assert run_onnx(tmp_path / 'network.onnx', x, 'features').shape == (4, 512)
    assert_computes(run_onnx(tmp_path / 'network.onnx', x, 'features'), model(x))
    assert_computes(run_pt2(tmp_path / 'network.pt2', x), model(x))


def test_dense_network(tmp_path):
    """Whatever it has been set to: the file is that of eval mode."""
    model = make(in_chans=1, **SHALLOW).extract(0.5)
    x, expected = images(4, channels=1), model(images(4, channels=1))
    model = model.train().to(memory_format=torch.channels_last)
    model.set_grad_checkpointing()
    assert export_onnx(model, tmp_path / 'network.onnx', size=32).difference < 1e-5
    assert export_pt2(model, tmp_path / 'network.pt2', size=32).difference < 1e-5
    assert_computes(run_onnx(tmp_path / 'network.onnx', x), expected)
    assert_computes(run_pt2(tmp_path / 'network.pt2', x), expected)
    assert model.training
    assert model.grad_checkpointing


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return x.mean((1, 2, 3)) * self.factor


def test_any_module(tmp_path):
    """Without `num_classes` the output is `features`; the file is in float32."""
    assert export_onnx(Scaled(), tmp_path / 'network.onnx', size=8).difference < 1e-6
    assert_computes(run_onnx(tmp_path / 'network.onnx', images(2, 8), 'features'), images(2, 8).mean((1, 2, 3)) * 0.3)


def test_a_full_disk_ends_no_process(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            export_pt2(Scaled(), tmp_path / 'network.pt2', size=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(('export', 'name'), [(export_onnx, 'network.onnx'), (export_pt2, 'network.pt2')])
def test_the_network_stays_as_it_is(tmp_path, export, name):
    model = make(width=0.5, **SHALLOW).half().train()
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    export(model, tmp_path / name, size=32)
    assert model.width == 0.5
    assert all(module.training for module in model.modules())
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[key][0]
        assert torch.equal(tensor, before[key][1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize(('export', 'name'), [(export_onnx, 'network.onnx'), (export_pt2, 'network.pt2')])
def test_network_on_a_gpu(tmp_path, export, name):
    model = make(width=0.5).cuda()
    assert export(model, tmp_path / name, size=32).difference < 1e-5
    assert model.conv1.weight.is_cuda
    run = run_onnx if name.endswith('.onnx') else run_pt2
    assert_computes(run(tmp_path / name, images(4)), model.cpu()(images(4)))


# The files themselves


def test_onnx_file(tmp_path):
    """One file, with a free batch size, the operator set asked for and no path of this machine."""
    model = make(width=0.25, **SHALLOW)
    export_onnx(model, tmp_path / 'new' / 'network.onnx', size=32, opset=20)
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'network.onnx']
    file = onnx.load(tmp_path / 'new' / 'network.onnx', load_external_data=False)
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [('', 20)]
    assert not any(tensor.external_data for tensor in file.graph.initializer)
    for value, name, shape in (file.graph.input, 'pixel_values', (3, 32, 32)), (file.graph.output, 'logits', (10,)):
        assert [tensor.name for tensor in value] == [name]
        batch, *rest = value[0].type.tensor_type.shape.dim
        assert batch.dim_param
        assert not batch.dim_value
        assert tuple(n.dim_value for n in rest) == shape
    held = sum(parameter.numel() for parameter in model.extract(0.25).parameters())
    assert sum(prod(tensor.dims) for tensor in file.graph.initializer) <= held  # nothing of other widths
    assert 'site-packages' not in str(file)
    assert str(Path(__file__).parents[2]) not in str(file)


def test_pt2_file(tmp_path):
    export_pt2(make(width=0.25, **SHALLOW), tmp_path / 'new' / 'network.pt2', size=32)
    assert [path.name for path in tmp_path.rglob('*')] == ['new', 'network.pt2']
    with zipfile.ZipFile(tmp_path / 'new' / 'network.pt2') as archive:
        content = b''.join(archive.read(name) for name in archive.namelist())
    assert b'conv1' in content
    assert b'site-packages' not in content
    assert str(Path(__file__).parents[2]).encode() not in content


QUIET = """
import logging
from pathlib import Path
import timm, torch
import slimclr_hub
from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.hub.export import export_onnx, export_pt2
logging.basicConfig(level=logging.DEBUG)
logging.getLogger('mine').setLevel(logging.INFO)
model = timm.create_model('slimclr_resnet20', width=0.25, layers=(1, 1, 1))
export_onnx(model, Path('network.onnx'), size=32)
export_pt2(model, Path('network.pt2'), size=32)

class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))

try:
    export_onnx(Mean(), Path('old.onnx'), size=32, opset=17)  # the exporter would log a traceback and write 18
except InputError as error:
    print(error)
logging.getLogger('mine').info('still here')
"""


def test_nothing_is_printed(tmp_path):
    """Not even by exporters that log; logging works on afterwards."""
    script = Script(QUIET, folder=tmp_path)
    assert end_well(script).startswith('opset 17 cannot be written')
    assert len(script.stdout.splitlines()) == 1
    assert script.stderr == 'INFO:mine:still here\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['network.onnx', 'network.pt2']


# What goes wrong


class Unfaithful(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) + (0.01 if torch.compiler.is_compiling() else 0.0)


class Broken(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * float('nan')


@pytest.mark.parametrize(('export', 'name'), [(export_onnx, 'network.onnx'), (export_pt2, 'network.pt2')])
@pytest.mark.parametrize(('module', 'difference'), [(Unfaithful, r'0\.01'), (Broken, 'nan')])
def test_a_file_that_differs_is_not_kept(tmp_path, export, name, module, difference):
    (tmp_path / name).write_text('an older file')
    with pytest.raises(ExportError, match=rf'{name} was not written.* by {difference} on a batch of 1'):
        export(module(), tmp_path / name, size=8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, 'an older file')]


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
def test_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'needs {package}\b.*pip install "slimclr-hub\[export\]"'):
        export_onnx(make(), tmp_path / 'network.onnx', size=32)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('export', 'name', 'size', 'message'),
    [
        (export_onnx, 'network.pt2', 32, r'network\.pt2 does not end in \.onnx'),
        (export_pt2, 'network.pth', 32, r'network\.pth does not end in \.pt2'),
        (export_onnx, 'network.onnx', 0, 'size 0 is not from 1 to 4096'),
        (export_pt2, 'network.pt2', 99_999_999, 'size 99999999 is not from 1 to 4096'),
    ],
)
def test_wrong_arguments(tmp_path, export, name, size, message):
    with pytest.raises(InputError, match=message):
        export(make(), tmp_path / name, size=size)
    assert not any(tmp_path.iterdir())


def test_network_of_several_outputs(tmp_path):
    with pytest.raises(InputError, match='returns a list'):
        export_pt2(timm.create_model('slimclr_resnet20', features_only=True), tmp_path / 'network.pt2', size=32)
