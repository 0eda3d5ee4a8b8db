"""Register what configs of MMDetection name: `custom_imports = dict(imports=['slimclr_hub.detection.mmdetection'])`.

The import changes three things in the whole process: where mmcv has no compiled operators, torchvision's take their
place (`ops`); `torch.load` may read checkpoints of mmengine (`mmengine_files`); an uncaught `InputError` is printed as
one line, the last one but for mim's `Aborted!`.

Raises:
    InputError: MMDetection, mmengine or mmcv is not installed.
"""

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from slimclr_hub.detection.mmengine_files import allow_mmengine_checkpoints
from slimclr_hub.detection.ops import install_ops
from slimclr_hub.errors import InputError

install_ops()  # before anything of mmdet.models or mmcv.ops is imported
allow_mmengine_checkpoints()

from slimclr_hub.detection.mmdetection import backbone, datasets, detectors, runner  # noqa: E402, F401

_previous = sys.excepthook


def _print_one_line(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(value, InputError):
        _previous(kind, value, trace)
        return
    sys.stdout.flush()
    print(f'Error: {value}', file=sys.stderr, flush=True)
    # `mim train` and `mim test` run MMDetection's scripts as children and print a traceback of their own, 30 lines, if
    # one fails. Interrupted as by Ctrl-C, they end with `Aborted!` and status 1 instead.
    command = Path(f'/proc/{os.getppid()}/cmdline')
    if command.exists() and [os.path.basename(word) for word in command.read_bytes().split(b'\0')[1:2]] == [b'mim']:
        os.kill(os.getppid(), signal.SIGINT)


sys.excepthook = _print_one_line
