"""Export to LiteRT, formerly TensorFlow Lite: one `.tflite` with a signature for each width."""

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import nn

from slimclr_hub.files import atomic_files
from slimclr_hub.hub.export.checks import (
    INPUT,
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


def export_litert(
    model: SlimmableResNet, path: Path, *, size: int, widths: Sequence[float] | None = None
) -> list[Exported]:
    """Write a network as one `.tflite`, after LiteRT has run each width with the same outputs.

    The signatures `w100`, `w075` and so on take one image [1, C, size, size] in float32 as `pixel_values`. Nothing is
    shared between widths. `metadata.describe` is appended as `slimclr_hub.json` in a zip archive, as the format has it
    for lists of labels. Other arguments and errors are those of `export_onnx`.

    Args:
        model: The network.
        path: The file, `.tflite`.
        widths: The widths, all unless given.
    """
    check_ending(path, '.tflite')
    for name in ('litert_torch', 'ai_edge_litert.interpreter'):
        package(name, 'litert')
    references = references_of(model, size, widths)
    with atomic_files(path.parent) as partial:
        file = partial / path.name
        with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            _converted(references).export(str(file))
        with ZipFile(file, 'a') as archive:
            archive.writestr(f'{KEY}.json', describe(*references.values()))
        opened = _opened(file)
        return [
            check(reference, _signature(opened, width_key(width), reference.output), path)
            for width, reference in references.items()
        ]


class _Named(nn.Module):
    """A network whose output has a name, which signatures keep."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.network, self.output = reference.network, reference.output

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output: self.network(pixel_values)}


def _converted(references: dict[float, Reference]) -> Any:
    import litert_torch

    converter: Any = litert_torch
    for width, reference in references.items():
        example = {INPUT: reference.example[:1]}
        converter = converter.signature(width_key(width), _Named(reference).eval(), sample_kwargs=example)
    return converter.convert()


def _opened(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=str(path))


def _signature(interpreter: Any, name: str, output: str) -> Run:
    runner = interpreter.get_signature_runner(name)

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.from_numpy(runner(**{INPUT: image.numpy()})[output]) for image in images.split(1)])

    return run
