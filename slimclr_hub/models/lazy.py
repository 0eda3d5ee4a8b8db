"""A slimmable network that holds the widths in use and reads others from its file on demand."""

import copy
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.models.layers import SwitchableBatchNorm2d, SwitchableLinear, shapes_at, tensors_of
from slimclr_hub.models.loading import FIRST_CONV, expects_head, fit, load_file, read_first_conv
from slimclr_hub.models.slicing import SlicedWeight, memory_format
from slimclr_hub.models.slimmable_resnet import HEAD_STD, SlimmableResNet
from slimclr_hub.models.widths import DEFAULT_WIDTHS, check_width, check_widths, width_key
from slimclr_hub.weights.checkpoint import check_values
from slimclr_hub.weights.progressive import PartFiles
from slimclr_hub.weights.slices import BATCH_COUNT, unswitch_name
from slimclr_hub.weights.source import open_weights
from slimclr_hub.weights.tensor_file import TensorFile

# Maps the tensor that grows, and rows and columns of the larger one, to these rows and columns.
Reader = Callable[[torch.Tensor, slice, slice], torch.Tensor]

_Switch = SwitchableBatchNorm2d | SwitchableLinear
_GROWING = threading.RLock()  # of all networks: a lock of its own could neither be copied nor pickled


class LazySlimmableResNet(SlimmableResNet):
    """Slimmable ResNet that `timm.create_model(..., pretrained=True, width=0.25, lazy=True)` builds.

    It begins with the tensors of one width. `set_width`, `forward_at`, `forward_widths` and `extract` read the further
    tensors of another width from the safetensors file, and keep them. Tensors that are held already stay as they are,
    fine-tuned or not. Parameters that grow are new ones, unknown to an optimizer made before: to train, take the
    network without `lazy`, or call `hold` first. Several threads may call `forward_at` at once, one of which reads.

    Args:
        args: As in `SlimmableResNet`.
        widths: The widths to choose from.
        width: The first width to hold; the largest unless given.
        kwargs: As in `SlimmableResNet`.
    """

    def __init__(
        self, *args: Any, widths: Sequence[float] = DEFAULT_WIDTHS, width: float | None = None, **kwargs: Any
    ) -> None:
        widths = check_widths(widths)
        first = widths[0] if width is None else check_width(width, widths)
        super().__init__(*args, widths=widths, width=first, held=(first,), **kwargs)
        self._path: Path | None = None
        self._stamp: tuple[int, int] | None = None
        self._head_from_file = False

    def load_pretrained(self, path: str | Path) -> None:
        """Load the held widths, and remember the file, or the index of its parts, for the others.

        Raises:
            InputError: The file does not fit, at one of the widths that are not read yet either, or lacks one.
        """
        path = Path(os.path.abspath(path))
        load_file(self, path)
        self._head_from_file = expects_head(self)
        with open_weights(path, max(self._held)) as file:
            there = file.widths
            if lacking := [str(width) for width in self._widths if width not in there]:
                raise InputError(f'{path} holds the widths {", ".join(map(str, there))}, not {", ".join(lacking)}')
            if isinstance(file, TensorFile):  # of one in parts the others are checked when they are there
                self._check(file, self._widths)
        self._path, self._stamp = path, _stamp(path)

    def _check(self, file: TensorFile | PartFiles, widths: Collection[float]) -> None:
        expected = shapes_at(self, widths)
        if not self._head_from_file:
            expected = {name: shape for name, shape in expected.items() if not name.startswith('fc.')}
        ours = {unswitch_name(name) for name in expected}  # of feature maps, stages after the last are left out
        found = {name: shape for name, shape in file.shapes.items() if unswitch_name(name) in ours}
        try:
            fit(expected, found, max(widths))
        except InputError as error:
            raise InputError(f'{file.path}: {error}') from error

    @property
    def held(self) -> tuple[float, ...]:
        """The widths whose tensors are in memory, in descending order."""
        return self._held

    def _hash(self) -> str:
        self.hold()  # files tell their network by the tensors of all widths
        return super()._hash()

    def hold(self, widths: Iterable[float] | None = None) -> None:
        """Read the tensors of `widths`, all of them unless given, that are not in memory: all together or none.

        Raises:
            InputError: The network has no such width, its file was removed or changed, or a part of it cannot be had.
        """
        wanted = {check_width(width, self._widths) for width in (self._widths if widths is None else widths)}
        if self._path is not None and wanted - set(self._held):
            with self._open(max(wanted)):
                pass  # a download is not to keep other networks waiting
        with _GROWING:
            if lacking := wanted - set(self._held):
                self._grow(lacking)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, head: str | None = None) -> None:
        """Replace the head as `SlimmableResNet` does; widths that are read later get a new head too."""
        super().reset_classifier(num_classes, global_pool, head)
        self._head_from_file = False

    def _ready(self, width: float) -> float:
        width = super()._ready(width)
        if width not in self._held:
            self.hold([width])
        return width

    @torch.inference_mode(False)  # what was made in that mode could never be trained
    @torch.no_grad()
    def _grow(self, lacking: set[float]) -> None:
        largest = max(*lacking, *self._held)
        # All is read before anything changes, so that a failure leaves the network as it was.
        with self._open(largest) as file:
            self._check(file, {*lacking, largest})  # others may have been added since, as `calibrate_width` does
            weights = {
                module: _grown(module.weight, [stop for _, stop in module.spans(largest)], self._reader(file, name))
                for name, module in self.named_modules()
                if isinstance(module, SlicedWeight)
            }
            siblings = {
                (switch, width): self._sibling(file, name, switch, width)
                for name, switch in _switches(self)
                for width in sorted(lacking)
            }
        for module, weight in weights.items():
            # In this order, since a layer reads its weight first: a pass in another thread at a width that is held
            # takes the leading block of either weight, and the whole of none that is larger.
            _set_sizes(module, weight.shape)
            _set_tensor(module, 'weight', weight)
        for (switch, width), sibling in siblings.items():
            switch[width_key(width)] = sibling
        self._held = tuple(sorted({*self._held, *lacking}, reverse=True))

    def _open(self, width: float) -> TensorFile | PartFiles:
        if self._path is None:
            raise InputError('this network has not been loaded from a file yet; see load_pretrained')
        if not self._path.is_file() or _stamp(self._path) != self._stamp:
            raise InputError(f'{self._path} was removed or changed after it had been opened; create the network anew')
        return open_weights(self._path, width)

    def _sibling(self, file: TensorFile | PartFiles, name: str, switch: _Switch, width: float) -> nn.Module:
        # A copy of another width's, so that its class, mode, device and dtype are those that the user has given it.
        sibling = copy.deepcopy(switch[width_key(self._held[0])])
        for leaf, old in tensors_of(sibling):
            source = f'{name}.{width_key(width)}.{leaf}'
            if name == 'fc' and not self._head_from_file:
                new = torch.zeros_like(old) if old.ndim == 1 else _new_head(old, shapes_at(self, [width])[source])
            elif _is_count(source) and source not in file.shapes:
                new = torch.ones_like(old)
            else:
                new = _checked(source, file.whole(source)).to(old)
            _set_tensor(sibling, leaf, new)
        assert isinstance(sibling.weight, torch.Tensor)
        _set_sizes(sibling, sibling.weight.shape)
        return sibling

    def _reader(self, file: TensorFile | PartFiles, name: str) -> Reader:
        source = f'{name}.weight'
        if source == FIRST_CONV:
            return lambda old, rows, _: _checked(source, read_first_conv(file, rows, self.in_chans))
        if name == 'fc' and not self._head_from_file:
            return lambda old, rows, columns: _new_head(old, (rows.stop - rows.start, columns.stop - columns.start))
        return lambda old, rows, columns: _checked(source, file.part(source, (rows, columns)))


def _switches(model: nn.Module) -> Iterator[tuple[str, _Switch]]:
    for name, module in model.named_modules():
        if isinstance(module, _Switch):
            yield name, module


def _is_count(name: str) -> bool:
    return name.endswith(BATCH_COUNT)  # which the file lacks where a normalisation was frozen


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    check_values(name, tensor)
    return tensor


def _grown(old: torch.Tensor, size: Sequence[int], read: Reader) -> torch.Tensor:
    """`old` as the leading block of a tensor of `size`, the rest of which is read."""
    rows, columns = old.shape[:2]
    if tuple(size) == (rows, columns):
        return old
    shape = (*size, *old.shape[2:])
    new = torch.empty(shape, dtype=old.dtype, device=old.device, memory_format=memory_format(old))
    new[:rows, :columns] = old
    if size[0] > rows:
        new[rows:] = read(old, slice(rows, size[0]), slice(0, size[1]))
    if size[1] > columns:
        new[:rows, columns:] = read(old, slice(0, rows), slice(columns, size[1]))
    return new


def _new_head(like: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return nn.init.normal_(torch.empty(size, dtype=like.dtype, device=like.device), std=HEAD_STD)


def _set_tensor(module: nn.Module, leaf: str, new: torch.Tensor) -> None:
    old = getattr(module, leaf)
    if new is old:
        return
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, leaf, new)


def _set_sizes(module: nn.Module, shape: Sequence[int]) -> None:
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif hasattr(module, 'num_features'):  # a normalisation, which may be frozen
        module.num_features = shape[0]  # type: ignore[assignment]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
