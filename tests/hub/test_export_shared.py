"""Graphs of several widths over one file of weights, run by onnxruntime."""

import json

import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.hub.export import export_network, export_onnx, export_shared_onnx
from slimclr_hub.models.layers import SlimmableConv2d
from tests.hub.files import small_network

SHALLOW = {'layers': (1, 1, 1), 'num_classes': 10}  # as quick to export as can be


@pytest.fixture(scope='module')
def model():
    return small_network(**SHALLOW)


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """Folder of four graphs and their weights."""
    folder = tmp_path_factory.mktemp('shared')
    exported = export_shared_onnx(model, folder, 'net', size=32)
    assert [file.width for file in exported] == [1.0, 0.75, 0.5, 0.25]
    assert all(file.difference < 1e-4 for file in exported)
    assert all(file.beside == (folder / 'net.onnx.data',) for file in exported)
    return folder


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'pixel_values': x.numpy()})[0])


def described(path):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return json.loads(session.get_modelmeta().custom_metadata_map['slimclr_hub'])


def images(batch=5, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def end_of_data(graph):
    """Where the last weights of a graph end in the file."""
    infos = [ExternalDataInfo(tensor) for tensor in graph.graph.initializer if tensor.external_data]
    return max(info.offset + info.length for info in infos)


def test_each_width_computes(model, files):
    for width in model.widths:
        with torch.no_grad():
            expected = model.forward_at(images(), width)
        torch.testing.assert_close(run(files / f'net_w{width * 100:03.0f}.onnx', images()), expected, rtol=0, atol=1e-4)


def test_weights_are_there_once(model, files):
    """The file is no larger than what the widths hold, and narrower widths need only its beginning."""
    held = sum(module.weight.numel() for module in model.modules() if isinstance(module, SlimmableConv2d))
    for width in model.widths:
        dense = model.extract(width)
        convolved = sum(module.weight.numel() for module in dense.modules() if isinstance(module, torch.nn.Conv2d))
        held += sum(parameter.numel() for parameter in dense.parameters()) - convolved
    size = (files / 'net.onnx.data').stat().st_size
    assert 4 * held <= size <= 4 * held + 64 * 200  # gaps of less than 64 bytes
    graphs = [onnx.load(files / f'net_w{key}.onnx', load_external_data=False) for key in ('025', '050', '075', '100')]
    assert end_of_data(graphs[-1]) == size
    ends = [end_of_data(graph) for graph in graphs]
    assert ends == sorted(ends)
    assert ends[0] < size / 10
    assert all(graph.ByteSize() < 30_000 for graph in graphs)


def test_a_narrow_width_runs_on_the_beginning(model, files, tmp_path):
    graph = files / 'net_w025.onnx'
    end = described(graph)['data_bytes']
    assert end == end_of_data(onnx.load(graph, load_external_data=False))
    (tmp_path / 'net.onnx.data').write_bytes((files / 'net.onnx.data').read_bytes()[:end])
    (tmp_path / graph.name).write_bytes(graph.read_bytes())
    assert torch.equal(run(tmp_path / graph.name, images()), run(graph, images()))


def test_runtimes_join_and_fold_when_they_open(files, tmp_path):
    """What runs has neither the nodes that join weights nor normalisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / 'optimised.onnx')
    onnxruntime.InferenceSession(files / 'net_w100.onnx', options, providers=['CPUExecutionProvider'])
    run = onnx.load(tmp_path / 'optimised.onnx', load_external_data=False)
    assert {node.op_type for node in run.graph.node} == {'Conv', 'Relu', 'Add', 'ReduceMean', 'Reshape', 'Gemm'}


def test_graphs_are_valid(files):
    for path in files.glob('*.onnx'):
        onnx.checker.check_model(path, full_check=True)
        assert b'site-packages' not in path.read_bytes()


def test_metadata(model, files):
    about, cfg = described(files / 'net_w050.onnx'), model.pretrained_cfg
    assert 0 < about.pop('data_bytes') < (files / 'net.onnx.data').stat().st_size
    assert about == {
        'architecture': 'slimclr_resnet20',
        'widths': [0.5],
        'input_size': [3, 32, 32],
        **{key: cfg[key] for key in ('interpolation', 'crop_pct', 'crop_mode')},
        **{key: list(cfg[key]) for key in ('mean', 'std')},
    }


def test_slimmable_head_is_shared(tmp_path):
    model = small_network(head='slimmable', **SHALLOW)
    assert len(export_shared_onnx(model, tmp_path, 'net', size=32, widths=[1, 0.5])) == 2
    graph = onnx.load(tmp_path / 'net_w100.onnx', load_external_data=False)
    (join,) = (node for node in graph.graph.node if list(node.output) == ['fc.weight'])
    assert join.op_type == 'Concat'


def test_nothing_is_written_if_one_width_differs(tmp_path):
    model = small_network(**SHALLOW)
    torch.nn.init.constant_(model.fc.w050.bias, float('nan'))
    with pytest.raises(ExportError, match=r'net_w050\.onnx was not written'):
        export_shared_onnx(model, tmp_path, 'net', size=32, widths=[1, 0.5])
    assert [*tmp_path.iterdir()] == []


def test_weights_under_other_graphs_are_not_replaced(model, files, tmp_path):
    folder = tmp_path / 'again'
    folder.mkdir()
    for name in ('slimclr_resnet20_w100.onnx', 'slimclr_resnet20_w025.onnx', 'slimclr_resnet20.onnx.data'):
        (folder / name).write_text('precious')
    with pytest.raises(InputError, match=r'w025\.onnx may stand on the weights that would be replaced'):
        export_network(model, folder, 'onnx', widths=[1.0, 0.5], overwrite=True)
    export_network(model, folder, 'onnx', size=32, widths=[1.0, 0.25], overwrite=True)
    assert run(folder / 'slimclr_resnet20_w025.onnx', images()).shape == (5, 10)


def test_a_width_alone_needs_no_other_file(model, tmp_path):
    (exported,) = export_network(model, tmp_path, 'onnx', size=32, widths=[0.5])
    assert [path.name for path in tmp_path.iterdir()] == ['slimclr_resnet20_w050.onnx']
    assert exported.beside == ()
    with model.set_width(0.5):
        assert export_onnx(model, tmp_path / 'other.onnx', size=32).width == 0.5
