"""Export of a slimmable network at several widths, in any format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from slimclr_hub.errors import InputError
from slimclr_hub.hub.export.checks import Calibration, Exported, check_size
from slimclr_hub.hub.export.executorch import export_executorch
from slimclr_hub.hub.export.litert import export_litert
from slimclr_hub.hub.export.onnx import data_name, export_onnx, export_shared_onnx, graph_name
from slimclr_hub.hub.export.openvino import export_openvino
from slimclr_hub.hub.export.pt2 import export_pt2
from slimclr_hub.hub.folder import check_file
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_width, width_key

Write = Callable[..., list[Exported]]
"""(model, folder, name, size, widths), and `calibration` for int8 -> each width and its file."""


class Format(NamedTuple):
    """A format: the names of the files that it writes, and the function that writes them."""

    names: Callable[[str, Sequence[float]], list[str]]
    write: Write


def export_network(
    model: SlimmableResNet,
    folder: Path,
    format: str,
    *,
    size: int | None = None,
    widths: Sequence[float] | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
) -> list[Exported]:
    """Write a network at several widths as files of a format, named by its architecture, and `int8` if they are.

    Args:
        model: The network; its active width stays as it is.
        folder: Where to write; made if it does not exist.
        format: One of `FORMATS`.
        size: Height and width of the images in pixels; the network's unless given.
        widths: The widths, all unless given.
        calibration: Images to write the network in int8 with.
        overwrite: True to replace existing files.

    Returns:
        Each width and its file.

    Raises:
        InputError: An argument is wrong, a package is missing, or a file exists; nothing was written.
        ExportError: The outputs differ, or those of int8 are less similar than accepted; the file was not written.
    """
    pixels = model.pretrained_cfg['input_size'][-1] if size is None else size
    check_size(pixels)
    chosen = list(dict.fromkeys(check_width(width, model.widths) for width in widths or model.widths))
    check_format(format, int8=calibration is not None)
    name = model.pretrained_cfg['architecture'] + ('_int8' if calibration else '')
    names, write = (_INT8 if calibration else FORMATS)[format]
    for file in names(name, chosen):
        check_file(folder / file, overwrite)
    _check_others(folder, name, names(name, chosen))
    folder.mkdir(parents=True, exist_ok=True)
    options = {} if calibration is None else {'calibration': calibration}
    return write(model, folder, name, pixels, chosen, **options)


def check_format(format: str, *, int8: bool) -> None:
    """Raise an InputError unless there is such a format, in int8 if it is to be."""
    known = _INT8 if int8 else FORMATS
    if format not in known:
        raise InputError(f'format {format} is not one of {", ".join(known)}{", which int8 has" if int8 else ""}')


def _check_others(folder: Path, name: str, files: Sequence[str]) -> None:
    """Refuse to replace weights under graphs that stay."""
    if data_name(name) not in files or not (folder / data_name(name)).exists():
        return
    for path in sorted(folder.glob(f'{name}_w*.onnx')):
        if path.name not in files:
            raise InputError(
                f'{path} may stand on the weights that would be replaced; remove it, or choose another folder'
            )


def _onnx_names(name: str, widths: Sequence[float]) -> list[str]:
    graphs = [graph_name(name, width) for width in widths]
    return graphs if len(graphs) == 1 else [*graphs, data_name(name)]


def _write_onnx(
    model: SlimmableResNet, folder: Path, name: str, size: int, widths: Sequence[float], **options: Any
) -> list[Exported]:
    if len(widths) > 1:
        return export_shared_onnx(model, folder, name, size=size, widths=widths, **options)
    return _ONNX_ALONE.write(model, folder, name, size, widths, **options)


def _one_file(export: Callable[..., list[Exported]], suffix: str) -> Format:
    """A format that has all widths in one file."""

    def write(
        model: SlimmableResNet, folder: Path, name: str, size: int, widths: Sequence[float], **options: Any
    ) -> list[Exported]:
        return export(model, folder / f'{name}{suffix}', size=size, widths=widths, **options)

    return Format(lambda name, widths: [f'{name}{suffix}'], write)


def _one_each(export: Callable[..., Exported], *suffixes: str) -> Format:
    """A format that has one file for each width, the first of `suffixes`, and what goes with it."""

    def names(name: str, widths: Sequence[float]) -> list[str]:
        return [f'{name}_{width_key(width)}{suffix}' for width in widths for suffix in suffixes]

    def write(
        model: SlimmableResNet, folder: Path, name: str, size: int, widths: Sequence[float], **options: Any
    ) -> list[Exported]:
        exported = []
        for width in widths:
            path = folder / names(name, [width])[0]
            with model.set_width(width):
                exported.append(export(model, path, size=size, **options))
        return exported

    return Format(names, write)


_ONNX_ALONE = _one_each(export_onnx, '.onnx')
_OPENVINO = _one_each(export_openvino, '.xml', '.bin')
_EXECUTORCH = _one_file(export_executorch, '.pte')

FORMATS: Final = {
    'onnx': Format(_onnx_names, _write_onnx),
    'openvino': _OPENVINO,
    'executorch': _EXECUTORCH,
    'litert': _one_file(export_litert, '.tflite'),
    'pt2': _one_each(export_pt2, '.pt2'),
}
"""Name of a format -> how to write it in float32."""

_INT8: Final = {'onnx': _ONNX_ALONE, 'openvino': _OPENVINO, 'executorch': _EXECUTORCH}
