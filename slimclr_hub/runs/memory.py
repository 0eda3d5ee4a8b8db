"""Memory of a training process: how much there was, and that it is kept."""

import ctypes
import resource
import sys

import torch

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def peak_memory(device: torch.device) -> int:
    """Most bytes that the device has held so far; of the CPU, the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation; PyTorch does so for GPUs, but not on the CPU.

    glibc returns a freed block of more than some megabytes to the system, and the next one comes back page by page,
    each filled with zeros: for activations, tens of thousands of page faults a step. It holds for the whole process.
    Returns False if the C library cannot do so.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is None:
        return False
    # No block gets a mapping of its own, and the heap never shrinks.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
