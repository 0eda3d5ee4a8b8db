"""MoCo v3 against numbers recorded from the authors' implementation: forward, and four training steps."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import Lars

from slimclr_hub.methods import MoCoV3
from slimclr_hub.methods.heads import SlimmableProjector
from slimclr_hub.weights.layouts import DESCENDING
from tests.reference import DATA, TRAINING, fill, fill_backbone, image, reference_name

FORWARD = load_file(DATA / 'forward.safetensors')
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


def test_training_steps():
    recorded = TRAINING['mocov3']
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    method = MoCoV3(timm.create_model('slimclr_resnet50', num_classes=0))
    fill_backbone(method.backbone)
    fill(method.head, {name: head_name(name, 'fc') for name in method.head.state_dict()})
    fill(method.predictor, {name: 'predictor.' + head_name(name, 'x')[2:] for name in method.predictor.state_dict()})
    method.key_backbone.load_state_dict(method.backbone.extract(1.0).state_dict())
    method.key_head.load_state_dict(method.head.extract(1.0).state_dict())
    trained = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in trained if p.ndim == 1], 'weight_decay': 0.0},
        {'params': [p for p in trained if p.ndim > 1], 'weight_decay': 1e-6},
    ]
    print([len(g['params']) for g in groups], recorded['groups'])
    optimizer = Lars(groups, lr=1.0, momentum=0.9, trust_coeff=0.001)
    method.train()
    for step in recorded['steps']:
        widths = WIDTHS if step['epoch'] >= 1 else WIDTHS[:1]
        views = [image(f'{view}{step["step"]}', recorded['batch']) for view in 'qk']
        output = method(views, widths, step['momentum'])
        for group in optimizer.param_groups:
            group['lr'] = step['lr']
        optimizer.zero_grad(set_to_none=True)
        output['loss'].backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained if p.grad is not None]))
        optimizer.step()
        print(step['step'], output['loss'].item(), step['loss'], norm.item(), step['grad_norm'])
    torch.set_num_threads(threads)
