"""Export to PyTorch's `.pt2`."""

import io
from pathlib import Path

import torch
from torch import nn

from slimclr_hub.files import atomic_files
from slimclr_hub.hub.export.checks import Exported, check_ending, quiet, reference_of
from slimclr_hub.hub.export.metadata import KEY, describe


def export_pt2(model: nn.Module, path: Path, *, size: int) -> Exported:
    """Write a network as a `.pt2` file, after `torch.export.load` has opened it and run it with the same outputs.

    `torch.export.load(path).module()` runs it without this package and without timm; with `extra_files={KEY: ''}` it
    reads `metadata.describe`, too. Arguments and errors are those of `export_onnx`.
    """
    check_ending(path, '.pt2')
    reference = reference_of(model, size)
    with quiet():
        batch = {0: torch.export.Dim('batch')}
        program = torch.export.export(reference.network, (reference.example,), dynamic_shapes=(batch,))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # holds the paths of this machine
    with atomic_files(path.parent) as partial, quiet():
        buffer = io.BytesIO()  # to a file, PyTorch's own writer ends the process where the disk is full
        torch.export.save(program, buffer, extra_files={KEY: describe(reference)})
        (partial / path.name).write_bytes(buffer.getbuffer())
        run = torch.export.load(partial / path.name).module()
        return Exported(reference.width, path, reference.difference(run, path))
