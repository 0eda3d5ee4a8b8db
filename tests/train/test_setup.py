"""From a configuration to a network: what training starts from."""

import pytest
import timm
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.hub.conversion import convert_file
from slimclr_hub.models.calibrate import is_calibrated
from slimclr_hub.train.config import ModelConfig
from slimclr_hub.train.setup import make_backbone


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
        (ModelConfig('slimclr_resnet20', weights='pretrained'), 'no pretrained weights of slimclr_resnet20'),
    ],
)
def test_weights_that_are_not_there(config, words):
    with pytest.raises(InputError, match=words):
        make_backbone(config, in_chans=3)


def test_weights_of_another_network(plain):
    with pytest.raises(InputError, match=r'model\.weights .*\(3, 4, 6, 3\).*\(3, 3, 3\)'):
        make_backbone(ModelConfig('slimclr_resnet20', weights=str(plain[1])), in_chans=3)
