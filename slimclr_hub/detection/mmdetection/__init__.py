"""Registers what a config of MMDetection names: `custom_imports = dict(imports=['slimclr_hub.detection.mmdetection'])`.

It changes three things of the whole process: where mmcv has no compiled operators, torchvision's take their place
(`ops`); `torch.load` may read the checkpoints of mmengine (`checkpoints`); and an `InputError` that nobody catches is
printed as one line.

Raises:
    InputError: MMDetection, mmengine or mmcv are not installed.
"""

import sys
from types import TracebackType

from slimclr_hub.detection.checkpoints import allow_mmengine_checkpoints
from slimclr_hub.detection.ops import install_ops
from slimclr_hub.errors import InputError

install_ops()  # before anything of mmdet.models or mmcv.ops is imported
allow_mmengine_checkpoints()

from slimclr_hub.detection.mmdetection import backbone, datasets, detectors, hooks, loops, neck  # noqa: E402, F401

_previous = sys.excepthook


def _one_line(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    # MMDetection's own scripts run the configs, and a user's mistake wants no traceback there either.
    if isinstance(value, InputError):
        print(f'Error: {value}', file=sys.stderr)
    else:
        _previous(kind, value, trace)


sys.excepthook = _one_line
