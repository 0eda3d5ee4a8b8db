"""The width that a budget chooses, against a choice by hand; tables from elsewhere; and what is measured."""

import json
import logging
import math
import signal
from dataclasses import asdict, replace

import pytest
import timm
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.inference.latency import measure
from slimclr_hub.models import DEFAULT_WIDTHS, budget
from slimclr_hub.models.budget import Budget, QueryTable, Setting, Timing, choose, machine_of, read_table, table_path
from slimclr_hub.models.lazy import LazySlimmableResNet
from slimclr_hub.version import __version__

MIB = {1.0: 1.05, 0.75: 0.59, 0.5: 0.27, 0.25: 0.07}
SETTING = Setting(28, 1, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of assets of its own, where tables are kept."""
    monkeypatch.setattr(budget, 'cached_assets_path', lambda library, namespace: tmp_path / library / namespace)


@pytest.fixture(scope='module')
def model():
    return timm.create_model('slimclr_resnet20', pretrained=True).eval()


def table(setting=SETTING, widths=DEFAULT_WIDTHS, **changes):
    """A table in which width w takes 10 w milliseconds, and the slowest repeat twice that."""
    timings = tuple(Timing(width, setting, 10 * width, 20 * width, 5) for width in widths)
    versions = {'slimclr_hub': __version__, 'torch': torch.__version__}
    return QueryTable(**{'machine': machine_of('cpu'), 'versions': versions, 'timings': timings, **changes})


def test_description(model):
    described = model.describe()
    assert [each.width for each in described] == list(DEFAULT_WIDTHS)
    for each in described:
        dense = model.extract(each.width)
        assert each.parameters == sum(parameter.numel() for parameter in dense.parameters())
        held = sum(tensor.numel() * tensor.element_size() for tensor in dense.state_dict().values())
        assert each.mib == held / 2**20
        assert each.features == dense.num_features
    assert model.describe(14)[0].multiply_adds < described[0].multiply_adds / 3
    assert timm.create_model('slimclr_resnet20').half().describe()[0].mib < 0.6 * described[0].mib


def test_description_of_a_lazy_network_reads_nothing():
    lazy = timm.create_model('slimclr_resnet20', pretrained=True, width=0.25, lazy=True)
    before = sum(parameter.numel() for parameter in lazy.parameters())
    described = lazy.describe()
    assert [round(each.mib, 2) for each in described] == list(MIB.values())
    assert sum(parameter.numel() for parameter in lazy.parameters()) == before


@pytest.mark.parametrize(
    ('limits', 'expected'),
    [
        ({'max_mib': 5}, 1.0),
        ({'max_mib': 0.6}, 0.75),
        ({'max_macs': 7.9e6}, 0.5),
        ({'max_macs': 7.8e6}, 0.25),
        ({'max_ms': 15}, 0.75),  # by the slowest repeat
        ({'max_ms': 14.9}, 0.5),
        ({'max_ms': 15, 'max_mib': 0.3}, 0.5),
        ({'max_ms': 5, 'max_mib': 0.3, 'max_macs': 1e9}, 0.25),
    ],
)
def test_the_widest_width_that_fits(model, limits, expected):
    table().save(table_path(model))
    by_hand = [
        each.width
        for each in model.describe(28)
        if each.mib <= limits.get('max_mib', math.inf)
        and each.multiply_adds <= limits.get('max_macs', math.inf)
        and 20 * each.width <= limits.get('max_ms', math.inf)
    ]
    assert max(by_hand) == expected
    choice = choose(model, Budget(**limits), SETTING)
    assert choice.width == expected
    assert f'width {expected:g} needs' in choice.why
    assert ('would need' in choice.why) == (expected < 1)


def test_networks_are_made_at_the_width_that_fits(model, caplog, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    table().save(table_path(model))
    limits = {'max_ms': 16, 'max_mib': 0.3}
    for kwargs in {'pretrained': True}, {'pretrained': True, 'lazy': True}, {'features_only': True}:
        with caplog.at_level(logging.INFO, 'slimclr_hub'):
            opened = timm.create_model('slimclr_resnet20', **limits, **kwargs)
        assert 'Within the budget width 0.5 needs 0.27 MiB, 10 ms; width 0.75 would need 0.59 MiB' in caplog.messages
        caplog.clear()
        features = opened.feature_info.channels()[-1] if 'features_only' in kwargs else opened.num_features
        assert features == 32
        assert isinstance(opened, LazySlimmableResNet) == ('lazy' in kwargs)


@pytest.mark.parametrize(
    ('limits', 'message'),
    [
        ({'max_mib': 0.05}, r'no width fits max_mib=0\.05; width 0\.25 would need 0\.07 MiB'),
        (
            {'max_ms': 1, 'max_macs': 1e6},
            r'max_ms=1, max_macs=1e\+06; width 0\.25 would need 2\.02 M .*, 5 ms',
        ),
        ({'max_ms': 0}, r'max_ms 0 is not above 0'),
        ({'max_mib': math.nan}, r'max_mib nan is not above 0'),
        ({'max_macs': 'much'}, r"max_macs 'much' is not above 0"),
    ],
)
def test_what_does_not_fit(model, limits, message):
    table().save(table_path(model))
    with pytest.raises(InputError, match=message):
        choose(model, Budget(**limits), SETTING)


def test_two_choices_are_one_too_many():
    with pytest.raises(InputError, match=r'width=0\.5 and a budget both choose the width'):
        timm.create_model('slimclr_resnet20', width=0.5, max_mib=3)


OTHERS = {
    'none': (None, r'nothing was measured on this machine yet; measure first: slimclr-hub latency NETWORK --size 28 '),
    'machine': (table(machine='an abacus'), r'is of an abacus, not of .*; slimclr-hub latency'),
    'torch': (
        table(versions={'slimclr_hub': __version__, 'torch': '0.4'}),
        r'is of torch 0\.4, not .*again: slimclr-hub',
    ),
    'package': (table(versions={'slimclr_hub': '0', 'torch': torch.__version__}), 'is of slimclr_hub 0, not'),
    'widths': (table(widths=(1.0, 0.5)), r'nothing was measured at widths 0\.75, 0\.25 with batches of 1'),
    'threads': (table(Setting(28, 1, 7)), 'nothing was measured at widths .* threads: 1; slimclr-hub latency'),
    'runtime': (table(Setting(28, 1, 1, 'openvino')), 'nothing was measured at widths .*28x28, torch, threads'),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_tables_of_something_else_are_refused(model, kind):
    found, message = OTHERS[kind]
    if found is not None:
        found.save(table_path(model))
    with pytest.raises(InputError, match=message):
        choose(model, Budget(max_ms=20), SETTING)


def whole(**changes):
    timing = {**asdict(table().timings[0]), **changes}
    return {'machine': 'm', 'versions': {}, 'timings': [timing]}


@pytest.mark.parametrize(
    'content',
    [
        '',
        '[]',
        'null',
        '[' * 100_000,
        ' ' * (1 << 20) + '{}',
        {**whole(), 'machine': 3},
        {**whole(), 'versions': {'torch': 2}},
        {**whole(), 'timings': 3},
        whole(median=0),
        whole(median=math.nan),
        whole(slowest='20'),
        whole(slowest=10**400),
        whole(repeats=0),
        whole(setting=[]),
        whole(setting={'size': 28, 'runtime': 'abacus'}),
        whole(setting={'size': -1}),
        whole(setting={'size': 28, 'more': 1}),
    ],
    ids=lambda content: str(content)[-40:],
)
def test_damaged_tables(model, tmp_path, content):
    table_path(model).parent.mkdir(parents=True)
    table_path(model).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match='is no table of times; remove it, and measure again'):
        choose(model, Budget(max_ms=20), SETTING)


def test_tables_join(model, tmp_path):
    old, other = table(), table(Setting(28, 1, 2))
    other = replace(other, versions={**other.versions, 'openvino': '1'})
    both = old.with_timings(other)
    assert both.timings == (*old.timings, *other.timings)
    assert both.versions == other.versions
    again = table(widths=(1.0,))
    assert both.with_timings(again).slowest(SETTING) == {width: 20 * width for width in DEFAULT_WIDTHS}
    for newer in replace(again, machine='m'), replace(again, versions={'torch': '3'}):
        assert both.with_timings(newer) == newer
    both.save(tmp_path / 'table.json')
    assert read_table(tmp_path / 'table.json') == both


def test_measurement_runs_every_case_as_often(model):
    settings = [
        Setting(28, batch, 1, runtime) for batch, runtime in ((2, 'torch'), (1, 'onnxruntime'), (1, 'openvino'))
    ]
    shapes = []
    handle = model.conv1.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    threads, mode = torch.get_num_threads(), model.train().training
    try:
        found = measure(model, settings, repeats=2, widths=(0.5, 0.25), progress=False)
    finally:
        handle.remove()
    assert shapes.count((2, 3, 28, 28)) == 2 * (2 + 3)  # at two widths, after a warm-up of three
    assert {(timing.width, timing.setting) for timing in found.timings} == {
        (w, s) for w in (0.5, 0.25) for s in settings
    }
    assert found.versions.keys() == {'slimclr_hub', 'torch', 'onnxruntime', 'openvino'}
    assert found.machine == machine_of('cpu')
    # Signals still have a stack: OpenVINO's would be freed by now, and this process with it.
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(True))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received
    assert (torch.get_num_threads(), model.training) == (threads, mode)
    model.eval()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'runtime': 'tvm'}, "runtime 'tvm' is not one of torch, onnxruntime, openvino"),
        ({'size': 0}, 'size is 0; give 1 or more'),
        ({'device': 'gpu'}, "device 'gpu' is none of PyTorch"),
        ({'runtime': 'openvino', 'device': 'cuda'}, "device 'cuda': openvino is measured on the cpu"),
    ],
)
def test_settings(change, message):
    with pytest.raises(InputError, match=message):
        Setting(**{'size': 28, **change})


def test_a_numbered_device_is_measured_as_its_kind():
    assert Setting(28, device='cuda:0') == Setting(28, device='cuda')
