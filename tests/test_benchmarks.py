"""The baseline of the benchmarks computes the same, and ratios are robust."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from slimclr_hub.methods import MoCoV2

FOLDER = Path(__file__).parents[1] / 'benchmarks'
WIDTHS = (1.0, 0.5, 0.25)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_naive_baseline_computes_what_the_method_does():
    """Loss, gradients, momentum encoder and queue agree over two steps."""
    from naive import NaiveMoCoV2

    torch.manual_seed(0)
    naive = NaiveMoCoV2(WIDTHS, queue_size=16).double().train()
    backbone = timm.create_model('slimclr_resnet50', num_classes=0, widths=WIDTHS, zero_init_last=False)
    method = MoCoV2(backbone, queue_size=16).double().train()
    for ours, theirs in (method, naive.encoder), (method.key_backbone, naive.key_encoder[0]):
        fill(ours if ours is not method else method.backbone, theirs if ours is not method else theirs[0])
    with torch.no_grad():
        for head, encoder in (method.head, naive.encoder), (method.key_head, naive.key_encoder):
            for layer, other in (head.fc1, encoder[1]), (head.fc2, encoder[3]):
                layer.weight.copy_(other.weight)
                layer.bias.copy_(other.bias)
        method.queue.copy_(naive.queue.T)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        views = [torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator) for _ in range(2)]
        expected = naive(views, 0.9)
        loss = method(views, WIDTHS, 0.9)['loss']
        torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=1e-5)  # its softmax is in float32
    loss.backward()
    expected.backward()
    for name in 'conv1', 'layer1.0.conv2', 'layer4.2.conv3':
        ours, theirs = (m.get_submodule(name).weight for m in (method.backbone, naive.encoder[0]))
        assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm()
    torch.testing.assert_close(method.queue.T, naive.queue)
    torch.testing.assert_close(method.key_backbone.conv1.weight, naive.key_encoder[0].conv1.weight)


def fill(network, naive):
    """Copy the convolutions of the naive network; normalisation starts alike."""
    with torch.no_grad():
        for name, parameter in naive.named_parameters():
            if parameter.ndim == 4:
                network.get_parameter(name).copy_(parameter)


def test_ratio_is_taken_within_repetitions():
    """A machine that slows down tenfold between repetitions does not move a ratio of two."""
    from measure import timed

    row = timed([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert row['ratio'] == pytest.approx(2)
    assert row['ratio IQR (%)'] == pytest.approx(0)
    assert row['median (ms)'] == pytest.approx(2000)


@pytest.mark.parametrize('name', ['training_step', 'inference'])
def test_wrong_argument_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [name, '--repeats', '0'])
    with pytest.raises(SystemExit, match='2'):
        __import__(name).main()
    assert capsys.readouterr().err.splitlines()[-1].endswith('0 is not 1 or more')


def test_training_step_prints_its_tables(monkeypatch, capsys):
    options = '--model slimclr_resnet20 --size 8 --batch 4 --repeats 1 --release-memory'
    monkeypatch.setattr(sys, 'argv', ['training_step', *options.split()])
    __import__('training_step').main()
    printed = capsys.readouterr().out
    for words in 'slimclr_resnet20, mocov2, batch 4, 8x8', 'four widths', 'momentum encoder', 'torch':
        assert words in printed
