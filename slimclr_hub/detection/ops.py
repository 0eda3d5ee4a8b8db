"""Stand-in for the compiled `mmcv._ext`, which mmcv-lite lacks, with the operators that torchvision has too.

The maintained fork's `onedl-mmcv` lacks it as well if pip builds it in isolation from torch, which is the default.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision.ops

from slimclr_hub.errors import InputError

NAME = 'mmcv._ext'
# torch 2.15 needs C++20, and both of these setups ask for C++17; with torch 2.12, mmcv 2.1.0 compiles.
_BUILD = (
    'pip uninstall -y mmcv-lite; pip install "torch<2.13" torchvision "setuptools<81" wheel ninja psutil; '
    'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary mmcv mmcv==2.1.0'
)
_BUILD_FORK = (  # without the cache, where pip keeps builds without operators
    'pip install "torch<2.13" torchvision setuptools wheel ninja psutil; '
    'pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall --no-binary onedl-mmcv onedl-mmcv'
)
_LINK = '''"""Operators of torchvision in place of compiled ones, by `slimclr-hub doctor --link-ops`; delete to undo."""

import sys

from slimclr_hub.detection.ops import StandIn

sys.modules[__name__] = StandIn()
'''

_NOT_COMPILED = 'n/a: mmcv is not compiled, torchvision stands in'

_logger = logging.getLogger(__name__)


def install_ops() -> str:
    """Make `mmcv.ops` importable, with its compiled operators if there are any, otherwise with torchvision's.

    Call it before anything of `mmcv.ops` or `mmdet.models` is imported; it may be called again. With torchvision's,
    `nms` and `RoIAlign` work, forward and backward, and every other operator raises an error that names it. Returns
    'compiled' or 'torchvision'.

    Raises:
        InputError: mmcv, or what it imports, is not installed.
    """
    try:
        mmcv = importlib.import_module('mmcv')
    except ModuleNotFoundError as error:
        message = f'MMDetection needs {error.name}, which is not installed: pip install "slimclr-hub[transfer]"'
        raise InputError(message) from error
    try:
        extension = importlib.import_module(NAME)
    except ModuleNotFoundError:
        pass  # mmcv-lite, or the fork's without operators
    except ImportError as error:  # compiled for another torch
        _logger.warning('the compiled operators of mmcv do not load (%s); those of torchvision stand in', error)
    else:
        return 'torchvision' if isinstance(extension, StandIn) else 'compiled'
    sys.modules[NAME] = vars(mmcv)['_ext'] = StandIn()  # both, as an import would have
    return 'torchvision'


def link_ops() -> Path | None:
    """Write a file beside mmcv-lite by which Python itself finds the stand-in.

    MMDetection's test script, which `mim test` runs, imports operators before it reads a config that could call
    `install_ops`. If mmcv is compiled later, Python prefers its operators to this file.

    Returns:
        The file, or None if mmcv has operators already.

    Raises:
        InputError: mmcv is not installed, or its folder cannot be written to.
    """
    if install_ops() == 'compiled':
        return None
    path = linked_ops()
    try:
        path.write_text(_LINK, encoding='utf-8')
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror}; use an environment of your own') from error
    return path


def linked_ops() -> Path:
    """Return the path of the file that `link_ops` writes, beside an installed mmcv."""
    return Path(importlib.import_module('mmcv').__file__ or '').with_name('_ext.py')


def build_command() -> str:
    """Return the command that compiles mmcv with its operators, for the fork if that is installed."""
    return _BUILD_FORK if any(metadata.distributions(name='onedl-mmcv')) else _BUILD


def _remedy() -> str:
    return f'compile mmcv with a C++ compiler and torch 2.12 or older in about half an hour ({build_command()})'


# The functions below have the names and arguments of mmcv/ops/csrc/pytorch/pybind.cpp: mmcv.ops passes some by name,
# and passes the tensors that RoIAlign fills.


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    """Return indices of the boxes [N, 4] that greedy suppression keeps, highest score first.

    Raises:
        InputError: `offset` is not 0; with 1, boxes would be one pixel wider and higher.
    """
    if offset != 0:
        raise InputError(f'nms with offset={offset}: torchvision has offset=0 only; leave it out or {_remedy()}')
    # mmcv takes the threshold in float32; an IoU of exactly 0.3 would be greater than 0.3 in float64.
    return torchvision.ops.nms(boxes, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())


def roi_align_forward(
    input: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    **options: Any,
) -> None:
    """Fill `output`, [K, C, aligned_height, aligned_width], with the means of `input` in the cells of every region.

    `input` is [N, C, H, W], `rois` [K, 5]: index into N, x1, y1, x2, y2, in pixels of the image. For the options see
    `_roi_options`; the tensors `argmax_y` and `argmax_x`, which belong to maxima, are not used.

    Raises:
        InputError: `pool_mode` is 0, the maximum.
    """
    size, sampling = _roi_options(**options)
    output.copy_(torch.ops.torchvision.roi_align(_full(input), _full(rois), *size, *sampling))


def roi_align_backward(
    grad_output: torch.Tensor,
    rois: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    grad_input: torch.Tensor,
    **options: Any,
) -> None:
    """Fill `grad_input` with the gradient of `roi_align_forward` with respect to its input; same options and error."""
    size, sampling = _roi_options(**options)
    grads, regions = _full(grad_output), _full(rois)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grads, regions, *size, *grad_input.shape, *sampling))


def _roi_options(
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool
) -> tuple[tuple[float, int, int], tuple[int, bool]]:
    """Return RoIAlign's options in the two groups of torchvision's arguments.

    A cell has `sampling_ratio` points in each direction, with 0 as many as pixels. `spatial_scale` is the map's size by
    the image's. Without `aligned`, pixel centres are at whole numbers and regions have at least one pixel.
    """
    if pool_mode != 1:
        raise InputError(f"RoIAlign with pool_mode='max': torchvision has 'avg' only; use this or {_remedy()}")
    return (spatial_scale, aligned_height, aligned_width), (sampling_ratio, aligned)


class StandIn(ModuleType):
    """The module `mmcv._ext` with an operator of every name; those that torchvision lacks raise an error."""

    def __init__(self) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, None)  # importlib.util.find_spec refuses modules without one
        vars(self).update(nms=nms, roi_align_forward=roi_align_forward, roi_align_backward=roi_align_backward)
        # Not operators; mmcv.utils.collect_env, at the head of every log, calls them.
        self.get_compiler_version = self.get_compiling_cuda_version = lambda: _NOT_COMPILED

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        # Python and its tools look for optional attributes such as __path__ and would use what they get.
        if name.startswith('_'):
            raise AttributeError(f'module {NAME!r} has no attribute {name!r}')

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise InputError(f'neither this mmcv nor torchvision has the operator {name!r}: {_remedy()}')

        return missing


def _full(x: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32: torchvision sums in the type of its input and has no bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
