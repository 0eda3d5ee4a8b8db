"""Weights in parts, one for each width, so that a network is fetched by size; knows files, no Hub.

Beside `model.safetensors`, `progressive/index.json` names a safetensors file for each width. The narrowest has the
leading block of every tensor. In a wider one, `NAME.right` and `NAME.below` are what lies to the right of the next
narrower block and below both. What belongs to one width, its normalisations and head, is in the part of that width.
Together they are bit for bit `model.safetensors`, and the parts up to any width are a file of the widths up to it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.weights.bounded import read_json
from slimclr_hub.weights.slices import WIDTH_DIGITS, leading, width_key
from slimclr_hub.weights.tensor_file import TensorFile

FOLDER = 'progressive'
INDEX = f'{FOLDER}/index.json'

_RIGHT, _BELOW = 'right', 'below'
_MOST_PARTS = 100
_SHA256 = re.compile(r'[0-9a-f]{64}')

Shapes = Mapping[str, Sequence[int]]


def split(tensors: Mapping[str, torch.Tensor], shapes: Sequence[Shapes]) -> list[dict[str, torch.Tensor]]:
    """Split tensors into parts; `join` is the inverse.

    Args:
        tensors: Those of a network whose sub-networks are leading blocks.
        shapes: Shapes of the network that holds the narrowest width alone, then the two narrowest, and so on.
    """
    parts: list[dict[str, torch.Tensor]] = []
    before: Shapes = {}
    for after in shapes:
        part: dict[str, torch.Tensor] = {}
        for name, shape in after.items():
            if name not in before:
                part[name] = leading(tensors[name], shape)
            elif tuple(before[name]) != tuple(shape):
                (rows, columns), (all_rows, all_columns) = before[name][:2], shape[:2]
                if all_columns > columns:
                    size = (rows, all_columns - columns, *shape[2:])
                    part[f'{name}.{_RIGHT}'] = leading(tensors[name], size, (0, columns))
                if all_rows > rows:
                    size = (all_rows - rows, all_columns, *shape[2:])
                    part[f'{name}.{_BELOW}'] = leading(tensors[name], size, (rows,))
        parts.append(part)
        before = after
    return parts


def join(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the first parts of `split` to the tensors of the network that holds their widths.

    Raises:
        InputError: They do not fit each other.
    """
    join_shapes([{name: tensor.shape for name, tensor in part.items()} for part in parts])
    joined: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if _side(name) is None:
                joined[name] = tensor
        for side, dimension in ((_RIGHT, 1), (_BELOW, 0)):
            for name, tensor in part.items():
                if _side(name) == side:
                    owner = name.rpartition('.')[0]
                    joined[owner] = torch.cat([joined[owner], tensor], dimension)
    return joined


def join_shapes(parts: Sequence[Shapes]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `join` gives; errors as there."""
    joined: dict[str, tuple[int, ...]] = {}
    for part in parts:
        for name, shape in part.items():
            if _side(name) is None:
                if name in joined:
                    raise InputError(f'{name} is in two parts')
                joined[name] = tuple(shape)
        for side, dimension in ((_RIGHT, 1), (_BELOW, 0)):
            for name, shape in part.items():
                if _side(name) == side:
                    owner = name.rpartition('.')[0]
                    joined[owner] = _extended(name, joined.get(owner), tuple(shape), dimension)
    return joined


def _side(name: str) -> str | None:
    side = name.rpartition('.')[2]
    return side if side in (_RIGHT, _BELOW) else None


def _extended(name: str, block: tuple[int, ...] | None, more: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    if block is None:
        raise InputError(f'{name} extends a tensor that is in no part before')
    others = [(*shape[:dimension], *shape[dimension + 1 :]) for shape in (block, more)]
    if len(block) != len(more) or len(block) < 2 or others[0] != others[1]:
        raise InputError(f'{name} has shape {list(more)}, which does not fit beside {list(block)}')
    return (*block[:dimension], block[dimension] + more[dimension], *block[dimension + 1 :])


class PartFiles:
    """The files of parts, the narrowest first, read as the one file that they are together; see `TensorFile`.

    Attributes:
        path: Their index.
        widths: All widths of the index.
        shapes: Name -> shape of every tensor, joined.
        dtypes: Name -> type of every tensor.

    Raises:
        InputError: A file is no complete safetensors file, or they do not fit each other.
    """

    def __init__(self, path: Path, widths: tuple[float, ...], parts: Sequence[Path]) -> None:
        self.path, self.widths = path, widths
        with ExitStack() as stack:
            self._files = [stack.enter_context(TensorFile(part)) for part in parts]
            try:
                self.shapes = join_shapes([file.shapes for file in self._files])
            except InputError as error:
                raise InputError(f'{path}: {error}') from None
            self.dtypes: dict[str, torch.dtype] = {}
            for file in self._files:
                for name, dtype in file.dtypes.items():
                    owner = name if _side(name) is None else name.rpartition('.')[0]
                    if self.dtypes.setdefault(owner, dtype) != dtype:
                        raise InputError(f'{path}: {name} is of {dtype}, not {self.dtypes[owner]} as in other parts')
            self._stack = stack.pop_all()

    def __enter__(self) -> 'PartFiles':
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def whole(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        pieces = (name, f'{name}.{_RIGHT}', f'{name}.{_BELOW}')
        return join([{each: file.whole(each) for each in pieces if each in file.shapes} for file in self._files])[name]

    def part(self, name: str, index: Sequence[slice]) -> torch.Tensor:
        """Read the block of a tensor that slices select."""
        return self.whole(name)[tuple(index)]

    def copy_leading(self, name: str, target: torch.Tensor) -> None:
        """Read the leading block of a tensor into `target`, of any shape, dtype and device but without gradient."""
        target.copy_(self.part(name, [slice(0, n) for n in target.shape]))


# The index


@dataclass(frozen=True)
class Part:
    """A file of the index: its width, name, bytes and hash."""

    width: float
    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """Content of `index.json`: parts, the narrowest first, and bytes and hash of the file that they are together."""

    size: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def widths(self) -> tuple[float, ...]:
        """All widths, in descending order."""
        return tuple(part.width for part in reversed(self.parts))

    def up_to(self, width: float) -> list[Part]:
        """The parts that a network at `width` needs."""
        return [part for part in self.parts if part.width <= width]


def read_index(path: Path) -> Index:
    """Read an index, of which nothing is taken for granted.

    Raises:
        InputError: It is none, or has widths, names, sizes or hashes that no index has.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise InputError(f'{path} cannot be read: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path} is not JSON ({error})') from None
    parts = content.get('parts') if isinstance(content, dict) else None
    if not isinstance(parts, list) or not 0 < len(parts) <= _MOST_PARTS:
        raise InputError(f'{path} is no index of weights in parts')
    size, digest = _checked_file(path, content)
    index = Index(size, digest, tuple(_checked_part(path, part) for part in parts))
    if any(a.width >= b.width for a, b in zip(index.parts, index.parts[1:], strict=False)):
        raise InputError(f'{path}: its widths {", ".join(f"{part.width:g}" for part in index.parts)} do not ascend')
    return index


def _checked_part(path: Path, part: Any) -> Part:
    width = part.get('width') if isinstance(part, dict) else None
    if not isinstance(width, float) or not 0 < width <= 1 or round(width, WIDTH_DIGITS) != width:
        raise InputError(f'{path}: {width!r:.60} is not a width')
    name = f'{width_key(width)}.safetensors'
    if part.get('file') != name:
        raise InputError(f'{path}: the file of width {width:g} is {part.get("file")!r:.60}, not {name}')
    return Part(width, name, *_checked_file(path, part))


def _checked_file(path: Path, about: Mapping[str, Any]) -> tuple[int, str]:
    size, digest = about.get('size'), about.get('sha256')
    if type(size) is not int or size <= 0:
        raise InputError(f'{path}: the size {size!r:.60} is not a number of bytes')
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise InputError(f'{path}: {digest!r:.80} is not a sha256')
    return size, digest


def encode(path: Path, shapes: Mapping[float, Shapes]) -> dict[str, bytes]:
    """The index and the parts of a safetensors file, by their names beside it.

    Args:
        path: The file, of a slimmable network.
        shapes: Width -> shapes of the network that holds this width and those below it.
    """
    with TensorFile(path) as file:
        tensors = {name: file.whole(name) for name in file.shapes}
    widths = sorted(shapes)
    nested = [{name: shape for name, shape in shapes[width].items() if name in tensors} for width in widths]
    files: dict[str, bytes] = {}
    parts = []
    for width, part in zip(widths, split(tensors, nested), strict=True):
        name, content = f'{width_key(width)}.safetensors', save(part, {'format': 'pt'})
        files[f'{FOLDER}/{name}'] = content
        parts.append(asdict(Part(width, name, len(content), sha256(content).hexdigest())))
    index = {'size': path.stat().st_size, 'sha256': file_hash(path), 'parts': parts}
    return {INDEX: json.dumps(index, indent=2).encode() + b'\n', **files}
