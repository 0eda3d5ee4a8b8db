"""Export to ONNX: one width as a file by itself, or several as small graphs over one file of weights.

In that file, weights stand in the rings of `weights.progressive`: the leading block that the narrowest width uses, then
what each wider width adds to its right and below it. A graph of a wider width joins its rings by `Concat`, which
runtimes compute once, when they open it. Normalisations and heads are each width's own. The rings of narrower widths
come first, so that a graph needs only the beginning of the file.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.weights.progressive import split
from slimclr_hub.weights.slices import leading, width_key

DEFAULT_OPSET = 18
"""The oldest operator set that PyTorch's exporter writes, which the most runtimes read."""

_ALIGNED = 64  # bytes; a cache line


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
        _share(dict(reversed(files.items())), partial / data_name(name))
        exported = []
        for width, reference in references.items():
            path = folder / graph_name(name, width)
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
    file.metadata_props.add(key=KEY, value=describe(reference))
    return file


def _session(path: Path, reference: Reference) -> Run:
    """Open a file in onnxruntime, and return the function that runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Left to itself it pins threads to cores, and complains about those that this process may not use.
    options.intra_op_num_threads = torch.get_num_threads()
    opened = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

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


def _share(files: dict[float, Any], path: Path) -> None:
    """Move the weights of graphs, the narrowest first, to one file at `path`, each once."""
    from onnx import TensorProto, numpy_helper

    weights = [
        {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in file.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }
        for file in files.values()
    ]
    shared = {name for name in weights[0] if _is_nested([held.get(name) for held in weights])}
    tensors: dict[str, torch.Tensor] = {}
    shapes: list[dict[str, Sequence[int]]] = []
    before: dict[str, Sequence[int]] = {}
    for width, held in zip(files, weights, strict=True):
        named = {name if name in shared else f'{name}.{width_key(width)}': tensor for name, tensor in held.items()}
        tensors |= named  # the widest, of what is shared
        before = {**before, **{name: tensor.shape for name, tensor in named.items()}}
        shapes.append(before)
    pieces: list[dict[str, _Piece]] = []
    with path.open('wb') as data:
        for width, file, held, part in zip(files, files.values(), weights, split(tensors, shapes), strict=True):
            pieces.append({name: _append(data, tensor) for name, tensor in part.items()})
            (about,) = (entry for entry in file.metadata_props if entry.key == KEY)
            about.value = json.dumps({**json.loads(about.value), 'data_bytes': data.tell()})
            others = [tensor for tensor in file.graph.initializer if tensor.name not in held]
            nodes = list(file.graph.node)
            del file.graph.initializer[:], file.graph.node[:]
            file.graph.initializer.extend(others)
            for name in held:
                of = name if name in shared else f'{name}.{width_key(width)}'
                _join(file.graph, name, [found for part in pieces for found in _rings(part, of)], path.name)
            file.graph.node.extend(nodes)


class _Piece(NamedTuple):
    """A tensor in the file of weights, and the axis along which it continues those before it."""

    shape: tuple[int, ...]
    offset: int
    axis: int | None = None


def _is_nested(tensors: Sequence[torch.Tensor | None]) -> bool:
    """True if each is the leading block of the next."""
    found = [tensor for tensor in tensors if tensor is not None]
    return len(found) == len(tensors) and all(
        narrow.ndim == wide.ndim
        and (narrow.ndim > 1 or narrow.shape == wide.shape)
        and narrow.shape[2:] == wide.shape[2:]
        and torch.equal(narrow, leading(wide, narrow.shape))
        for narrow, wide in pairwise(found)
    )


def _append(data: BinaryIO, tensor: torch.Tensor) -> _Piece:
    data.write(bytes(-data.tell() % _ALIGNED))
    offset = data.tell()
    data.write(tensor.numpy().tobytes())
    return _Piece(tuple(tensor.shape), offset)


def _rings(part: Mapping[str, _Piece], name: str) -> list[_Piece]:
    """What a part has of a tensor, in the order in which it is joined."""
    named = ((name, None), (f'{name}.right', 1), (f'{name}.below', 0))
    return [part[key]._replace(axis=axis) for key, axis in named if key in part]


def _join(graph: Any, name: str, rings: Sequence[_Piece], location: str) -> None:
    """Add an initializer for each ring, and nodes that join them to the tensor `name`."""
    from onnx import TensorProto, helper
    from onnx.external_data_helper import set_external_data

    joined = ''
    for i, ring in enumerate(rings):
        is_last = i == len(rings) - 1
        piece = name if len(rings) == 1 else f'{name}.{i}'
        tensor = graph.initializer.add(name=piece, data_type=TensorProto.FLOAT, dims=ring.shape)
        tensor.raw_data = b''  # which set_external_data asks for
        set_external_data(tensor, location, ring.offset, 4 * prod(ring.shape))
        if ring.axis is not None:
            output = name if is_last else f'{name}.to.{i}'
            graph.node.append(helper.make_node('Concat', [joined, piece], [output], axis=ring.axis))
            joined = output
        else:
            joined = piece
