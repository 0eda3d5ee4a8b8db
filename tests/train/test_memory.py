"""Memory that a training process keeps."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from slimclr_hub.runs.memory import keep_freed_memory

if sys.argv[1] == 'keep':
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.ones(2**24)
before = faults()
for _ in range(8):
    torch.ones(2**24)  # 64 MiB
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is not there')
def test_freed_memory_comes_back_without_page_faults():
    """Eight tensors of 64 MiB one after the other: the same pages, or new ones for each."""
    released, kept = (
        int(subprocess.run([sys.executable, '-c', PROGRAM, how], check=True, capture_output=True, text=True).stdout)
        for how in ('release', 'keep')
    )
    assert kept < 1000
    assert kept * 10 < released
