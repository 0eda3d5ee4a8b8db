"""Memory for loading one width: that of the network itself, and little more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from slimclr_hub.weights.tensor_file import save_tensors

pytestmark = pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='Linux tells the peak of its memory')

# What the first network had taken for a while only must not be there for the second to use unseen.
GIVE_BACK = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}

# One network is made before, and kept: what importing and the first use of everything takes is not what is measured.
SCRIPT = """
import json, re, sys
import timm, slimclr_hub

def memory(name):
    with open('/proc/self/status') as file:
        return int(re.search(rf'{name}:\\s+(\\d+) kB', file.read())[1]) << 10

def make(name, kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': path}, **kwargs)

path, cases = sys.argv[1], json.loads(sys.argv[2])
for case in cases:
    first = second = None
    first = make(*case)
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the peak is now what is in use
    before = memory('VmRSS')
    second = make(*case)
    print(json.dumps([memory('VmHWM') - before, sum(tensor.nbytes for tensor in second.state_dict().values())]))
"""
ONE_WIDTH = [
    ('slimclr_resnet50_025', {}),
    ('slimclr_resnet50', {'width': 0.25, 'lazy': True}),
    ('slimclr_resnet50', {'widths': [0.25]}),
]


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Bytes that the process had grown by at its peak, and bytes of the network: of one width, and of all."""
    path = tmp_path_factory.mktemp('memory') / 'model.safetensors'
    save_tensors(timm.create_model('slimclr_resnet50').state_dict(), path)
    assert path.stat().st_size > 100 << 20
    command = [sys.executable, '-c', SCRIPT, str(path), json.dumps([*ONE_WIDTH, ('slimclr_resnet50', {'width': 0.25})])]
    ran = subprocess.run(command, env={**os.environ, **GIVE_BACK}, check=True, capture_output=True, text=True)
    path.unlink()
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize('case', range(len(ONE_WIDTH)))
def test_one_width(measured, case):
    peak, size = measured[case]
    dense = timm.create_model('slimclr_resnet50_025', device='meta')
    assert size == sum(tensor.nbytes for tensor in dense.state_dict().values()) < 9 << 20
    assert 0.9 * size < peak < 1.5 * size


def test_the_measure_sees_what_all_widths_cost(measured):
    peak, size = measured[-1]
    assert size > 110 << 20
    assert 0.9 * size < peak
