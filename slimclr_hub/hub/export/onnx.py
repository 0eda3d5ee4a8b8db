"""Export to ONNX: one width as a file by itself, or several as small graphs over one file of weights (`rings`)."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import InputError
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
    references_of,
)
from slimclr_hub.hub.export.metadata import KEY, describe
from slimclr_hub.hub.export.rings import share
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.weights.slices import width_key

DEFAULT_OPSET = 18
"""The oldest operator set that PyTorch's exporter writes, which the most runtimes read."""


class _Affine(nn.Module):
    """A normalisation in eval mode, y = x * scale + shift for each channel, which the exporter does not fold."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.register_buffer('scale', scale.detach()[:, None, None])
        self.register_buffer('shift', (norm.bias - norm.running_mean * scale).detach()[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape."""
        return x * self.scale + self.shift


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    size: int,
    opset: int = DEFAULT_OPSET,
    calibration: Calibration | None = None,
) -> Exported:
    """Write a network as one ONNX file, after onnxruntime has run it with the same outputs.

    Input `pixel_values` [N, C, size, size], output `logits` [N, num_classes], or `features` where the network has no
    head; N is free. A slimmable network is exported at its active width, as the dense network of that width. The file
    computes in float32 and in eval mode, whatever the network's dtype, mode and device, which stay as they are. Its
    metadata has `metadata.describe` as `slimclr_hub`.

    Args:
        model: A network with one input and one output.
        path: The file, `.onnx`.
        size: Height and width of the images in pixels.
        opset: Operator set of ONNX to write.
        calibration: Images to write the network in int8 with, by onnxruntime's static quantisation: weights for each
            channel, activations for each tensor, both signed, as QuantizeLinear and DequantizeLinear.

    Returns:
        The file, and the largest absolute difference between onnxruntime's outputs and PyTorch's, both in float32 on
        the CPU, for random images in batches of 1 and 3.

    Raises:
        InputError: A package is missing, or an argument wrong.
        ExportError: The outputs differ by more than 1e-4, or by more than 1e-4 of the largest where that is above 1; of
            int8, their cosine similarity is less than `calibration` accepts.
    """
    check_ending(path, '.onnx')
    _check_packages()
    reference = reference_of(model, size)
    file = _trace(reference, opset)
    file.metadata_props.add(key=KEY, value=describe(reference))
    with atomic_files(path.parent) as partial:
        if calibration is None:
            (partial / path.name).write_bytes(file.SerializeToString())
        else:
            _quantise(file, calibration, partial / path.name)
        return check(reference, _session(partial / path.name, reference), path, calibration=calibration)


def export_shared_onnx(
    model: SlimmableResNet, folder: Path, name: str, *, size: int, widths: Sequence[float] | None = None
) -> list[Exported]:
    """Write a graph for each width, `NAME_w100.onnx` and so on, over the weights of all, `NAME.onnx.data`.

    Arguments and errors are those of `export_onnx`; nothing is written unless every width computes the same. The
    metadata of each graph also says how many bytes of the weights it needs, `data_bytes`.

    Args:
        folder: Folder of the files.
        name: Beginning of their names.
        widths: The widths, all unless given.
    """
    _check_packages()
    references = references_of(model, size, widths)  # the widest first
    files = {width: _trace(_unfolded(reference), DEFAULT_OPSET) for width, reference in references.items()}
    with atomic_files(folder) as partial:
        needed = share(dict(reversed(files.items())), partial / data_name(name))
        exported = []
        for width, reference in references.items():
            path = folder / graph_name(name, width)
            files[width].metadata_props.add(key=KEY, value=describe(reference, data_bytes=needed[width]))
            (partial / path.name).write_bytes(files[width].SerializeToString())
            run = _session(partial / path.name, reference)
            exported.append(check(reference, run, path, (folder / data_name(name),)))
        return exported


def graph_name(name: str, width: float) -> str:
    """Name of the graph of a width."""
    return f'{name}_{width_key(width)}.onnx'


def data_name(name: str) -> str:
    """Name of the weights of several graphs."""
    return f'{name}.onnx.data'


def _trace(reference: Reference, opset: int) -> Any:
    """Return a network as a `ModelProto` with all weights, without traces of this machine.

    Raises:
        InputError: PyTorch's exporter does not write this operator set.
    """
    with quiet():
        program = torch.onnx.export(
            reference.network,
            (reference.example,),
            input_names=[INPUT],
            output_names=[reference.output],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    file = program.model_proto
    written = next(entry.version for entry in file.opset_import if not entry.domain)
    if written != opset:  # the exporter falls back without an error
        raise InputError(f'opset {opset} cannot be written by torch {torch.__version__}, which offers {written}')
    for node in file.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    del file.graph.value_info[:]  # shapes that follow from the others
    return file


def open_session(path: Path, threads: int) -> Any:
    """Open a file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Left to itself it pins threads to cores, and complains about those that this process may not use.
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def _session(path: Path, reference: Reference) -> Run:
    """Open a file in onnxruntime, and return the function that runs it."""
    opened = open_session(path, torch.get_num_threads())

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(opened.run([reference.output], {INPUT: images.numpy()})[0])

    return run


def _quantise(file: Any, calibration: Calibration, path: Path) -> None:
    """Write a network in int8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._images = iter(calibration.images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: image.numpy()}

    with quiet():
        quantize_static(
            file,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )


def _check_packages() -> None:
    for name in ('onnx', 'onnxruntime', 'onnxscript'):
        package(name, 'export')


def _unfolded(reference: Reference) -> Reference:
    """The same with normalisations that the exporter cannot fold into weights, which would then be no slices."""
    network = copy.deepcopy(reference.network)
    for name, module in reference.network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, _Affine(module))
    return replace(reference, network=network)
