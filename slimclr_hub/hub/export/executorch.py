"""Export to ExecuTorch: one `.pte` with a method for each width, for phones and other small devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.files import atomic_files
from slimclr_hub.hub.export.checks import (
    BATCH,
    Calibration,
    Exported,
    Reference,
    Run,
    check,
    check_ending,
    package,
    quiet,
    references_of,
)
from slimclr_hub.hub.export.metadata import KEY, describe
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.weights.slices import width_key


def export_executorch(
    model: SlimmableResNet,
    path: Path,
    *,
    size: int,
    widths: Sequence[float] | None = None,
    calibration: Calibration | None = None,
) -> list[Exported]:
    """Write a network as one `.pte`, after ExecuTorch has run each width with the same outputs.

    The methods `w100`, `w075` and so on take one image [1, C, size, size] in float32 and run by XNNPACK; the method
    `slimclr_hub` returns `metadata.describe`. Weights are packed for each method, so nothing is shared between widths.
    Other arguments and errors are those of `export_onnx`; int8 is torchao's, by XNNPACK's quantiser.

    Args:
        model: The network.
        path: The file, `.pte`.
        widths: The widths, all unless given.
    """
    check_ending(path, '.pte')
    for name in ('executorch.exir', 'executorch.runtime', 'torchao.quantization.pt2e'):
        package(name, 'executorch')
    references = references_of(model, size, widths)
    with quiet():
        content = _lowered(references, calibration)
    with atomic_files(path.parent) as partial:
        (partial / path.name).write_bytes(content)
        program = _opened(partial / path.name)
        return [
            check(reference, _method(program, width_key(width)), path, calibration=calibration)
            for width, reference in references.items()
        ]


def _lowered(references: dict[float, Reference], calibration: Calibration | None) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    programs = {}
    for width, reference in references.items():
        network = reference.network if calibration is None else _quantised(reference, calibration)
        programs[width_key(width)] = torch.export.export(network, (reference.example[:1],))
    described = {KEY: describe(*references.values())}
    lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()], constant_methods=described)
    return bytes(lowered.to_executorch().buffer)


def _quantised(reference: Reference, calibration: Calibration) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantiser = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    batch = {0: torch.export.Dim('batch')}
    traced = torch.export.export(reference.network, (reference.example,), dynamic_shapes=(batch,)).module()
    observed = prepare_pt2e(traced, quantiser)
    with torch.no_grad():
        for images in calibration.images.split(BATCH):
            observed(images)
    return convert_pt2e(observed)


def _opened(path: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


def _method(program: Any, name: str) -> Run:
    method = program.load_method(name)

    def run(images: torch.Tensor) -> torch.Tensor:
        # An output is valid until the next call.
        return torch.cat([method.execute([image])[0].clone() for image in images.split(1)])

    return run
