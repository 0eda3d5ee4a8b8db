"""A teacher that nothing moves, and its methods: closed forms, transcriptions by loops, and queues."""

import copy
import math
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError
from slimclr_hub.methods import MoCoV2, Teacher
from slimclr_hub.methods.bingo import cutmix
from slimclr_hub.methods.losses import info_nce, similarities, squared_distance
from slimclr_hub.methods.momentum import EMA
from slimclr_hub.methods.queue import QueueMethod
from slimclr_hub.models.widths import width_key
from tests.methods import plain
from tests.networks import method_of, small_teacher

WIDTHS = (1.0, 0.5)
TAUGHT: dict[str, dict[str, int]] = {
    'seed': {'hidden_dim': 32, 'queue_size': 8},
    'disco': {'hidden_dim': 32, 'queue_size': 8},
    'compress': {'queue_size': 8},
    'bingo': {'hidden_dim': 32, 'queue_size': 8, 'cross_after': 0},
}


def make(name='seed', widths=WIDTHS, **options):
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=widths, zero_init_last=False)
    return method_of(name, backbone, **{**TAUGHT[name], **options}).double().train()


def views(seed=1, batch=4, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 12, 12, dtype=torch.double, generator=generator) for _ in range(count)]


def views_for(name, seed=1):
    return views(seed, count=4 if name == 'bingo' else 2)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)), dim=1)


# The teacher


@pytest.mark.parametrize('name', TAUGHT)
def test_nothing_moves_the_teacher(name):
    method = make(name)
    network = method.teacher.network
    before, wanted = method.teacher.hash(), method.teacher(views()[0])
    optimizer = torch.optim.SGD(method.parameters(), 0.1, 0.9, weight_decay=0.1)
    for _ in range(2):
        method.train()(views_for(name), method.widths, 0.9)['loss'].backward()
        optimizer.step()
    assert method.teacher.hash() == before
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert torch.equal(method.teacher(views()[0]), wanted)
    assert not wanted.requires_grad


@pytest.mark.parametrize('name', TAUGHT)
def test_no_checkpoint_holds_the_teacher(name):
    method = make(name)
    assert not [key for key in method.state_dict() if key.startswith('teacher')]
    hidden = {id(tensor) for tensor in method.teacher.network.state_dict(keep_vars=True).values()}
    assert hidden.isdisjoint(map(id, (*method.parameters(), *method.buffers())))
    other = make(name)
    assert other.load_state_dict(method.state_dict()).missing_keys == []


def test_teacher_follows_to_another_type():
    teacher = small_teacher().double()
    assert {p.dtype for p in teacher.network.parameters()} == {torch.double}
    assert teacher(views()[0]).dtype == torch.double


def test_teacher_sees_images_as_it_was_trained():
    network = small_teacher().network
    gray = torch.rand(2, 1, 12, 12)
    teacher = Teacher(network, 16, scale=(0.5, 1.0, 2.0), shift=(0.0, 1.0, -1.0))
    wanted = torch.cat([gray * 0.5, gray + 1, gray * 2 - 1], 1)
    torch.testing.assert_close(teacher(gray), F.normalize(network(wanted), dim=1))


def test_targets_are_float32_under_autocast():
    teacher, view = small_teacher(), views()[0].float()
    with torch.autocast('cpu', torch.bfloat16):
        found = teacher(view.bfloat16().float())
    assert found.dtype == torch.float32
    assert torch.equal(found, teacher(view.bfloat16().float()))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


# The queue


def test_queues_stay_aligned_after_a_wrap_around():
    """Row i of both belongs to the same image, whatever their dimensions."""
    method = QueueMethod()
    method.make_queues(6, wide=3, narrow=1)
    for step in range(5):
        image = torch.arange(2.0)[:, None] + 10 * step
        method.enqueue(wide=image.expand(-1, 3) * 100, narrow=image)
    assert torch.equal(method.wide, method.narrow.expand(-1, 3) * 100)
    assert method.narrow[:, 0].tolist() == [30, 31, 40, 41, 20, 21]
    assert method.queue_pointer == 4


def test_queues_of_the_step_before_make_room(monkeypatch):
    """They are as large as the queues, and are gone before the first of these is copied."""
    method = QueueMethod()
    method.make_queues(6, wide=3, narrow=1)
    method.hold_queues()
    before, copies, clone = [weakref.ref(of) for of in method.earlier.values()], [], torch.Tensor.clone

    def copy_of(tensor):
        assert not any(of() is not None for of in before)
        copies.append(clone(tensor))
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, 'clone', copy_of)
    method.hold_queues()
    assert all(map(torch.equal, copies, (method.wide, method.narrow)))
    assert [*method.earlier.values()] == copies


def test_queue_that_is_no_multiple():
    method = QueueMethod()
    method.make_queues(6, queue=3)
    with pytest.raises(InputError, match=r'queue_size 6 .*batch of 4'):
        method.enqueue(queue=torch.zeros(4, 3))


# SEED


def test_seed_in_closed_form():
    """Of two images and a queue of three: the loss, and its gradient (p_s - p_t) D / (2 tau_s)."""
    teacher, queue, student = unit(2, 2, seed=1), unit(3, 2, seed=2), unit(2, 2, seed=3).requires_grad_()
    target = F.softmax(similarities(teacher, teacher, queue) / 0.5, dim=1)
    loss = info_nce(similarities(student, teacher, queue), 0.2, target)
    loss.backward()
    expected, gradients = 0.0, []
    for z_s, z_t in zip(student.detach(), teacher, strict=True):
        candidates = torch.stack([z_t, *queue])
        p_t, p_s = ((z @ candidates.T / tau).exp() for z, tau in ((z_t, 0.5), (z_s, 0.2)))
        p_t, p_s = p_t / p_t.sum(), p_s / p_s.sum()
        expected -= (p_t * p_s.log()).sum().item() / 2
        gradients.append((p_s - p_t) @ candidates / 0.2 / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(student.grad, torch.stack(gradients))


@pytest.mark.parametrize(('widths', 'centre'), [(WIDTHS, False), ((0.5,), False), (WIDTHS, True)])
def test_seed_against_loops(widths, centre):
    """As the paper's section 3 describes it, at each width: number by number over candidates."""
    method, view = make(widths=widths, loss_weights='none', centre=centre), views()[0]
    other, earlier = copy.deepcopy(method), method.queue.clone()
    output = method([view], widths, 0.0)
    z_t = other.teacher(view)
    mean = sum(earlier) / len(earlier) if centre else 0
    own, negatives = ([(row - mean) / (row - mean).norm() for row in rows] for rows in (z_t, earlier))
    candidates = [[row, *negatives] for row in own]
    total = 0.0
    for width in widths:
        z_s = F.normalize(other.head(other.backbone.forward_at(view, width), width), dim=1)
        loss = 0.0
        for mine, its, rows in zip(z_s, own, candidates, strict=True):
            p = plain.softmax([(its @ row).item() for row in rows], 0.01)
            q = plain.softmax([(mine @ row).item() for row in rows], 0.2)
            loss -= sum(a * torch.tensor(b).log().item() for a, b in zip(p, q, strict=True)) / len(z_t)
        assert output[f'cross_entropy/{width:g}'].item() == pytest.approx(loss, rel=1e-5)
        total += loss
    assert output['loss'].item() == pytest.approx(total, rel=1e-5)
    assert torch.equal(method.queue, torch.cat([z_t, earlier[4:]]))


def test_seed_with_a_sharp_teacher_is_cross_entropy_to_the_first_candidate():
    method, view = make(teacher_temperature=1e-6), views()[0]
    other = copy.deepcopy(method)
    output = method([view], WIDTHS, 0.0)
    for width in WIDTHS:
        z_s = F.normalize(other.head(other.backbone.forward_at(view, width), width), dim=1)
        rows = similarities(z_s, other.teacher(view), other.queue).tolist()
        expected = plain.cross_entropy(rows, [0] * 4, 0.2)
        assert output[f'cross_entropy/{width:g}'].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('name', TAUGHT)
def test_microbatches_of_a_step_look_at_one_queue(name):
    method = make(name)
    method(views_for(name, 1), WIDTHS, 0.9)
    later = copy.deepcopy(method)
    later.queue.normal_()  # as if more had been added
    losses = []
    for of, momentum in (method, None), (later, None), (later, 0.9):
        torch.manual_seed(0)  # of the box of CutMix
        losses.append(of(views_for(name, 2), WIDTHS, momentum)['loss'])
    assert losses[0] == losses[1] != losses[2]


def test_every_width_learns_from_the_teacher_alone_unless_asked():
    assert not any(key.startswith('distillation') for key in make()(views(), WIDTHS, 0.0))
    assert 'distillation/0.5' in make(distillation='kd')(views(), WIDTHS, 0.0)


# DisCo


def test_squared_distance_in_closed_form():
    """2 - 2 cos of two images, and the gradient (z_s - z_t) of their mean."""
    student, teacher = unit(2, 3, seed=1).requires_grad_(), unit(2, 3, seed=2)
    loss = squared_distance(student, teacher)
    loss.backward()
    cosines = [
        sum(a * b for a, b in zip(s, t, strict=True)) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(2 - 2 * cosine for cosine in cosines) / 2, rel=1e-12)
    torch.testing.assert_close(student.grad, student.detach() - teacher)


@pytest.mark.parametrize('widths', [WIDTHS, (0.5,)])
def test_disco_against_loops(widths):
    """Both views of each width to the teacher, beside InfoNCE over the queue, and kd from the full width."""
    method, pair = make('disco', widths=widths), views()
    other, earlier = copy.deepcopy(method), method.queue.clone()
    output = method(pair, widths, 0.9)
    found = [{w: F.normalize(other.head(other.backbone.forward_at(v, w), w), dim=1) for w in widths} for v in pair]
    other.update_key_encoder(0.9)
    keys = other.encode_keys(pair[1])
    targets = [other.teacher(view).tolist() for view in pair]
    rows = {
        w: [[(q @ k).item(), *(q @ earlier.T).tolist()] for q, k in zip(found[0][w], keys, strict=True)] for w in widths
    }
    total = 0.0
    for width, weight in zip(widths, (1.5, 1) if len(widths) == 2 else (1,), strict=True):
        distance = sum(
            (a - b) ** 2
            for embeddings, target in zip(found, targets, strict=True)
            for z, t in zip(embeddings[width].tolist(), target, strict=True)
            for a, b in zip(z, t, strict=True)
        )
        assert output[f'teacher/{width:g}'].item() == pytest.approx(32 * distance / 4, rel=1e-6)
        loss = plain.cross_entropy(rows[width], [0] * 4, 0.2) + 32 * distance / 4
        total += weight * (loss if width == widths[0] else (loss + plain.kd(rows[width], rows[1.0], 5.0)) / 2)
    assert output['loss'].item() == pytest.approx(total, rel=1e-6)
    assert torch.equal(method.queue, torch.cat([keys, earlier[4:]]))


def test_disco_without_its_teacher_is_mocov2():
    method = make('disco', teacher_weight=0.0)
    plain_method = MoCoV2(copy.deepcopy(method.backbone), dim=16, hidden_dim=32, queue_size=8).double()
    plain_method.load_state_dict(method.state_dict())
    expected = plain_method(views(), WIDTHS, 0.9)
    output = method(views(), WIDTHS, 0.9)
    assert {key for key in output if not key.startswith('teacher')} == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(output[key], value, msg=key)


# CompRess


def test_compress_in_closed_form():
    """Of two images and queues of three: the divergence and the teacher's entropy, and the gradient (p_s - p_t) M_s."""
    teacher, of_teacher, of_student = unit(2, 4, seed=1), unit(3, 4, seed=2), unit(3, 2, seed=3)
    student = unit(2, 2, seed=4).requires_grad_()
    target = F.softmax(similarities(teacher, None, of_teacher) / 0.04, dim=1)
    loss = info_nce(similarities(student, None, of_student), 0.04, target)
    loss.backward()
    expected, gradients = 0.0, []
    for z_s, z_t in zip(student.detach(), teacher, strict=True):
        p_t = plain.softmax((of_teacher @ z_t).tolist(), 0.04)
        p_s = plain.softmax((of_student @ z_s).tolist(), 0.04)
        expected += (plain.divergence(p_t, p_s) - sum(p * math.log(p) for p in p_t)) / 2
        gradients.append((torch.tensor(p_s) - torch.tensor(p_t)).double() @ of_student / 0.04 / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(student.grad, torch.stack(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('widths', [WIDTHS, (0.5,)])
def test_compress_against_loops(widths):
    """Each width with its own queue, number by number; its queue takes the features of its copy, after the move."""
    method, view = make('compress', widths=widths, loss_weights='none'), views()[0]
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other = copy.deepcopy(method)
    earlier = method.queue.clone(), {w: method.get_buffer(name).clone() for w, name in method.queues.items()}
    output = method([view], widths, 0.9)
    z_t = other.teacher(view)
    total = 0.0
    for width in widths:
        z_s = F.normalize(other.backbone.forward_at(view, width), dim=1)
        rows = [plain.products(z, queue) for z, queue in ((z_t, earlier[0]), (z_s, earlier[1][width]))]
        loss = plain.kd(rows[1], rows[0], 0.04, squared=False)
        assert output[f'cross_entropy/{width:g}'].item() == pytest.approx(loss, rel=1e-5)
        total += loss
        moved = other.key_backbones[width_key(width)]
        trained = other.backbone.extract(width)
        with torch.no_grad():
            for mine, its in zip(moved.parameters(), trained.parameters(), strict=True):
                mine.copy_(0.9 * mine + 0.1 * its)
        keys = F.normalize(moved(view), dim=1)
        queue = method.get_buffer(method.queues[width])
        torch.testing.assert_close(queue, torch.cat([keys, earlier[1][width][4:]]))
        assert not torch.allclose(keys, z_s)
    assert output['loss'].item() == pytest.approx(total, rel=1e-5)
    assert torch.equal(method.queue, torch.cat([z_t, earlier[0][4:]]))


def test_queues_of_compress_stay_aligned():
    """Row i of each queue is of one image, after three batches in queues of two."""
    method = make('compress').eval()  # so that the features of an image do not depend on the batch
    for seed in 1, 2, 3:
        method(views(seed), WIDTHS, 0.0)
    images = torch.cat([views(3)[0], views(2)[0]])
    torch.testing.assert_close(method.queue, method.teacher(images))
    for width, name in method.queues.items():
        features = F.normalize(method.backbone.forward_at(images, width), dim=1)
        torch.testing.assert_close(method.get_buffer(name), features)
    assert method.queue_pointer == 4


@pytest.mark.parametrize('overlap', [True, False])
def test_momentum_copies_follow_their_width(overlap):
    """At momentum 0 a copy is what would be extracted, of widths that do not begin at channel 0, too."""
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=(1.0, 0.5, 0.25), overlap=overlap)
    for width in backbone.widths:
        copied = backbone.extract(width)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.normal_()
        EMA([(copied, backbone)], width).update(0.0)
        for mine, its in zip(copied.parameters(), backbone.extract(width).parameters(), strict=True):
            assert torch.equal(mine, its)


# BINGO


def test_bingo_in_closed_form():
    """l(q; c) of one positive and three negatives whose logits are known, and its gradient (p_c - 1) c + sum p_n n."""
    query, key, others = unit(2, 2, seed=1).requires_grad_(), unit(2, 2, seed=2), unit(3, 2, seed=3)
    loss = make('bingo')._contrast(query, key, query @ others.T)
    loss.backward()
    expected, gradients = 0.0, []
    for q, c in zip(query.detach(), key, strict=True):
        candidates = torch.stack([c, *others])
        p = torch.tensor(plain.softmax((candidates @ q).tolist(), 0.2)).double()
        expected -= p[0].log().item() / 2
        p[0] -= 1
        gradients.append(p @ candidates / 0.2 / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(query.grad, torch.stack(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('widths', 'centre'), [(WIDTHS, True), ((0.5,), False)])
def test_bingo_against_loops(widths, centre):
    """The three terms, number by number; the box of CutMix is that of the same draws."""
    method, of = make('bingo', widths=widths, loss_weights='none', centre=centre), views(count=4)
    other, earlier = copy.deepcopy(method), method.queue.clone()
    torch.manual_seed(7)
    output = method(of, widths, 0.0)
    torch.manual_seed(7)
    mixed, share = cutmix(of[0], of[2])
    share = share.item()
    teacher_rows = [other.teacher(of[1]), other.teacher(of[3]), earlier]
    mean = sum(earlier) / len(earlier) if centre else 0
    keys, its_keys, negatives = ([(row - mean) / (row - mean).norm() for row in rows] for rows in teacher_rows)
    total = 0.0
    for width in widths:
        q, its_q, mix = (
            F.normalize(other.head(other.backbone.forward_at(view, width), width), dim=1)
            for view in (of[0], of[2], mixed)
        )

        def contrast(query, key):
            row = [(query @ candidate).item() for candidate in (key, *negatives)]
            return -math.log(plain.softmax(row, 0.2)[0])

        loss = 0.0
        for i in range(4):
            loss += 0.5 * contrast(q[i], keys[i]) + 0.5 * contrast(q[i], its_keys[i])
            loss += 0.5 * contrast(its_q[i], its_keys[i]) + 0.5 * contrast(its_q[i], keys[i])
            loss += share * contrast(mix[i], keys[i]) + (1 - share) * contrast(mix[i], its_keys[i])
        total += loss / 3 / 4
    assert output['loss'].item() == pytest.approx(total, rel=1e-5)
    assert torch.equal(method.queue, torch.cat([teacher_rows[0], earlier[4:]]))


@pytest.mark.parametrize('early', [True, False])
def test_bingo_without_neighbours_is_mocov2_with_the_teacher_as_key_encoder(early):
    """The mean of both pairs; before `cross_after` epochs, or with no weight on the other image's key."""
    method = make('bingo', cutmix=False, **({'cross_after': 3} if early else {'cross_weight': 0.0}))
    method.set_epoch(2)
    of = views(count=4)
    expected = []
    for pair in of[:2], of[2:]:
        moco = MoCoV2(copy.deepcopy(method.backbone), dim=16, hidden_dim=32, queue_size=8, distillation='none').double()
        moco.load_state_dict({**moco.state_dict(), **method.state_dict()})
        moco.encode_keys = lambda view: method.teacher(view)
        expected.append(moco(pair, WIDTHS, 0.9)['loss'])
    assert method(of, WIDTHS, 0.9)['loss'].item() == pytest.approx(sum(expected).item() / 2, rel=1e-12)
    if early:
        method.set_epoch(3)
        assert method(of, WIDTHS, 0.9)['loss'].item() != pytest.approx(sum(expected).item() / 2, rel=1e-3)


def test_cutmix_pastes_one_box_and_tells_the_share():
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, share = cutmix(torch.zeros(2, 1, 12, 16), torch.ones(2, 1, 12, 16))
        assert torch.equal(mixed[0], mixed[1])
        box = mixed[0, 0]
        assert share.item() == pytest.approx(1 - box.mean().item())
        rows, columns = (box.amax(dim=axis).bool() for axis in (1, 0))
        assert torch.equal(box, (rows[:, None] & columns).float())
        for inside in rows, columns:
            assert (inside.int().diff().abs().sum() <= 2).item()


# Known features


@pytest.mark.parametrize('name', TAUGHT)
def test_known_features_take_the_place_of_a_look(name):
    """The same loss where they are those of the views; and the teacher is not asked."""
    method, of = make(name), views_for(name)
    other = copy.deepcopy(method)
    if name == 'disco':
        of[1] = of[0]
    seen = [method.teacher.features(view) for view in (of[1::2] if name == 'bingo' else of[:1])]
    needed = of[::2] if name == 'bingo' else of  # nobody looks at the others
    asked: list[int] = []
    for each in method, other:
        each.teacher.network.register_forward_hook(lambda *_: asked.append(1))
    torch.manual_seed(0)
    expected = method(of, WIDTHS, 0.9)['loss']
    assert asked
    asked.clear()
    torch.manual_seed(0)
    assert torch.equal(other(needed, WIDTHS, 0.9, cached=seen)['loss'], expected)
    assert not asked
