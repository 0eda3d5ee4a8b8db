"""Slices of weights: made once in a step of training, and in inference always those of the weights as they are."""

import copy

import onnxruntime
import openvino
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from slimclr_hub.models.slicing import SlicedWeight, cut, sliced_once
from tests.networks import forward_apart, randomise_batchnorm

WIDTHS = (1.0, 0.5, 0.25)


def make(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model('slimclr_resnet20', num_classes=5, **{'widths': WIDTHS, **kwargs})
    randomise_batchnorm(model)
    return model.to(dtype)


def images(batch=4, size=16, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, SlicedWeight)]


def step(model, x, shared=True, **kwargs):
    """Outputs, gradients by name, and buffers, after a forward and backward of a sum that tells widths apart."""
    outputs = model.forward_widths(x, **kwargs) if shared else forward_apart(model, x)
    sum((output * width).square().sum() for width, output in outputs.items()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs, gradients, dict(model.named_buffers())


# cut


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('whole', [True, False], ids=['the first is everything', 'none is everything'])
@pytest.mark.parametrize('unused', [None, 0, 1], ids=['all used', 'first unused', 'second unused'])
def test_cut_equals_indexing(layout, whole, unused):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(8, 6, 3, 3, dtype=torch.float64, generator=generator).to(memory_format=layout)
    blocks = [(slice(0, 8 if whole else 7), slice(0, 6)), (slice(0, 4), slice(0, 3)), (slice(2, 5), slice(1, 6))]
    ours, theirs = (tensor.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    pieces, expected = cut(ours, blocks), [theirs[block] for block in blocks]
    weights = [torch.randn(piece.shape, dtype=torch.float64, generator=generator) for piece in pieces]
    for found in pieces, expected:
        sum((a * b).sum() for i, (a, b) in enumerate(zip(found, weights, strict=True)) if i != unused).backward()
    for piece, other in zip(pieces, expected, strict=True):
        assert torch.equal(piece, other)
        assert piece.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=1e-14)


def test_cut_casts_and_adds_up_in_the_tensors_type():
    """Two halves of a unit in the last place of bfloat16 add up in float32, where bfloat16 would drop them."""
    tensor = torch.ones(4, 4, requires_grad=True)
    blocks = [(slice(0, 4), slice(0, 4)), (slice(0, 2), slice(0, 2))]
    whole, part = cut(tensor, blocks, torch.bfloat16)
    assert whole.dtype == part.dtype == torch.bfloat16
    (whole.sum() + part.sum() * 2**-9).backward()
    assert tensor.grad.dtype == torch.float32
    assert tensor.grad[0, 0] == 1 + 2**-9
    assert tensor.grad[3, 3] == 1


def test_cut_that_nothing_uses_has_no_gradient():
    tensor = torch.ones(4, 4, requires_grad=True)
    other = torch.ones((), requires_grad=True)
    cut(tensor, [(slice(0, 2), slice(0, 2))])
    other.backward()
    assert tensor.grad is None


# Training


@pytest.mark.parametrize('overlap', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_training_at_all_widths_is_what_it_is_without_sharing(overlap, layout):
    plain = make(overlap=overlap).train().to(memory_format=layout)
    shared = copy.deepcopy(plain)
    expected = step(plain, images(), shared=False)
    for ours, theirs in zip(step(shared, images(), shared=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_training_with_checkpointed_blocks():
    plain = make().train()
    shared = copy.deepcopy(plain)
    shared.set_grad_checkpointing()
    expected = step(plain, images(), shared=False)
    for ours, theirs in zip(step(shared, images())[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_some_widths_leave_the_others_alone():
    model = make().train()
    outputs, gradients, _ = step(model, images(), widths=(0.25, 0.5))
    assert list(outputs) == [0.25, 0.5]
    conv = gradients['layer1.0.conv1.weight']
    assert conv[:8, :8].abs().min() > 0
    assert conv[8:].abs().max() == conv[:, 8:].abs().max() == 0
    assert gradients['bn1.w100.weight'] is None


def test_slices_are_in_the_type_of_autocast():
    plain = make(torch.float32).train()
    shared, x = copy.deepcopy(plain), images(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        expected = step(plain, x, shared=False)
        with sliced_once([shared], WIDTHS):
            assert {layer.weight_at(0.5).dtype for layer in layers(shared)} == {torch.bfloat16}
        ours = step(shared, x)
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())
    for name, theirs in expected[1].items():
        assert (ours[1][name] - theirs).norm() < 0.05 * theirs.norm() + 1e-3, name


def test_slices_are_gone_afterwards():
    model = make().train()

    def fail():
        with sliced_once([model], WIDTHS):
            first = layers(model)[1].weight_at(0.5)
            with sliced_once([model], WIDTHS):
                assert layers(model)[1].weight_at(0.5) is first
            assert layers(model)[1].weight_at(0.5) is first
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    model.layer1[0].conv1.weight.data.zero_()
    assert model.layer1[0].conv1.weight_at(0.5).abs().max() == 0


def test_first_convolution_runs_once():
    model, calls = make().train(), []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    model.forward_widths(images())
    assert len(calls) == 1
    forward_apart(model, images())
    assert len(calls) == 1 + len(WIDTHS)


# Inference


@torch.no_grad()
def expected(model, x, width):
    """The outputs of the dense network of that width, which is made anew from the weights of now."""
    return model.extract(width).eval()(x)


@torch.inference_mode()
def infer(model, x, width):
    return model.forward_at(x, width)


def through_vector(model):
    """In a loop, in which memory that is freed is given out again."""
    parameters = [*model.parameters()]
    for factor in 0.5, 3.0, 1 / 3:
        torch.nn.utils.vector_to_parameters(factor * torch.nn.utils.parameters_to_vector(parameters), parameters)


def assign_data(model):
    for factor in 2.0, 0.25:
        for parameter in model.parameters():
            parameter.data = parameter.data * factor


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.layer1[0].conv1.weight.mul_(2),
        lambda model: model.layer1[0].conv1.weight.data.copy_(torch.ones(())),
        through_vector,
        assign_data,
        lambda model: model.load_state_dict({name: tensor / 2 for name, tensor in model.state_dict().items()}),
        lambda model: model.load_state_dict(make(zero_init_last=False).state_dict(), assign=True),
        lambda model: setattr(model.layer1[0].conv1, 'weight', torch.nn.Parameter(model.layer1[0].conv1.weight / 3)),
        lambda model: model.layer1[0].conv1.weight.detach().lerp_(torch.ones((), dtype=torch.float64), 0.5),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: torch.optim.SGD([model.layer1[0].conv1.weight], lr=1.0, weight_decay=0.5).step(
            lambda: setattr(model.layer1[0].conv1.weight, 'grad', model.layer1[0].conv1.weight.detach().clone())
        ),
    ],
    ids=[
        'in place', 'through data', 'from a vector', 'new data', 'load', 'load by assignment', 'new parameter',
        'through detach', 'format', 'optimizer',
    ],
)  # fmt: skip
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_inference_sees_changes(change, mode):
    model, x = make().eval(), images()
    for width in WIDTHS:
        infer(model, x, width)
    with mode():
        change(model)
        found = {width: model.forward_at(x, width) for width in WIDTHS}
    for width in WIDTHS:
        torch.testing.assert_close(found[width], expected(model, x, width), rtol=1e-12, atol=1e-12)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        output = make().eval().forward_at(images(), 0.5)
    torch.testing.assert_close(output, expected(make().eval(), images(), 0.5))


# Recorders: after a warm pass, what they record follows the weights, and leaves the network as it was


def recorded_by_fx(model, x):
    return torch.fx.symbolic_trace(model)


def recorded_by_jit(model, x):
    return torch.jit.trace(model, x)


def recorded_by_make_fx(model, x):
    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    recorded = make_fx(call)(dict(model.named_parameters()), x)
    return lambda x: recorded(dict(model.named_parameters()), x)


@pytest.mark.parametrize('record', [recorded_by_fx, recorded_by_jit, recorded_by_make_fx])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_recorded_network_follows_its_weights(record, mode):
    model, x = make(width=0.5).eval(), images()
    infer(model, x, 0.5)
    with mode():
        recorded = record(model, x)
        torch.testing.assert_close(recorded(x), expected(model, x, 0.5))
        with torch.no_grad():
            model.layer1[0].conv1.weight.mul_(2)
        torch.testing.assert_close(recorded(x), expected(model, x, 0.5))


def test_fake_pass_leaves_nothing_behind():
    model, x = make(width=0.5).eval(), images()
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(model(mode.from_tensor(x)), FakeTensor)
    output = infer(model, x, 0.5)
    assert not isinstance(output, FakeTensor)
    torch.testing.assert_close(output, expected(model, x, 0.5))


@pytest.mark.parametrize('file', ['onnx', 'openvino'])
def test_exported_after_a_warm_pass(file, tmp_path):
    """By the exporters that trace a network, straight; weights are inputs of their graphs, not outputs of slices."""
    model, x = make(torch.float32, width=0.5).eval(), images(dtype=torch.float32)
    infer(model, x, 0.5)
    with torch.no_grad():
        model.layer1[0].conv1.weight.data.mul_(2)
    with torch.inference_mode():
        if file == 'onnx':
            torch.onnx.export(model, (x,), tmp_path / 'network.onnx', dynamo=False)
            session = onnxruntime.InferenceSession(tmp_path / 'network.onnx', providers=['CPUExecutionProvider'])
            (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        else:
            converted = openvino.convert_model(model, example_input=x)
            # Where the CPU has it, OpenVINO computes in bfloat16 unless told.
            compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
            output = compiled(x.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(output), expected(model, x, 0.5), rtol=1e-4, atol=1e-4)


# Compilation


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.usefixtures('_fresh_compiler')
def test_compiled_network_follows_its_weights():
    """Slices do not become constants of the graph."""
    model, x = make(width=0.5).eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.inference_mode():
        model(x)
        compiled(x)
        model.load_state_dict({name: tensor / 2 for name, tensor in model.state_dict().items()})
        torch.testing.assert_close(compiled(x), expected(model, x, 0.5))


@pytest.mark.usefixtures('_fresh_compiler')
def test_compiled_widths_train_as_others_with_one_graph_each():
    """And one more of the full width, for slow start, which comes first here."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    plain = make().train()
    compiled = copy.deepcopy(plain)
    compiled.compile_widths(backend=count)
    for widths in WIDTHS[:1], WIDTHS[:1], WIDTHS, WIDTHS:
        for model in plain, compiled:
            model.zero_grad()
        ours, theirs = step(compiled, images(), widths=widths), step(plain, images(), widths=widths)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert len(graphs) == len(WIDTHS) + 1
    compiled.eval()
    infer(compiled, images(), 0.5)
    assert len(graphs) == len(WIDTHS) + 1
    assert not copy.deepcopy(compiled)._compiled
