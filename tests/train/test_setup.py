"""From a configuration to a network: what training starts from."""

import copy

import pytest
import timm
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.hub.folder import convert_file
from slimclr_hub.models.calibrate import is_calibrated
from slimclr_hub.train.config import ModelConfig, OptimConfig
from slimclr_hub.train.setup import make_backbone, make_optimizer


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A plain ResNet-50, and what `slimclr-hub convert` makes of it."""
    place = tmp_path_factory.mktemp('plain')
    torch.manual_seed(0)
    network = timm.create_model('resnet50', zero_init_last=False)
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))  # for statistics
    network.eval()
    torch.save(network.state_dict(), place / 'resnet50.pth')
    done = convert_file(place / 'resnet50.pth', place / 'start')
    assert not done.calibrated
    return network, done.path


@pytest.mark.parametrize('file', ['', 'model.safetensors'])
def test_starts_from_a_plain_network(plain, file):
    network, start = plain
    backbone = make_backbone(ModelConfig('slimclr_resnet50', weights=str(start / file)), in_chans=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(backbone.forward_at(x, 1.0), expected, rtol=1e-5, atol=1e-5)
    # The narrow widths have seen nothing yet, which the evaluation before training finds out by this.
    assert [is_calibrated(backbone, width) for width in backbone.widths] == [True, False, False, False]


def test_starts_from_some_of_the_widths(plain):
    backbone = make_backbone(ModelConfig('slimclr_resnet50', widths=(0.5,), weights=str(plain[1])), in_chans=1)
    assert backbone.conv1.weight.shape == (32, 1, 7, 7)
    torch.testing.assert_close(backbone.conv1.weight, plain[0].conv1.weight[:32].sum(1, keepdim=True))


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        (ModelConfig('slimclr_resnet50', weights='/nowhere'), 'model.weights /nowhere: .*does not exist'),
        (ModelConfig('slimclr_resnet20x4', weights='pretrained'), 'no pretrained weights of slimclr_resnet20x4'),
    ],
)
def test_weights_that_are_not_there(config, words):
    with pytest.raises(InputError, match=words):
        make_backbone(config, in_chans=3)


def test_weights_of_another_network(plain):
    with pytest.raises(InputError, match=r'model\.weights .*\(3, 4, 6, 3\).*\(3, 3, 3\)'):
        make_backbone(ModelConfig('slimclr_resnet20', weights=str(plain[1])), in_chans=3)


# The optimizer


def network():
    torch.manual_seed(0)
    return (
        timm.create_model('slimclr_resnet20', num_classes=3, widths=(1.0, 0.5), zero_init_last=False).double().train()
    )


@pytest.mark.parametrize(
    'config', [OptimConfig('momentum', lr=0.1), OptimConfig('adamw', lr=0.01)], ids=lambda c: c.name
)
def test_fused_steps_are_those_of_the_plain_optimizer(config):
    """Through the end of slow start, too, from which on narrow widths have gradients, and after a checkpoint of it."""
    models = network(), network()
    fused, plain = (make_optimizer(config, model, fused) for model, fused in zip(models, (True, False), strict=True))
    assert fused.param_groups[0]['fused']
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for widths in (1.0,), (1.0,), (1.0, 0.5), (1.0, 0.5):
        for model, optimizer in zip(models, (fused, plain), strict=True):
            optimizer.zero_grad()
            sum(output.square().mean() for output in model.forward_widths(x, widths).values()).backward()
            optimizer.step()
        fused.load_state_dict(copy.deepcopy(fused.state_dict()))
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
    moved = [not torch.equal(a, b) for a, b in zip(models[0].parameters(), network().parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ('name', 'args', 'fused'),
    [
        ('momentum', {}, True),
        ('momentum', {'foreach': True}, None),
        ('momentum', {'dampening': 0.5}, None),
        ('momentum', {'fused': False}, False),
        ('lars', {}, None),
    ],
)
def test_which_optimizers_are_fused(name, args, fused):
    optimizer = make_optimizer(OptimConfig(name, args=args), network())
    assert optimizer.param_groups[0].get('fused') is fused


def test_no_decay_of_biases_and_normalisation():
    """Against the parameters' own dimensions, and SGD without gradients moves weights by decay alone."""
    model = network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimConfig('momentum', lr=0.1, weight_decay=0.5, filter_bias_and_bn=True)
    optimizer = make_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        left = 0.95 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter, left * before[name], msg=name)


def test_optimizer_that_does_not_exist():
    with pytest.raises(InputError, match=r"optim\.name 'nosuch'.*list_optimizers"):
        make_optimizer(OptimConfig('nosuch'), network())
