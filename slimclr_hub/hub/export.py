"""Export of networks to single files for other runtimes, ONNX and PyTorch's `.pt2`, each run and compared first."""

import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from slimclr_hub.errors import ExportError, InputError
from slimclr_hub.files import atomic_files
from slimclr_hub.hub.folder import check_overlap
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.models import SlimmableResNet

DEFAULT_OPSET = 18
"""The oldest operator set that PyTorch's exporter writes, which the most runtimes read."""

_CHECKED_BATCHES = (1, 3)
_TOLERANCE = 1e-4


def export_onnx(model: nn.Module, path: Path, *, size: int, opset: int = DEFAULT_OPSET) -> float:
    """Write a network as one ONNX file, after onnxruntime has run it with the same outputs.

    Input `pixel_values` [N, C, size, size], output `logits` [N, num_classes], or `features` where the network has no
    head; N is free. A slimmable network is exported at its active width, as the dense network of that width. The file
    computes in float32 and in eval mode, whatever the network's dtype, mode and device, which stay as they are.

    Args:
        model: A network with one input and one output.
        path: The file, `.onnx`.
        size: Height and width of the images in pixels.
        opset: Operator set of ONNX to write.

    Returns:
        The largest absolute difference between onnxruntime's outputs and PyTorch's, both in float32 on the CPU, for
        random images in batches of 1 and 3.

    Raises:
        InputError: A package is missing, or an argument wrong.
        ExportError: The outputs differ by more than 1e-4, or by more than 1e-4 of the largest where that is above 1.
    """
    _check(path, '.onnx', size)
    _, onnxruntime, _ = [_package(name) for name in ('onnx', 'onnxruntime', 'onnxscript')]
    network, batches, outputs = _prepared(model, size)
    with _quiet():
        program = torch.onnx.export(
            network,
            (_example(batches),),
            input_names=['pixel_values'],
            output_names=['logits' if getattr(model, 'num_classes', 0) > 0 else 'features'],
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

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Left to itself it pins threads to cores, and complains about those that this process may not use.
    options.intra_op_num_threads = torch.get_num_threads()
    with atomic_files(path.parent) as partial:
        (partial / path.name).write_bytes(file.SerializeToString())
        session = onnxruntime.InferenceSession(str(partial / path.name), options, providers=['CPUExecutionProvider'])

        def run(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {'pixel_values': images.numpy()})[0])

        return _difference(run, batches, outputs, path)


def export_pt2(model: nn.Module, path: Path, *, size: int) -> float:
    """Write a network as a `.pt2` file, after `torch.export.load` has opened it and run it with the same outputs.

    `torch.export.load(path).module()` runs it without this package and without timm. Arguments, result and errors are
    those of `export_onnx`.
    """
    _check(path, '.pt2', size)
    network, batches, outputs = _prepared(model, size)
    with _quiet():
        program = torch.export.export(network, (_example(batches),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # holds the paths of this machine
    with atomic_files(path.parent) as partial, _quiet():
        buffer = io.BytesIO()  # to a file, PyTorch's own writer ends the process where the disk is full
        torch.export.save(program, buffer)
        (partial / path.name).write_bytes(buffer.getbuffer())
        return _difference(torch.export.load(partial / path.name).module(), batches, outputs, path)


EXPORTERS: Final[dict[str, Callable[..., float]]] = {'onnx': export_onnx, 'pt2': export_pt2}
"""Ending of the file -> function that writes it."""


def _check(path: Path, suffix: str, size: int) -> None:
    if path.suffix != suffix:
        raise InputError(f'{path} does not end in {suffix}')
    check_size(size)


def check_size(size: int) -> None:
    """Raise an InputError unless images can have this height and width, in pixels."""
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise InputError(f'size {size} is not from 1 to {MAX_IMAGE_SIZE}; give the height and width of the images')


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'exporting needs {name} ({error}): pip install "slimclr-hub[export]"') from error


def _prepared(model: nn.Module, size: int) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """Make the network to export, images to check it with, and the outputs of `model` for them."""
    if isinstance(model, SlimmableResNet):
        check_overlap(model.overlap, 'export')
    # On the CPU, where float32 is float32 and where every runtime is; a copy, so that the caller's stays as it is.
    reference = copy.deepcopy(model).to('cpu', torch.float32).to(memory_format=torch.contiguous_format).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (int(getattr(reference, 'in_chans', 3)), size, size)
    batches = [torch.randn(count, *shape, generator=generator) for count in _CHECKED_BATCHES]
    with torch.no_grad():
        outputs = [reference(images) for images in batches]
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        raise InputError(
            f'{type(model).__name__} returns a {type(outputs[0]).__name__}; a network of one output is needed'
        )
    network = reference.extract(reference.width) if isinstance(reference, SlimmableResNet) else reference
    if hasattr(network, 'set_grad_checkpointing'):
        network.set_grad_checkpointing(False)  # type: ignore[operator]
    return network, batches, outputs


def _example(batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.zeros_like(batches[-1][:2])  # export would take a batch of 1 for a constant


def _difference(
    run: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor], outputs: list[torch.Tensor], path: Path
) -> float:
    largest = 0.0
    for images, expected in zip(batches, outputs, strict=True):
        with torch.no_grad():
            difference = (run(images) - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        if not difference <= _TOLERANCE * scale:  # so that nan is caught
            raise ExportError(
                f'{path} was not written: it would differ from the network by {difference:.3g} on a batch of '
                f'{len(images)}, with outputs up to {scale:.3g}'
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings and log lines, which are about their internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)
