"""MoCo v3 against numbers recorded from the authors' implementation: forward, and four training steps."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file

from slimclr_hub.methods import MoCoV3
from slimclr_hub.methods.heads import SlimmableProjector
from slimclr_hub.runs.schedule import Schedule
from slimclr_hub.train.config import OptimConfig
from slimclr_hub.train.setup import make_optimizer
from tests.reference import DATA, DESCENDING, TRAINING, fill, fill_backbone, image, reference_name

FORWARD = load_file(DATA / 'forward.safetensors')
RECORDED = TRAINING['mocov3']
WIDTHS = (1.0, 0.75, 0.5, 0.25)
LAYERS = {'fc1': '0', 'bn1': '1', 'fc2': '3', 'bn2': '4'}


def head_name(name: str, prefix: str) -> str:
    """The authors' name of a projector's or predictor's tensor."""
    layer, *rest = name.split('.')
    rest = [f'bn.{DESCENDING.index(part)}' if part in DESCENDING else part for part in rest]
    return '.'.join([prefix, LAYERS[layer], *rest])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@torch.inference_mode()
def test_forward():
    backbone = timm.create_model('slimclr_resnet50', num_classes=0).eval()
    fill_backbone(backbone)
    head = SlimmableProjector(2048, 4096, 256, WIDTHS).eval()
    fill(head, {name: head_name(name, 'fc') for name in head.state_dict()})
    for width in WIDTHS:
        out = head(backbone.forward_at(image('input', 2), width), width)
        assert relative(out, FORWARD[f'mocov3/out/{width}']) < 1e-4


def make():
    method = MoCoV3(timm.create_model('slimclr_resnet50', num_classes=0))
    fill_backbone(method.backbone)
    fill(method.head, {name: head_name(name, 'fc') for name in method.head.state_dict()})
    fill(method.predictor, {name: head_name(name, 'predictor') for name in method.predictor.state_dict()})
    method.key_backbone.load_state_dict(method.backbone.extract(1.0).state_dict())
    method.key_head.load_state_dict(method.head.extract(1.0).state_dict())
    return method.train()


def under_the_authors_names(method):
    """All tensors but the key head's."""
    tensors = {f'base_encoder.{reference_name(name)}': value for name, value in method.backbone.state_dict().items()}
    for name, value in method.key_backbone.state_dict().items():
        full = name if name in method.backbone.state_dict() else '{0}.w100.{2}'.format(*name.rpartition('.'))
        tensors[f'momentum_encoder.{reference_name(full)}'] = value
    for name, value in method.head.state_dict().items():
        tensors[f'base_encoder.{head_name(name, "fc")}'] = value
    for name, value in method.predictor.state_dict().items():
        tensors[head_name(name, 'predictor')] = value
    return tensors


class Lars(torch.optim.Optimizer):
    """You, Gitman & Ginsburg 2017 (https://arxiv.org/abs/1708.03888), algorithm 1, one tensor after the other.

    With weights w, gradient g, decay b and trust t: v <- m v + t |w| / (|g| + b |w|) (g + b w), and w <- w - lr v.
    Tensors of one dimension move by their gradient as it is. `together` divides by |g + b w|, as MoCo v3 does.
    """

    def __init__(self, parameters, decay=1e-6, momentum=0.9, trust=1e-3, together=False):
        super().__init__(parameters, {'lr': 1.0})
        self.decay, self.momentum, self.trust, self.together = decay, momentum, trust, together

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for w in group['params']:
            if w.grad is not None:
                velocity = self.state[w].setdefault('velocity', torch.zeros_like(w))
                velocity.mul_(self.momentum).add_(w.grad if w.ndim == 1 else self.adapted(w, w.grad))
                w.add_(velocity, alpha=-group['lr'])

    def adapted(self, w, g):
        direction = g.add(w, alpha=self.decay)
        size = direction.norm() if self.together else g.norm() + self.decay * w.norm()
        return direction * (self.trust * w.norm() / size)


@pytest.mark.usefixtures('as_recorded')
def test_training_steps():
    """Losses and gradient norm of four steps, slow start in the first two, and tensors after them.

    By a LARS that rounds as the authors' does: this start amplifies a difference of 1e-7, as another number of threads
    or another processor's kernels makes, to five per cent at the third step; hence the plain paths, as for MoCo v2. The
    last two steps are held to 1e-3
    where the losses of the first two come out to the last bit, and to ten per cent where they do not.
    """
    schedule = Schedule(
        epochs=RECORDED['epochs'],
        steps_per_epoch=RECORDED['total_steps'] // RECORDED['epochs'],
        warmup_epochs=1,
        lr=1.2,
        lr_after_slow_start=3.2,
        widths=WIDTHS,
        slow_start_epochs=1,
        momentum=0.99,
        momentum_schedule='cosine',
    )
    method = make()
    directions, objective = [], method.objective

    def keep(*args, **kwargs):
        directions.append(objective(*args, **kwargs))
        return directions[-1]

    method.objective = keep
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = Lars(trained, together=True)
    tolerance, same_rounding = 1e-3, True
    for step in RECORDED['steps']:
        widths, momentum = schedule.widths_at(step['step']), schedule.momentum_at(step['step'])
        optimizer.param_groups[0]['lr'] = schedule.lr_at(step['step'])
        output = method([image(f'{view}{step["step"]}', RECORDED['batch']) for view in 'qk'], widths, momentum)
        optimizer.zero_grad()
        output['loss'].backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained if p.grad is not None]))
        optimizer.step()

        assert momentum == pytest.approx(step['momentum'], rel=1e-9)
        assert schedule.lr_at(step['step']) == pytest.approx(step['lr'], rel=1e-9)
        if step['step'] < 2:
            same_rounding &= output['loss'].item() == step['loss']
        elif not same_rounding:
            tolerance = 0.1
        assert output['loss'].item() == pytest.approx(step['loss'], rel=tolerance)
        losses = [directions[-2].get(f'loss/{width:g}', torch.zeros(())).item() for width in WIDTHS]
        assert losses == pytest.approx(step['losses_view1'], rel=tolerance)
        assert norm.item() == pytest.approx(step['grad_norm'], rel=tolerance)

    ours = under_the_authors_names(method)
    for name, (norm, head) in RECORDED['final'].items():
        flat = ours[name].flatten()
        assert flat.norm().item() == pytest.approx(norm, rel=tolerance), name
        assert flat[:4].tolist() == pytest.approx(head, rel=tolerance, abs=tolerance * abs(max(head, key=abs))), name


@pytest.mark.parametrize(
    ('decay', 'args', 'together', 'tolerance'),
    [(1e-2, {'eps': 0.0}, False, 1e-12), (1e-6, {}, True, 1e-6)],
    ids=['the formula', 'as MoCo v3 calls it'],
)
def test_lars_of_the_configuration(decay, args, together, tolerance):
    """timm's `lars` with `filter_bias_and_bn` against the transcription, momentum and a tensor that waits included."""
    torch.manual_seed(0)
    ours = SlimmableProjector(6, 8, 4, WIDTHS).double()
    theirs = copy.deepcopy(ours)
    config = OptimConfig(
        'lars', lr=0.3, weight_decay=decay, filter_bias_and_bn=True, args={'trust_coeff': 0.01, **args}
    )
    optimizers = Lars(ours.parameters(), decay, trust=0.01, together=together), make_optimizer(config, theirs)
    for step in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            if step or a.ndim > 1:
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = 0.3 / (1 + step)
            optimizer.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=name)
