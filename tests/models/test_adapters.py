"""PEFT's adapters: beside the ordinary layers of one width, and beside the heads that each width has for itself."""

import pytest
import timm
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

from slimclr_hub.errors import InputError
from slimclr_hub.models import DEFAULT_WIDTHS

CONVOLUTIONS = ['conv1', 'conv2']


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('slimclr_resnet20', num_classes=5, zero_init_last=False, **kwargs).eval()


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train_a_step(model, width=None):
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    outputs = model(images()) if width is None else model.forward_at(images(), width)
    torch.nn.functional.cross_entropy(outputs, torch.arange(4)).backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all('lora_' in name for name in moved)


@pytest.mark.parametrize('width', [1.0, 0.25])
@pytest.mark.parametrize(
    ('adapter', 'name'),
    [
        (LoraConfig(r=2, target_modules=CONVOLUTIONS), 'conv1'),
        (LoraConfig(r=2, target_modules=['fc']), 'fc'),  # at width 1.0 it would work
        (LoHaConfig(r=2, target_modules=['0.conv2']), 'conv2'),  # likewise
        (IA3Config(target_modules=['downsample.0'], feedforward_modules=[]), '0'),
    ],
)
def test_layers_that_know_widths_are_not_adapted(adapter, name, width):
    model = small(head='slimmable')
    model.set_width(width)
    before = model.forward_widths(images())
    with pytest.raises(InputError, match=rf'^{name} cannot be a peft\.tuners\.\S+, .* model\.extract\(WIDTH\)$'):
        get_peft_model(model, adapter)
    assert all(torch.equal(output, before[width]) for width, output in model.forward_widths(images()).items())


@pytest.mark.parametrize('width', DEFAULT_WIDTHS)
def test_an_extracted_network_is_adapted_trained_and_merged(width):
    dense = small().extract(width)
    adapted = get_peft_model(dense, LoraConfig(r=2, target_modules=[*CONVOLUTIONS, 'downsample.0', 'fc']))
    torch.testing.assert_close(adapted(images()), small().forward_at(images(), width))
    train_a_step(adapted)
    outputs = adapted(images())
    merged = adapted.merge_and_unload()
    assert type(merged) is type(small().extract(width))
    assert merged.state_dict().keys() == small().extract(width).state_dict().keys()
    torch.testing.assert_close(merged(images()), outputs)


def test_the_head_of_each_width_is_adapted():
    """It is an ordinary layer; one step of a width leaves the others as they were."""
    model = small()
    get_peft_model(model, LoraConfig(r=2, target_modules=r'fc\.w\d+'))
    before = model.forward_widths(images())
    train_a_step(model, 0.25)
    after = model.forward_widths(images())
    assert [width for width in DEFAULT_WIDTHS if not torch.equal(after[width], before[width])] == [0.25]
