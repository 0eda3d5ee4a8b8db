"""MoCo v2's momentum encoder, queue, shuffled keys, slow start and logs."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods import MoCoV2
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.methods.losses import info_nce, similarities
from slimclr_hub.train.diagnostics import last_linear
from tests.methods import plain

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def make(widths=WIDTHS, **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=widths, zero_init_last=False)
    return MoCoV2(backbone, **{'dim': 8, 'hidden_dim': 16, 'queue_size': 32, **kwargs})


def views(batch=8, seed=1, size=16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for _ in range(2)]


def full_width_parameters(method):
    """Parameters of the query encoder that the key encoder has too, in its order."""
    leaders = [dict(method.backbone.named_parameters()), dict(method.head.named_parameters())]
    for follower, leader in zip((method.key_backbone, method.key_head), leaders, strict=True):
        for name, parameter in follower.named_parameters():
            switched = '{0}.w100.{2}'.format(*name.rpartition('.'))
            yield parameter, leader.get(name, leader.get(switched))


# Momentum encoder


def test_key_encoder_starts_as_the_full_network():
    method = make()
    pairs = list(full_width_parameters(method))
    assert len(pairs) == 21 + 2 * 21 + 4  # convolutions, normalisations, and the head's two layers
    assert all(torch.equal(follower, leader) for follower, leader in pairs)
    assert not any(
        parameter.requires_grad for parameter in (*method.key_backbone.parameters(), *method.key_head.parameters())
    )


def test_key_encoder_moves_by_momentum():
    method = make()
    followers = [follower.clone() for follower, _ in full_width_parameters(method)]
    with torch.no_grad():
        for parameter in (*method.backbone.parameters(), *method.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    statistics = {name: buffer.clone() for name, buffer in method.key_backbone.named_buffers()}
    leaders = [leader.clone() for _, leader in full_width_parameters(method)]
    for step in 1, 2, 3:
        method.update_key_encoder(0.9)
        for before, (now, leader), at_first in zip(followers, full_width_parameters(method), leaders, strict=True):
            assert torch.equal(leader, at_first)
            # m^t of the start and the rest of the constant leader
            torch.testing.assert_close(now, 0.9**step * before + (1 - 0.9**step) * leader)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in method.key_backbone.named_buffers())


def test_momentum_of_one_and_of_zero():
    method = make()
    before = [follower.clone() for follower, _ in full_width_parameters(method)]
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.1)
    method.update_key_encoder(1.0)
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, full_width_parameters(method), strict=True))
    method.update_key_encoder(0.0)
    assert all(torch.equal(follower, leader) for follower, leader in full_width_parameters(method))


def test_key_encoder_moves_between_query_and_keys():
    """Keys are those of the encoder after its move; the queries do not see it."""
    method, (query, key) = make(distillation='none'), views()
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = copy.deepcopy(method)
    queue = method.queue.clone()
    output = method([query, key], (1.0,), momentum=0.5)
    q = F.normalize(expected.head(expected.backbone.forward_at(query, 1.0), 1.0), dim=1)
    expected.update_key_encoder(0.5)
    k = F.normalize(expected.key_head(expected.key_backbone(key)), dim=1)
    assert output['loss'].item() == pytest.approx(info_nce(similarities(q, k, queue), 0.2).item(), rel=1e-6)
    torch.testing.assert_close(method.queue[:8], k)


def test_key_encoder_gets_no_gradient():
    method = make()
    method(views(), WIDTHS, momentum=0.9)['loss'].backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {name.split('.')[0] for name in trained} == {'backbone', 'head'}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    assert all(parameter.grad is None for parameter in method.key_backbone.parameters())
    assert method.queue.grad is None
    assert not method.queue.requires_grad


# Queue


def test_queue_is_a_ring():
    method = make(queue_size=12)
    first = method.queue.clone()
    batches = [F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)), dim=1) for i in range(5)]
    method.enqueue(queue=batches[0])
    assert torch.equal(method.queue, torch.cat([batches[0], first[4:]]))
    assert method.queue_pointer == 4
    for keys in batches[1:]:
        method.enqueue(queue=keys)
    assert torch.equal(method.queue, torch.cat([batches[3], batches[4], batches[2]]))
    assert method.queue_pointer == 8


def test_queue_of_one_batch():
    method = make(queue_size=8)
    for seed in 1, 2:
        keys = F.normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)), dim=1)
        method.enqueue(queue=keys)
        assert torch.equal(method.queue, keys)
        assert method.queue_pointer == 0


def test_queue_starts_on_the_sphere():
    queue = make(queue_size=512).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(512))
    assert queue.mean(0).norm() < 0.2


def test_queue_and_pointer_are_part_of_the_state():
    method = make()
    method(views(), WIDTHS, momentum=0.9)
    other = make()
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queue, method.queue)
    assert other.queue_pointer == 8


def test_queue_that_is_no_multiple_of_the_batch_is_refused():
    with pytest.raises(ValueError, match=r'queue_size 30.*8'):
        make(queue_size=30)(views(), WIDTHS, momentum=0.9)
    with pytest.raises(ValueError, match=r'queue_size 4 .*8'):
        make(queue_size=4)(views(), WIDTHS, momentum=0.9)


def test_step_uses_the_queue_before_its_own_keys():
    method = make()
    queue = method.queue.clone()
    output = method(views(), (1.0,), momentum=1.0)
    assert not torch.equal(method.queue, queue)
    output['loss'].backward()  # the negatives of this step were not overwritten
    again = make()
    again.queue.copy_(queue)
    assert torch.equal(again(views(), (1.0,), momentum=1.0)['loss'], output['loss'])


# Slow start


def test_slow_start_leaves_the_other_widths():
    method = make()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(method.state_dict())
    narrow = [name for name in before if any(f'.{key}.' in name for key in ('w075', 'w050', 'w025'))]
    assert len(narrow) == 21 * 3 * 5
    for step in range(2):
        output = method(views(seed=step), WIDTHS[:1], momentum=0.9)
        assert set(output) == {'loss', 'loss/1', 'info_nce/1', 'accuracy/1'}
        assert torch.equal(output['loss'], output['info_nce/1'])  # weight 1, no distillation
        optimizer.zero_grad()
        output['loss'].backward()
        for name, parameter in method.named_parameters():
            if name in narrow:
                assert parameter.grad is None, name
        optimizer.step()
    after = method.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in narrow)
    assert not torch.equal(before['backbone.conv1.weight'], after['backbone.conv1.weight'])
    assert not torch.equal(before['backbone.bn1.w100.weight'], after['backbone.bn1.w100.weight'])


def test_slow_start_counts_a_list_of_weights_once():
    """A weight for each width is for all of them together; alone, the full width has weight one."""
    output = make(loss_weights=[3.0, 1.0, 1.0, 1.0])(views(), WIDTHS[:1], momentum=0.9)
    assert torch.equal(output['loss'], output['info_nce/1'])


# Objective


@pytest.mark.parametrize('queue_size', [0, 16], ids=['the batch', 'a queue'])
def test_against_loops(queue_size):
    """Every width against loops over images and keys, with negatives from the batch or from the queue."""
    options = {'temperature': 0.3, 'distillation_temperature': 3.0, 'queue_size': queue_size}
    method, (query, key) = make(**options).double(), [view.double() for view in views()]
    other = copy.deepcopy(method)
    output = method([query, key], WIDTHS, momentum=0.9)

    out = {w: other.head(other.backbone.forward_at(query, w), w).detach() for w in WIDTHS}
    other.update_key_encoder(0.9)
    keys = unit(other.key_head(other.key_backbone(key)))
    logits = {w: plain.products(unit(q), torch.cat([keys, other.queue])) for w, q in out.items()}
    targets = list(range(8))
    if queue_size:  # the keys of other images are no candidates then
        logits = {w: [[row[b], *row[8:]] for b, row in enumerate(rows)] for w, rows in logits.items()}
        targets = [0] * 8
    parts = plain.objective(logits, targets, [2.5, 1, 1, 1], tau_1=0.3, tau_2=3.0)
    assert output['loss'].item() == pytest.approx(sum(parts.values()), rel=1e-10)
    for width, rows in logits.items():
        expected = plain.cross_entropy(rows, targets, 0.3)
        assert output[f'info_nce/{width:g}'].item() == pytest.approx(expected, rel=1e-10)
        hits = sum(row.index(max(row)) == b for row, b in zip(rows, targets, strict=True)) / 8
        assert output[f'accuracy/{width:g}'].item() == pytest.approx(hits)
    assert method.queue.shape == (queue_size, 8)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def test_without_a_queue_any_batch_will_do():
    method = make(queue_size=0)
    for batch in 8, 5:
        method(views(batch), WIDTHS, momentum=0.9)['loss'].backward()
    assert method.queue_pointer == 0


def test_without_distillation():
    output = make(distillation='none', loss_weights='none')(views(), WIDTHS, momentum=0.9)
    parts = [output[f'info_nce/{width:g}'] for width in WIDTHS]
    torch.testing.assert_close(output['loss'], sum(parts))
    assert all(torch.equal(output[f'loss/{width:g}'], part) for width, part in zip(WIDTHS, parts, strict=True))


@pytest.mark.parametrize('distillation', ['kd', 'mse', 'dkd', 'atkd'])
def test_each_distillation_trains_every_width(distillation):
    method = make(distillation=distillation)
    method(views(), WIDTHS, momentum=0.9)['loss'].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name


def test_a_single_width_is_plain_moco():
    """`widths=(0.5,)` against a MoCo v2 written out on the dense network of that width."""
    method, (query, key) = make(widths=(0.5,)), views()
    encoder = method.backbone.extract(0.5)
    head = method.head.extract(0.5)
    key_encoder, key_head = copy.deepcopy(encoder), copy.deepcopy(head)
    queue = method.queue.clone()
    output = method([query, key], (0.5,), momentum=0.99)
    output['loss'].backward()

    q = F.normalize(head(encoder(query)), dim=1)
    with torch.no_grad():
        k = F.normalize(key_head(key_encoder(key)), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    loss = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    loss.backward()

    torch.testing.assert_close(output['loss'], loss)
    torch.testing.assert_close(method.backbone.conv1.weight.grad, encoder.conv1.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.head.fc1.weight.grad, head.fc1.weight.grad, rtol=1e-4, atol=1e-6)
    assert set(output) == {'loss', 'loss/0.5', 'info_nce/0.5', 'accuracy/0.5'}
    assert method.head.fc1.weight.shape == (8, 32)
    torch.testing.assert_close(method.queue[:8], k)


# Accumulation


def test_later_parts_of_a_step():
    """Without a momentum the key encoder and the negatives stay, and the queue takes the keys of every part."""
    method = make()
    with torch.no_grad():
        for parameter in (*method.backbone.parameters(), *method.head.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    queue = method.queue.clone()
    method(views(seed=1), WIDTHS, momentum=0.9)
    encoder = [parameter.clone() for parameter in (*method.key_backbone.parameters(), *method.key_head.parameters())]
    keys = method.queue[:8].clone()
    query, key = views(seed=2)
    other = copy.deepcopy(method)
    output = method([query, key], WIDTHS[:1], momentum=None)
    after = (*method.key_backbone.parameters(), *method.key_head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(encoder, after, strict=True))

    q = F.normalize(other.head(other.backbone.forward_at(query, 1.0), 1.0), dim=1)
    k = F.normalize(other.key_head(other.key_backbone(key)), dim=1)
    torch.testing.assert_close(output['loss'], info_nce(similarities(q, k, queue), 0.2))
    torch.testing.assert_close(method.queue, torch.cat([keys, k, queue[16:]]))
    assert method.queue_pointer == 16


@pytest.mark.parametrize('parts', [2, 4])
def test_parts_are_the_whole_batch(parts):
    """Gradient and queue of a step in parts equal those of the whole, where normalisation cannot tell them apart."""
    whole = make().double().eval()
    with torch.no_grad():
        for parameter in whole.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    split = copy.deepcopy(whole)
    pair = [view.double() for view in views()]
    loss = whole(pair, WIDTHS, momentum=0.9)['loss']
    loss.backward()
    losses = []
    for i, part in enumerate(zip(*(view.chunk(parts) for view in pair), strict=True)):
        losses.append(split(part, WIDTHS, momentum=None if i else 0.9)['loss'] / parts)
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), loss, rtol=1e-10, atol=1e-10)
    for (name, a), b in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, a), b in zip(split.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


# Shuffled keys


def test_shuffled_keys_come_back_in_order():
    """In eval mode normalisation does not look at the neighbours, so that only the order could differ."""
    method = make(bn_splits=4).eval()
    _, key = views(16)
    expected = F.normalize(method.key_head(method.key_backbone(key)), dim=1)
    torch.testing.assert_close(method.encode_keys(key), expected)


def test_keys_are_shuffled_over_the_splits():
    """In train mode each key is normalised with the others of its part of the permuted batch."""
    method = make(bn_splits=2)
    _, key = views(8)
    key = key * torch.linspace(0.5, 3, 8)[:, None, None, None]
    other = copy.deepcopy(method)
    torch.manual_seed(5)
    keys = method.encode_keys(key)
    torch.manual_seed(5)
    order = torch.randperm(8)
    assert not torch.equal(order[:4].sort().values, torch.arange(4))
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.splits = 1
    expected = torch.empty_like(keys)
    for part in order.chunk(2):
        expected[part] = F.normalize(other.key_head(other.key_backbone(key[part])), dim=1)
    torch.testing.assert_close(keys, expected)


def test_keys_stay_in_place_without_shuffling():
    """Part i of the keys is normalised by itself then, and no random number is drawn."""
    method = make(bn_splits=2, shuffle_keys=False)
    _, key = views(8)
    other = copy.deepcopy(method)
    state = torch.get_rng_state()
    keys = method.encode_keys(key)
    assert torch.equal(torch.get_rng_state(), state)
    split_batchnorm(other, 1)
    expected = [F.normalize(other.key_head(other.key_backbone(part)), dim=1) for part in key.chunk(2)]
    torch.testing.assert_close(keys, torch.cat(expected))
    assert not torch.allclose(make(bn_splits=2).encode_keys(key), keys, atol=1e-3)


def test_queries_are_not_shuffled():
    method, plain, query = make(bn_splits=2), make(), views(8)[0]
    split = method.backbone.forward_at(query, 0.5)
    torch.testing.assert_close(split, torch.cat([plain.backbone.forward_at(part, 0.5) for part in query.chunk(2)]))


# Errors


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"'cosine'.*kd, mse, dkd, atkd, none"):
        make(distillation='cosine')
    with pytest.raises(ValueError, match=r"'heavy'.*full_plus_sum"):
        make(loss_weights='heavy')
    with pytest.raises(ValueError, match='2 numbers for 4 widths'):
        make(loss_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match='bn_splits 0'):
        make(bn_splits=0)
    with pytest.raises(ValueError, match=r'6.*4 BN splits'):
        make(bn_splits=4, queue_size=36)(views(6), WIDTHS, momentum=0.9)
    with pytest.raises(ValueError, match=r'0\.3'):
        make()(views(), (1.0, 0.3), momentum=0.9)


# Head


def test_linear_head_is_one_layer_of_the_leading_features():
    """MoCo v1's, whose input has the width."""
    method = make(head='linear', hidden_dim=None)
    assert [name for name, _ in method.head.named_parameters()] == ['fc.weight', 'fc.bias']
    x = torch.randn(3, 64)
    for width in WIDTHS:
        n = int(64 * width)
        expected = x[:, :n] @ method.head.fc.weight[:, :n].T + method.head.fc.bias
        torch.testing.assert_close(method.head(x[:, :n], width), expected)
        torch.testing.assert_close(method.head.extract(width)(x[:, :n]), expected)
    assert last_linear(method) is method.head.fc.weight
    method(views(), WIDTHS, 0.9)['loss'].backward()
    assert method.head.fc.weight.grad.abs().sum() > 0


def test_a_linear_head_has_no_hidden_layer():
    with pytest.raises(InputError, match='hidden_dim 16 is not for head linear'):
        make(head='linear', hidden_dim=16)
    with pytest.raises(InputError, match=r'head .*wide'):
        make(head='wide')
