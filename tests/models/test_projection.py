"""Projection heads of checkpoints, as pre-training elsewhere and here writes them."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.registry import training_of
from slimclr_hub.models.projection import projection_head
from slimclr_hub.weights.checkpoint import read_checkpoint


def mlp(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(*layers)
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            layer(torch.randn(9, layer.num_features))
    return head.eval()


def moco_v2() -> nn.Sequential:
    return mlp(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def swav() -> nn.Sequential:
    return mlp(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))


def moco_v3() -> nn.Sequential:
    hidden = (nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
    return mlp(*hidden, nn.Linear(32, 8, bias=False), nn.BatchNorm1d(8, affine=False))


def checkpoint(backbone: str, head: str, of: nn.Module) -> dict[str, torch.Tensor]:
    body = timm.create_model('resnet18', num_classes=0).state_dict()
    return {f'{backbone}{k}': v for k, v in body.items()} | {f'{head}{k}': v for k, v in of.state_dict().items()}


@pytest.mark.parametrize(
    ('backbone', 'place', 'make'),
    [
        ('module.encoder_q.', 'module.encoder_q.fc.', moco_v2),
        ('module.base_encoder.', 'module.base_encoder.fc.', moco_v3),
        ('module.', 'module.projection_head.', swav),
        ('backbone.', 'projection_head.layers.', swav),
        ('model.', 'model.projector.', moco_v2),
    ],
)
def test_heads_of_others(backbone, place, make):
    """By layer numbers alone, a ReLU where one is left out; the head of the momentum encoder is another."""
    head, x = make(), torch.randn(5, 64)
    tensors = checkpoint(backbone, place, head)
    tensors |= {f'module.encoder_k.fc.{k}': torch.zeros_like(v) for k, v in head.state_dict().items()}
    found = projection_head(tensors)
    assert not found.training
    torch.testing.assert_close(found(x), head(x), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['mocov2', 'linear', 'mocov3', 'simclr'])
@pytest.mark.parametrize('widths', [(1.0, 0.5), (0.5,)])
def test_heads_of_our_own_runs(tmp_path, name, widths):
    """At the largest width, whatever narrower ones stand beside it."""
    torch.manual_seed(0)
    backbone = timm.create_model('slimclr_resnet20', num_classes=0, widths=widths)
    if name == 'linear':
        method = METHODS['mocov2'](backbone, head='linear', dim=8, queue_size=8)
    else:
        method = METHODS[name](backbone, hidden_dim=32, dim=8, **({'queue_size': 8} if name == 'mocov2' else {}))
        method.train()([torch.randn(4, 3, 12, 12) for _ in range(training_of(name).views)], widths, 0.9)
    torch.save(method.eval().state_dict(), tmp_path / 'run.pth')
    found = projection_head(read_checkpoint(tmp_path / 'run.pth'))
    x = torch.randn(5, int(64 * widths[0]))
    torch.testing.assert_close(found(x), method.head(x, widths[0]))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_head_is_a_copy_of_its_file(tmp_path, suffix):
    path, tensors = tmp_path / f'run{suffix}', checkpoint('encoder_q.', 'encoder_q.fc.', moco_v2())
    torch.save(tensors, path) if suffix == '.pth' else save_file(tensors, path)
    found, x = projection_head(read_checkpoint(path)), torch.randn(5, 64)
    before = found(x)
    with path.open('r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert found(x).equal(before)


@pytest.mark.parametrize(
    ('place', 'change', 'named'),
    [
        ('elsewhere.fc.', {}, r'no projection head beside encoder_q\.conv1\.weight; .*encoder_q\.'),
        ('encoder_q.fc.', {'encoder_q.head.0.weight': torch.ones(8, 64)}, r'several .*encoder_q\.fc, encoder_q\.head'),
        (
            'encoder_q.fc.',
            {'encoder_q.fc.0.weight': torch.ones(31, 64)},
            r'fc\.0 has tensors .*31.*not those of',
        ),
        ('encoder_q.fc.', {'encoder_q.fc.1.weight': torch.ones(32, 32, 1, 1)}, r'fc\.1 is neither a linear layer nor'),
        ('encoder_q.fc.', {'encoder_q.fc.3.weight': torch.ones(4, 9)}, r'fc\.3 takes 9 features, .*before it gives 8'),
        ('encoder_q.fc.', {'encoder_q.fc.2.weight': torch.ones(0, 32)}, r'fc\.2 takes 32 features and gives 0'),
        (
            'encoder_q.fc.',
            {'encoder_q.fc.1.running_mean': torch.tensor(1.0)},
            r'fc\.1 has tensors .*not those of B',
        ),
        ('encoder_q.fc.', {'encoder_q.fc.2.bias': torch.full([8], torch.nan)}, r'fc\.2\.bias holds NaN'),
        ('encoder_q.fc.', {'encoder_q.fc.2.weight': torch.ones(8, 32).long()}, r'fc\.2\.weight is of torch\.int64'),
        ('encoder_q.fc.', {'encoder_q.fc.2.weight': torch.ones(8, 32).to_sparse()}, r'fc\.2\.weight is sparse'),
    ],
)
def test_damaged_heads(place, change, named):
    with pytest.raises(InputError, match=named):
        projection_head(checkpoint('encoder_q.', place, moco_v2()) | change)
