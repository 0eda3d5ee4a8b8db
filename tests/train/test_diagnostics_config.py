import pytest

from slimclr_hub.errors import InputError
from slimclr_hub.train.command import changes
from slimclr_hub.train.config import ModelConfig, PretrainConfig
from slimclr_hub.train.diagnostics import DiagnosticsConfig
from tests.train.test_config import parse, refusal


def test_nothing_is_recorded_unless_asked_for():
    assert not PretrainConfig().diagnostics.on
    for name in 'every', 'gradients', 'snapshots':
        assert DiagnosticsConfig(**{name: 3}).on
        assert getattr(parse(f'--diagnostics.{name}', '3').diagnostics, name) == 3


@pytest.mark.parametrize(
    ('widths', 'smallest', 'expected'),
    [((1.0, 0.5, 0.25), None, 0.25), ((1.0,), None, 0.25), ((0.5,), None, 0.125), ((1.0, 0.5), 0.75, 0.75)],
)
def test_smallest_width(widths, smallest, expected):
    assert DiagnosticsConfig(smallest=smallest).smallest_of(widths) == expected


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['--diagnostics.every', '-1'], 'diagnostics.every is -1; give 0 or more'),
        (['--diagnostics.gradients', '-2'], 'diagnostics.gradients is -2; give 0 or more'),
        (['--diagnostics.snapshots', 'often'], 'often'),
        (['--diagnostics.smallest', '1.5'], 'diagnostics.smallest 1.5'),
        (['--diagnostics.every', '5', '--diagnostics.smallest', '1.0'], 'is not below the full width 1'),
        (['--diagnostics.norms', '5'], 'norms'),
    ],
)
def test_mistake(arguments, named):
    assert named in refusal(*arguments)


def test_width_without_channels_of_its_own():
    model = ModelConfig(widths=(1.0, 0.5, 0.25), overlap=False)
    assert PretrainConfig(model=model, diagnostics=DiagnosticsConfig(every=1, smallest=0.5)).diagnostics.on
    with pytest.raises(InputError, match=r'diagnostics\.smallest 0\.125 is not one of model\.widths'):
        PretrainConfig(model=model, diagnostics=DiagnosticsConfig(every=1, smallest=0.125))


def test_resumed_run_may_record_something_else():
    assert changes(parse(), parse('--diagnostics.every', '3', '--diagnostics.snapshots', '10')) == []
