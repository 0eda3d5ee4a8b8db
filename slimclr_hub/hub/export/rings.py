"""One file for the weights of several ONNX graphs of a slimmable network.

In it, each weight stands once, in the rings of `weights.progressive`: the leading block that the narrowest width uses,
then what each wider width adds to its right and below it. A graph of a wider width joins its rings by `Concat`, which
runtimes compute once, when they open it. Normalisations and heads are each width's own. The rings of narrower widths
come first, so that a graph needs only the beginning of the file.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from slimclr_hub.weights.progressive import split
from slimclr_hub.weights.slices import leading, width_key

_ALIGNED = 64  # bytes; a cache line


class _Piece(NamedTuple):
    """A tensor in the file of weights, and the axis along which it continues those before it."""

    shape: tuple[int, ...]
    offset: int
    axis: int | None = None


def share(graphs: Mapping[float, Any], path: Path) -> dict[float, int]:
    """Move the weights of graphs to one file, each once.

    Args:
        graphs: Width -> its `ModelProto`, the narrowest first. Afterwards they refer to the file.
        path: The file, in whose folder the graphs have to lie.

    Returns:
        Width -> the bytes from the beginning of the file that its graph needs.
    """
    weights = {width: _weights(file) for width, file in graphs.items()}
    shared = {name for name in weights[min(graphs)] if _is_nested([held.get(name) for held in weights.values()])}
    # Graph's name -> name in the file, where each width has a name for what is its own.
    names = {
        width: {name: name if name in shared else f'{name}.{width_key(width)}' for name in held}
        for width, held in weights.items()
    }
    tensors: dict[str, torch.Tensor] = {}
    shapes: list[dict[str, Sequence[int]]] = []
    for width, held in weights.items():
        tensors |= {names[width][name]: tensor for name, tensor in held.items()}  # the widest, of what is shared
        shapes.append({name: tensor.shape for name, tensor in tensors.items()})
    pieces: list[dict[str, _Piece]] = []
    needed = {}
    with path.open('wb') as data:
        for (width, file), part in zip(graphs.items(), split(tensors, shapes), strict=True):
            pieces.append({name: _append(data, tensor) for name, tensor in part.items()})
            needed[width] = data.tell()
            _refer(file.graph, {name: _rings(pieces, of) for name, of in names[width].items()}, path.name)
    return needed


def _weights(file: Any) -> dict[str, torch.Tensor]:
    from onnx import TensorProto, numpy_helper

    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in file.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }


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


def _rings(pieces: Sequence[Mapping[str, _Piece]], name: str) -> list[_Piece]:
    """The pieces of a tensor, in the order in which they are joined."""
    named = ((name, None), (f'{name}.right', 1), (f'{name}.below', 0))
    return [part[key]._replace(axis=axis) for part in pieces for key, axis in named if key in part]


def _refer(graph: Any, rings: Mapping[str, Sequence[_Piece]], location: str) -> None:
    """Replace initializers by those in the file, and by nodes that join them."""
    others = [tensor for tensor in graph.initializer if tensor.name not in rings]
    nodes = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(others)
    for name, pieces in rings.items():
        _join(graph, name, pieces, location)
    graph.node.extend(nodes)


def _join(graph: Any, name: str, rings: Sequence[_Piece], location: str) -> None:
    """Add an initializer for each ring, and nodes that join them to the tensor `name`."""
    from onnx import TensorProto, helper
    from onnx.external_data_helper import set_external_data

    joined = ''
    for i, ring in enumerate(rings):
        piece = name if len(rings) == 1 else f'{name}.{i}'
        tensor = graph.initializer.add(name=piece, data_type=TensorProto.FLOAT, dims=ring.shape)
        tensor.raw_data = b''  # which set_external_data asks for
        set_external_data(tensor, location, ring.offset, 4 * prod(ring.shape))
        if ring.axis is None:
            joined = piece
            continue
        output = name if i == len(rings) - 1 else f'{name}.to.{i}'
        graph.node.append(helper.make_node('Concat', [joined, piece], [output], axis=ring.axis))
        joined = output
