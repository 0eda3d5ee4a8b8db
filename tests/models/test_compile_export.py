"""Compilation, export, memory formats and mixed precision."""

import copy

import pytest
import timm
import torch

from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.slimmable_resnet import BasicBlock
from tests.networks import randomise_batchnorm

WIDTHS = DEFAULT_WIDTHS


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def make(name='slimclr_resnet20', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    randomise_batchnorm(model)
    return model.eval()


def shallow(name='slimclr_resnet20', **kwargs):
    """A network of one block in each stage, for tracing takes as long as there are blocks."""
    return make(name, layers=(1,) * (3 if name == 'slimclr_resnet20' else 4), **kwargs)


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(('name', 'widths'), [('slimclr_resnet20', WIDTHS), ('slimclr_resnet50', (1.0, 0.25))])
def test_compile_at_each_width(name, widths):
    model, x = shallow(name), images()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for width in widths:
            compiled.set_width(width)
            assert model.width == width
            torch.testing.assert_close(compiled(x), model.forward_at(x, width))
        # Back to a width that has been compiled already.
        with compiled.set_width(1.0):
            torch.testing.assert_close(compiled(x), model.forward_at(x, 1.0))
        torch.testing.assert_close(compiled(x), model.forward_at(x, 0.25))


def test_compile_is_once_for_each_width():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model, x = shallow(), images()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for width in WIDTHS * 2:
            compiled.set_width(width)
            compiled(x)
    assert len(graphs) == len(WIDTHS)


def test_compile_makes_all_graphs_of_four_widths():
    """In training and in inference, of whole batches and of a last one that is smaller: more than torch's 8 in all."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.config.recompile_limit = 8  # as before the first network of this process
    model = SlimmableResNet(BasicBlock, (1, 1), (4, 8), small_stem=True, num_classes=3)
    compiled, eager = torch.compile(model, fullgraph=True, backend=count), copy.deepcopy(model)
    for training in True, False:
        compiled.train(training)
        eager.train(training)
        for batch in 4, 3:
            for width in WIDTHS:
                compiled.set_width(width)
                torch.testing.assert_close(compiled(images(batch, 8)), eager.forward_at(images(batch, 8), width))
    assert len(graphs) > 8
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


def test_compile_forward_at():
    model, x = shallow(), images()
    compiled = torch.compile(model.forward_at, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for width in WIDTHS:
            torch.testing.assert_close(compiled(x, width), model.forward_at(x, width))


def test_compile_with_inductor():
    model, x = shallow(), images()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        model.set_width(0.25)
        torch.testing.assert_close(compiled(x), model.forward_at(x, 0.25), rtol=1e-4, atol=1e-4)


def test_compile_all_widths_of_a_training_step():
    """One graph for all widths; outputs, gradients and running statistics as without compilation."""
    eager, x = shallow(widths=(1.0, 0.25)).train(), images(4)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other.forward_widths, fullgraph=True, backend='aot_eager')
    outputs = [eager.forward_widths(x), compiled(x)]
    for output in outputs:
        sum(value.square().mean() for value in output.values()).backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (name, ours), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(other.state_dict(), eager.state_dict())


def test_compile_dense():
    x = images(2, 64)
    model = shallow('slimclr_resnet50_025')
    extracted = shallow().extract(0.5)
    with torch.no_grad():
        for dense in model, extracted:
            compiled = torch.compile(dense, fullgraph=True, backend='aot_eager')
            torch.testing.assert_close(compiled(x), dense(x))


@pytest.mark.parametrize('width', WIDTHS)
def test_export_with_any_batch_size(width):
    model = shallow(width=width)
    exported = torch.export.export(model, (images(3),), dynamic_shapes={'x': {0: torch.export.Dim('batch')}})
    module = exported.module()
    with torch.no_grad():
        for batch in 2, 3, 5:
            torch.testing.assert_close(module(images(batch)), model.forward_at(images(batch), width))


def test_export_slimmable_resnet50():
    model, x = shallow('slimclr_resnet50', width=0.5), images(2, 64)
    module = torch.export.export(model, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}).module()
    with torch.no_grad():
        torch.testing.assert_close(module(images(3, 64)), model(images(3, 64)))


def test_export_dense():
    for dense in shallow('slimclr_resnet50_025'), shallow().extract(0.25):
        exported = torch.export.export(dense, (images(),), dynamic_shapes={'x': {0: torch.export.Dim('batch')}})
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(images(5)), dense(images(5)))


@pytest.mark.parametrize('width', WIDTHS)
def test_channels_last(width):
    contiguous, x = make().train(), images(4)
    last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    outputs = []
    for model, batch in (contiguous, x), (last, x.to(memory_format=torch.channels_last)):
        output = model.forward_at(batch, width)
        output.square().mean().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(contiguous.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        features = last.eval().forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_extracts():
    model, x = make(), images()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for width in WIDTHS:
            torch.testing.assert_close(last.extract(width)(x), model.forward_at(x, width), rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast():
    model, x = make().train(), images(8)
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model.forward_widths(x)
        loss = sum(output.square().mean() for output in outputs.values())
    loss.backward()
    assert all(output.dtype == torch.bfloat16 and output.isfinite().all() for output in outputs.values())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    expected = copy.deepcopy(model).forward_widths(x)
    for width, output in outputs.items():
        error = (output.float() - expected[width]).norm() / expected[width].norm()
        assert error < 0.05, width
