"""Export to OpenVINO's `.xml`, with the weights in a `.bin` beside it."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.files import atomic_files
from slimclr_hub.hub.export.checks import (
    INPUT,
    Calibration,
    Exported,
    Reference,
    Run,
    check,
    check_ending,
    package,
    quiet,
    reference_of,
)
from slimclr_hub.hub.export.metadata import KEY, describe
from slimclr_hub.text import first_line


def export_openvino(model: nn.Module, path: Path, *, size: int, calibration: Calibration | None = None) -> Exported:
    """Write a network for OpenVINO, after its runtime has run it with the same outputs, on the CPU in float32.

    Its `rt_info` has `metadata.describe` as `slimclr_hub`. Arguments and errors are those of `export_onnx`; int8 is
    NNCF's post-training quantisation.
    """
    check_ending(path, '.xml')
    openvino = package('openvino', 'openvino')
    if calibration:
        package('nncf', 'openvino')
    reference = reference_of(model, size)
    converted = _converted(reference)
    if calibration:
        converted = _quantised(converted, calibration)
    converted.set_rt_info(describe(reference), [KEY])
    with atomic_files(path.parent) as partial:
        try:
            openvino.save_model(converted, partial / path.name, compress_to_fp16=False)
        except RuntimeError as error:  # of C++, where the disk is full
            raise OSError(f'{path} cannot be written: {first_line(error)}') from error
        beside = path.with_suffix('.bin')
        return check(reference, _opened(partial / path.name), path, (beside,), calibration)


def _converted(reference: Reference) -> Any:
    import openvino

    with quiet():
        batch = {0: torch.export.Dim('batch')}
        program = torch.export.export(reference.network, (reference.example,), dynamic_shapes=(batch,))
        converted = openvino.convert_model(program)
    converted.reshape([-1, *reference.example.shape[1:]])
    converted.inputs[0].set_names({INPUT})
    converted.outputs[0].set_names({reference.output})
    return converted


def _quantised(converted: Any, calibration: Calibration) -> Any:
    import nncf

    images = nncf.Dataset([image[None].numpy() for image in calibration.images])
    nncf.set_log_level('ERROR')
    with redirect_stdout(StringIO()):  # progress bars
        return nncf.quantize(converted, images, subset_size=len(calibration.images))


def _opened(path: Path) -> Run:
    import openvino

    opened = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(opened(images.numpy())[0])

    return run
