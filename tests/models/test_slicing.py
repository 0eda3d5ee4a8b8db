"""Slices of weights that are made once: in a step of training, and in inference."""

import copy
import pickle

import pytest
import timm
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import SlimmableConv2d
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


def kept(model):
    return sum(len(layer._kept) for layer in layers(model))


@torch.no_grad()
def expected(model, x, width):
    return model.forward_at(x, width)


@torch.inference_mode()
def infer(model, x, width):
    return model.forward_at(x, width)


def test_inference_keeps_slices_and_gives_the_same():
    model, x = make().eval(), images()
    for width in WIDTHS:
        assert torch.equal(infer(model, x, width), expected(model, x, width))
    convolutions = sum(isinstance(layer, SlimmableConv2d) for layer in model.modules())
    assert kept(model) == 3 * convolutions
    conv = model.layer1[0].conv1
    assert conv._keep(1.0) is conv.weight
    first = conv._keep(0.5)
    assert first.shape == (8, 8, 3, 3)
    infer(model, x, 0.5)
    assert conv._keep(0.5) is first


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.layer1[0].conv1.weight.mul_(2),
        lambda model: model.load_state_dict({name: tensor / 2 for name, tensor in model.state_dict().items()}),
        lambda model: model.load_state_dict(make(zero_init_last=False).state_dict(), assign=True),
        lambda model: setattr(model.layer1[0].conv1, 'weight', torch.nn.Parameter(model.layer1[0].conv1.weight / 3)),
        lambda model: model.layer1[0].conv1.weight.detach().lerp_(torch.ones((), dtype=torch.float64), 0.5),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: torch.optim.SGD([model.layer1[0].conv1.weight], lr=1.0, weight_decay=0.5).step(
            lambda: setattr(model.layer1[0].conv1.weight, 'grad', model.layer1[0].conv1.weight.detach().clone())
        ),
    ],
    ids=['in place', 'load', 'load by assignment', 'new parameter', 'through detach', 'format', 'optimizer'],
)
def test_inference_sees_changes(change):
    model, x = make().eval(), images()
    infer(model, x, 0.5)
    with torch.no_grad():
        change(model)
    torch.testing.assert_close(infer(model, x, 0.5), expected(model, x, 0.5), rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_where_gradients_may_flow():
    model, x = make().eval(), images()
    expected(model, x, 0.5)
    model.forward_at(x, 0.5).sum().backward()
    model.train()
    infer(model, x, 0.5)
    assert kept(model) == 0
    assert model.layer1[0].conv1.weight.grad[:8, :8].abs().max() > 0


def test_training_forgets_what_inference_has_kept():
    model = make().eval()
    infer(model, images(), 0.5)
    assert kept(model) > 0
    assert kept(model.train()) == 0


def test_copies_and_files_hold_no_slices():
    model, x = make().eval(), images()
    before = set(model.state_dict())
    infer(model, x, 0.5)
    assert set(model.state_dict()) == before
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert kept(other) == 0
        assert torch.equal(infer(other, x, 0.5), infer(model, x, 0.5))


def test_traced_network_follows_its_weights():
    """Slices that inference has kept do not become constants of a graph that torch.fx records."""
    model, x = make(width=0.5).eval(), images()
    with torch.inference_mode():
        model(x)
        traced = torch.fx.symbolic_trace(model)
        with torch.no_grad():
            model.layer1[0].conv1.weight.mul_(2)
        torch.testing.assert_close(traced(x), expected(model, x, 0.5))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = make().eval()
        output = model.forward_at(images(), 0.5)
    assert kept(model) == 0
    torch.testing.assert_close(output, expected(make().eval(), images(), 0.5))


# Compilation


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.usefixtures('_fresh_compiler')
def test_compiled_network_follows_its_weights():
    """Slices that inference has kept do not become constants of the graph."""
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


def test_more_widths_than_graphs():
    widths = tuple(i / 16 for i in range(16, 0, -1))
    limited = torch._dynamo.config.patch(recompile_limit=8)  # which others may have raised
    with limited, pytest.raises(InputError, match=r'16 widths need 17 graphs, and torch\.compile makes 8'):
        make(widths=widths).compile_widths()
