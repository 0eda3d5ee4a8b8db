"""One training iteration over all widths, compared with each width by itself."""

import pytest
import torch
from mmengine.optim import OptimWrapper

from slimclr_hub.detection.precision import width_name
from slimclr_hub.errors import InputError
from tests.detection.small import MODELS, WIDTHS, batch, config, detector, width_gradients


class Recorder(torch.optim.SGD):
    """Optimizer that keeps the gradients of its steps."""

    def step(self, closure=None):
        self.seen = [
            *getattr(self, 'seen', []),
            [None if p.grad is None else p.grad.clone() for p in self.parameters()],
        ]
        return super().step(closure)

    def parameters(self):
        return [p for group in self.param_groups for p in group['params']]


def stepped(model, optim_wrapper, *batches):
    model.train()
    logs = [model.train_step(data, optim_wrapper) for data in batches]
    names = [name for name, _ in model.named_parameters()]
    return logs, [dict(zip(names, seen, strict=True)) for seen in optim_wrapper.optimizer.seen]


def summed(model, data):
    model.train()
    total = {}
    for width in sorted(WIDTHS):
        for name, gradient in width_gradients(model, data, width).items():
            total[name] = total.get(name, 0) + gradient
    model.zero_grad()
    return total


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6 * max(1.0, value.abs().max().item()))


def test_gradients_are_those_of_every_width_summed():
    model, data = detector(), batch()
    expected = summed(detector(), data)
    optimizer = Recorder(model.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, (seen,) = stepped(model, OptimWrapper(optimizer), data)
    assert_same(seen, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.1 * seen[name])
    assert model.width == 1.0
    assert not model.training_widths
    # Normalisations of each width had a gradient, which one of the widths alone gives them.
    for key in 'w100', 'w075', 'w050', 'w025':
        assert seen[f'backbone.network.bn1.{key}.weight'].abs().sum() > 0


def test_log_names_every_width_and_part():
    model = detector()
    (log,), _ = stepped(model, OptimWrapper(Recorder(model.parameters(), lr=0.1)), batch())
    parts = ['loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'acc', 'loss_bbox', 'loss_mask']
    assert [*log] == ['loss', *(f'{width_name(width)}/{part}' for width in WIDTHS for part in parts)]
    assert log['loss'].item() == pytest.approx(sum(log[f'{width_name(width)}/loss'].item() for width in WIDTHS))
    for width in WIDTHS:
        total = sum(log[f'{width_name(width)}/{part}'].item() for part in parts[1:] if part != 'acc')
        assert log[f'{width_name(width)}/loss'].item() == pytest.approx(total, rel=1e-5)
    assert len({log[f'{width_name(width)}/loss'].item() for width in WIDTHS}) == len(WIDTHS)


def test_gradients_are_clipped_once_after_all_widths():
    model, data = detector(), batch()
    expected = summed(detector(), data)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    limit = norm.item() / 3
    wrapper = OptimWrapper(Recorder(model.parameters(), lr=0.1), clip_grad={'max_norm': limit})
    _, (seen,) = stepped(model, wrapper, data)
    assert_same(seen, {name: gradient / 3 for name, gradient in expected.items()})


def test_accumulation_counts_iterations():
    """Two iterations give one step by the mean of their gradients."""
    model, data = detector(), [batch(seed=0), batch(seed=1)]
    other = detector()
    expected = [summed(other, d) for d in data]  # normalisation in training mode does not read its statistics
    wrapper = OptimWrapper(Recorder(model.parameters(), lr=0.1), accumulative_counts=2)
    _, (seen,) = stepped(model, wrapper, *data)
    assert_same(seen, {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]})
    assert wrapper.inner_count == 2


def test_memory_of_one_width_at_a_time():
    """A width's graph is freed before the next one runs, so saved tensors never belong to two widths."""
    model, alive, most = detector(), set(), []

    def pack(tensor):
        alive.add(model.width)
        most.append(len(alive))
        return tensor, model.width

    def unpack(packed):
        alive.discard(packed[1])
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        stepped(model, OptimWrapper(Recorder(model.parameters(), lr=0.1)), batch())
    assert max(most) == 1


@pytest.mark.parametrize(('width', 'name'), [(1.0, 'width_1.00'), (0.5, 'width_0.50'), (0.125, 'width_0.125')])
def test_names(width, name):
    assert width_name(width) == name


def test_a_backbone_of_one_width_is_refused():
    plain = dict(type='ResNet', depth=18, num_stages=3, out_indices=(0, 1, 2), strides=(1, 2, 2), dilations=(1, 1, 1))
    changed = config()
    changed.backbone = plain
    with pytest.raises(InputError, match=r'SlimmableMaskRCNN is a ResNet of one width; its type must be Slimmable'):
        MODELS.build(changed)
