"""The machine that something was measured on, in words."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.machine())


def processors() -> str:
    """Number and name of the CPU's cores."""
    return f'{os.cpu_count()} x {processor()}'
