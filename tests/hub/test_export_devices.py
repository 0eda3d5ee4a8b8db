"""Networks for OpenVINO, ExecuTorch and LiteRT, and in int8, each run in its own runtime."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import onnx
import onnxruntime
import openvino
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from executorch.runtime import Runtime
from torch import nn

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.hub.export import (
    Calibration,
    export_executorch,
    export_litert,
    export_network,
    export_onnx,
    export_openvino,
)
from tests.hub.files import small_network

SHALLOW = {'layers': (1, 1, 1), 'num_classes': 10}  # as quick to export as can be
WIDTHS = (1.0, 0.25)
SIZE = 16


@pytest.fixture(scope='module')
def model():
    model = small_network(**SHALLOW)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': list('abcdefghij'), 'num_classes': 10}
    return model


def images(count=3, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def calibration():
    return Calibration(images(32, 2), images(24, 3), least=0.9)


def run_pte(program, method, x):
    loaded = program.load_method(method)
    return torch.cat([loaded.execute([image])[0].clone() for image in x.split(1)])


def run_openvino(path, x):
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return torch.from_numpy(compiled({'pixel_values': x.numpy()})['logits'])


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'pixel_values': x.numpy()})[0])


def expected(model, width, x):
    with torch.no_grad():
        return model.forward_at(x, width)


def assert_similar(found, wanted, exported):
    """What int8 computes, by the measure that was reported."""
    cosine = torch.cosine_similarity(found, wanted).mean().item()
    assert cosine > 0.98
    assert exported.cosine is not None
    assert exported.cosine > 0.98
    assert not torch.equal(found, wanted)


def test_executorch_has_a_method_for_each_width(model, tmp_path):
    path = tmp_path / 'net.pte'
    exported = export_executorch(model, path, size=SIZE, widths=WIDTHS)
    assert [(file.width, file.path, file.beside) for file in exported] == [(width, path, ()) for width in WIDTHS]
    assert all(file.difference < 1e-4 for file in exported)
    program = Runtime.get().load_program(path)
    assert program.method_names == {'w100', 'w025', 'slimclr_hub'}
    for width, method in zip(WIDTHS, ('w100', 'w025'), strict=True):
        torch.testing.assert_close(
            run_pte(program, method, images()), expected(model, width, images()), rtol=0, atol=1e-4
        )
    (text,) = program.load_method('slimclr_hub').execute([])
    about = json.loads(text)
    assert about['widths'] == list(WIDTHS)
    assert about['input_size'] == [3, SIZE, SIZE]
    assert about['label_names'] == list('abcdefghij')
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


EXPORT_LITERT = """
import sys
from pathlib import Path
import torch
from slimclr_hub.hub.export import export_network

model = torch.load(sys.argv[1], weights_only=False)
for file in export_network(model, Path(sys.argv[2]), 'litert', size=16, widths=[1.0, 0.25]):
    print(file.width, file.path, file.difference < 1e-4)
"""


def test_litert_has_a_signature_for_each_width(model, tmp_path):
    """In a process of its own, as the converter starts threads of JAX, after which no process should fork."""
    torch.save(model, tmp_path / 'model.pth')
    command = [sys.executable, '-c', EXPORT_LITERT, tmp_path / 'model.pth', tmp_path / 'out']
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    path = tmp_path / 'out' / 'slimclr_resnet20.tflite'
    assert printed.splitlines() == [f'{width} {path} True' for width in WIDTHS]
    interpreter = Interpreter(model_path=str(path))
    assert interpreter.get_signature_list().keys() == {'w100', 'w025'}
    for width, signature in zip(WIDTHS, ('w100', 'w025'), strict=True):
        runner = interpreter.get_signature_runner(signature)
        found = [torch.from_numpy(runner(pixel_values=x.numpy())['logits']) for x in images().split(1)]
        torch.testing.assert_close(torch.cat(found), expected(model, width, images()), rtol=0, atol=1e-4)
    about = json.loads(ZipFile(path).read('slimclr_hub.json'))
    assert about['widths'] == list(WIDTHS)
    assert about['label_names'] == list('abcdefghij')


def test_openvino(model, tmp_path):
    (exported,) = export_network(model, tmp_path, 'openvino', size=SIZE, widths=[0.5])
    assert exported.path == tmp_path / 'slimclr_resnet20_w050.xml'
    assert exported.beside == (tmp_path / 'slimclr_resnet20_w050.bin',)
    assert {path.name for path in tmp_path.iterdir()} == {exported.path.name, exported.beside[0].name}
    assert exported.difference < 1e-4
    for count in (1, 5):
        torch.testing.assert_close(
            run_openvino(exported.path, images(count)), expected(model, 0.5, images(count)), rtol=0, atol=1e-4
        )
    about = json.loads(openvino.Core().read_model(exported.path).get_rt_info(['slimclr_hub']).value)
    assert about['mean'] == list(model.pretrained_cfg['mean'])
    assert about['label_names'][9] == 'j'


# int8


def test_int8_onnx(model, calibration, tmp_path):
    (exported,) = export_network(model, tmp_path, 'onnx', size=SIZE, widths=[0.5], calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ['slimclr_resnet20_int8_w050.onnx']
    x = calibration.held_out
    found, wanted = run_onnx(exported.path, x), expected(model, 0.5, x)
    assert_similar(found, wanted, exported)
    assert exported.agreement == pytest.approx((found.argmax(1) == wanted.argmax(1)).float().mean().item())
    file = onnx.load(exported.path)
    assert {'QuantizeLinear', 'DequantizeLinear'} <= {node.op_type for node in file.graph.node}
    assert max(len(t.raw_data) for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8) > 1000
    assert json.loads({entry.key: entry.value for entry in file.metadata_props}['slimclr_hub'])['widths'] == [0.5]


def test_int8_executorch(model, calibration, tmp_path):
    (exported,) = export_executorch(model, tmp_path / 'net.pte', size=SIZE, widths=[0.25], calibration=calibration)
    program = Runtime.get().load_program(exported.path)
    wanted = expected(model, 0.25, calibration.held_out)
    assert_similar(run_pte(program, 'w025', calibration.held_out), wanted, exported)


def test_int8_openvino(model, calibration, tmp_path):
    with model.set_width(0.25):
        exported = export_openvino(model, tmp_path / 'net.xml', size=SIZE, calibration=calibration)
    wanted = expected(model, 0.25, calibration.held_out)
    assert_similar(run_openvino(exported.path, calibration.held_out), wanted, exported)
    assert exported.beside[0].stat().st_size < 4 * sum(p.numel() for p in model.extract(0.25).parameters()) / 2


def test_int8_below_the_bound_is_not_written(model, calibration, tmp_path):
    strict = Calibration(calibration.images, calibration.held_out, least=1.0)
    with (
        model.set_width(0.25),
        pytest.raises(ExportError, match=r'in int8 its logits .* than 1;.*--least-cosine'),
    ):
        export_onnx(model, tmp_path / 'net.onnx', size=SIZE, calibration=strict)
    assert [*tmp_path.iterdir()] == []


# What goes wrong


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_a_full_disk(tmp_path):
    """OpenVINO's own writer has another error than Python's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'net\.xml cannot be written'):
            export_openvino(Mean(), tmp_path / 'net.xml', size=SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ('format', 'module', 'extra'),
    [
        ('openvino', 'openvino', 'openvino'),
        ('openvino', 'nncf', 'openvino'),
        ('executorch', 'executorch.exir', 'executorch'),
        ('onnx', 'onnxruntime', 'export'),
        ('litert', 'litert_torch', 'litert'),
    ],
)
def test_missing_package(model, calibration, tmp_path, monkeypatch, format, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'needs {module}\b.*pip install "slimclr-hub\[{extra}\]"'):
        export_network(model, tmp_path, format, size=SIZE, calibration=None if format == 'litert' else calibration)
    assert [*tmp_path.iterdir()] == []


def test_format_without_int8(model, calibration, tmp_path):
    with pytest.raises(InputError, match='pt2 is not one of onnx, openvino, executorch, which int8 has'):
        export_network(model, tmp_path, 'pt2', calibration=calibration)


@pytest.mark.parametrize(
    ('export', 'suffix'), [(export_openvino, '.xml'), (export_executorch, '.pte'), (export_litert, '.tflite')]
)
def test_wrong_ending(model, tmp_path, export, suffix):
    with pytest.raises(InputError, match=rf'net\.txt does not end in \{suffix}'):
        export(model, tmp_path / 'net.txt', size=SIZE)
