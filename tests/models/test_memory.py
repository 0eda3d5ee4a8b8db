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

def make():
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': path}, **kwargs)

name, path, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
first = make()
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # the peak is now what is in use
before = memory('VmRSS')
second = make()
print(json.dumps([memory('VmHWM') - before, sum(tensor.nbytes for tensor in second.state_dict().values())]))
"""


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('memory') / 'model.safetensors'
    save_tensors(timm.create_model('slimclr_resnet50').state_dict(), path)
    assert path.stat().st_size > 100 << 20
    yield path
    path.unlink()


def measure(path, name='slimclr_resnet50', **kwargs):
    """Bytes that the process had grown by at its peak, and bytes of the network."""
    command = [sys.executable, '-c', SCRIPT, name, str(path), json.dumps(kwargs)]
    ran = subprocess.run(command, env={**os.environ, **GIVE_BACK}, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('slimclr_resnet50_025', {}),
        ('slimclr_resnet50', {'width': 0.25, 'lazy': True}),
        ('slimclr_resnet50', {'widths': [0.25]}),
    ],
)
def test_one_width(path, name, kwargs):
    peak, size = measure(path, name, **kwargs)
    dense = timm.create_model('slimclr_resnet50_025', device='meta')
    assert size == sum(tensor.nbytes for tensor in dense.state_dict().values()) < 9 << 20
    assert 0.9 * size < peak < 1.5 * size


def test_the_measure_sees_what_all_widths_cost(path):
    peak, size = measure(path, width=0.25)
    assert size > 110 << 20
    assert 0.9 * size < peak
