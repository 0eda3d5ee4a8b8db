"""Strict loading of tensors into a network: one that does not fit is an error that names it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from timm.models import adapt_input_conv

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.weights.checkpoint import check_values
from slimclr_hub.weights.layouts import ARCHITECTURES, Layout, layout_of, mismatches
from slimclr_hub.weights.progressive import PartFiles
from slimclr_hub.weights.slices import (
    DISJOINT,
    batch_counts,
    key_width,
    leading,
    switch_name,
    switched_key,
    unswitch_name,
    width_key,
    with_batch_counts,
)
from slimclr_hub.weights.source import open_weights
from slimclr_hub.weights.tensor_file import TensorFile

FIRST_CONV = 'conv1.weight'
_HEAD = 'fc.'

Shapes = Mapping[str, Sequence[int]]


class Loadable(Protocol):
    """A network, slimmable or dense, as loading sees it."""

    in_chans: int
    pretrained_cfg: dict[str, Any]

    @property
    def width(self) -> float:
        """Its active or only width."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""


def checkpoint_filter_fn(tensors: Mapping[str, torch.Tensor], model: Loadable) -> dict[str, torch.Tensor]:
    """Cut the tensors of a slimmable network to those of `model`, which may hold fewer widths or be dense.

    A head with another number of classes is left out, as timm does; the first convolution keeps its input channels,
    which timm adapts after this.

    Raises:
        InputError: A tensor is missing, misshapen or not expected; the message names it.
    """
    wanted = _shapes(model.state_dict())
    fitted = {}
    for name, source in fit(wanted, _shapes(tensors), model.width).items():
        shape = wanted[name]
        if name == FIRST_CONV:
            shape = (shape[0], *tensors[source].shape[1:])
        check_values(source, tensors[source])
        fitted[name] = leading(tensors[source], shape)
    return {name: tensor for name, tensor in with_batch_counts(fitted).items() if name in wanted}


@torch.no_grad()
def load_file(model: Loadable, path: Path) -> None:
    """Load a network's tensors from a slimmable one's weights or its own, reading only slices that it needs.

    A head of other classes than the file's is left as it is; a first convolution for other image channels is adapted as
    timm does. If a tensor does not fit, or is not of real numbers, none is changed.

    Raises:
        InputError: The file is damaged, or a tensor is missing, misshapen, not expected, or holds NaN or infinity.
    """
    state = model.state_dict()
    with open_weights(path, largest_width(model)) as file:
        sources = _fit_to_file(state, file, model.width)
        absent = [name for name in state if name.startswith(_HEAD) and name not in sources]
        if absent and expects_head(model):
            raise InputError(f'{path}: the weights do not fit: missing {shorten(absent)}')
        for source in sources.values():
            check_values(source, torch.empty(0, dtype=file.dtypes[source]))
        for name, source in sources.items():
            if name == FIRST_CONV:
                state[name].copy_(read_first_conv(file, slice(0, len(state[name])), model.in_chans))
            else:
                file.copy_leading(source, state[name])
            check_values(name, state[name])
        for name in batch_counts(state) & (state.keys() - sources.keys()):
            state[name].fill_(1)


def check_fits(model: Loadable, path: Path) -> None:
    """Check that the tensors of a network, except a new head, are in its weights; see `fit`."""
    with open_weights(path, largest_width(model)) as file:
        _fit_to_file(model.state_dict(), file, model.width)


def largest_width(model: Loadable) -> float:
    """The largest width that a network holds."""
    return _largest_width(_shapes(model.state_dict())) or model.width


def check_head(path: Path, num_classes: int, width: float) -> None:
    """Check that weights have a head of so many classes, before a network of up to `width` is built.

    Raises:
        InputError: It has none, or one of others.
    """
    with open_weights(path, width) as file:
        heads = [name for name in file.shapes if name.startswith(_HEAD) and name.endswith('.weight')]
        if all(file.shapes[name][:1] != (num_classes,) for name in heads):
            found = f'{heads[0]} has shape {list(file.shapes[heads[0]])}' if heads else f'they have no {_HEAD}weight'
            raise InputError(f'{path}: the weights do not fit: num_classes is {num_classes}, but {found}')


def expects_head(model: Loadable) -> bool:
    """True if the head of a network from timm's factory comes from its weights; false if it is a new one."""
    num_classes = getattr(model, 'num_classes', 0)
    return num_classes > 0 and model.pretrained_cfg.get('num_classes') == num_classes


def read_first_conv(file: TensorFile | PartFiles, rows: slice, in_chans: int) -> torch.Tensor:
    """Some output channels of the first convolution, adapted to images of `in_chans` channels as timm does."""
    weight = file.part(FIRST_CONV, [rows])
    return adapt_input_conv(in_chans, weight, base_chans=weight.shape[1])


def fit(wanted: Shapes, available: Shapes, width: float) -> dict[str, str]:
    """Map each tensor of a network to the tensor of the file whose leading block it is.

    A head is left out if the file has none, or one of other classes. `width` is the network's, if it is dense.

    Raises:
        InputError: A tensor is missing, misshapen or not expected; the message names it.
    """
    if wanted == available:
        return {name: name for name in wanted}
    counts = batch_counts(wanted)
    if FIRST_CONV not in available:
        raise InputError(f'{FIRST_CONV} is missing: these are not the weights of such a network')
    _check_overlap(wanted, available)
    key = width_key(width)
    # Channels are rounded, so that only the widths tell the share of them exactly; a dense file does not know its own.
    largest = _largest_width(available)
    ratio = (_largest_width(wanted) or width) / largest if largest else wanted[FIRST_CONV][0] / available[FIRST_CONV][0]
    dense = not any(map(switched_key, wanted))
    for_each_width = {unswitch_name(name) for name in available if dense and switched_key(name)}
    fitted: dict[str, str] = {}
    problems = []
    for name, shape in wanted.items():
        source = switch_name(name, key) if name in for_each_width else name
        if source not in available:
            if not name.startswith(_HEAD) and name not in counts:
                problems.append(f'missing {source}')
            continue
        other = available[source]
        if name.startswith(_HEAD) and len(other) == len(shape) and other[0] != shape[0]:
            continue
        if name == FIRST_CONV and len(other) == len(shape):
            shape = (shape[0], *other[1:])
        # What belongs to one width is never sliced.
        if not _is_slice(shape, other, 1.0 if len(shape) == 1 or switched_key(source) else ratio):
            problems.append(f'{source} has shape {list(other)}, {list(shape)} or its multiple is needed')
            continue
        fitted[name] = source
    known = {unswitch_name(name) for name in {*wanted, *counts}} | {f'{_HEAD}weight', f'{_HEAD}bias'}
    problems += [f'unexpected {name}' for name in available if unswitch_name(name) not in known]
    if problems:
        raise InputError(f'the weights do not fit: {shorten(problems)}{_explain(wanted, available)}')
    return fitted


def _fit_to_file(state: Mapping[str, torch.Tensor], file: TensorFile | PartFiles, width: float) -> dict[str, str]:
    try:
        return fit(_shapes(state), file.shapes, width)
    except InputError as error:
        raise InputError(f'{file.path}: {error}') from error


def check_complete(shapes: Shapes) -> Layout:
    """Check that tensors are those of one complete slimmable network, with or without a head.

    They are compared with a network of the recognised architecture, built without memory. Its size is bounded by the
    number of tensors, so that no file can ask for more than it holds.

    Raises:
        InputError: A tensor is missing, unexpected or misshapen, which the message names, or there is no such network.
    """
    layout = layout_of(shapes)
    if layout.architecture is None:
        raise InputError(f'{layout} is none of the networks here, {", ".join(ARCHITECTURES.values())}')
    if not layout.widths or len(shapes) < len(layout.widths) * sum(layout.stages):
        raise InputError(f'not {layout}: {len(shapes)} tensors are too few for a normalisation of each width')
    try:
        network = timm.create_model(
            layout.architecture,
            widths=layout.widths,
            overlap=layout.overlap,
            head='switchable' if layout.head == 'none' else layout.head,
            num_classes=layout.num_classes,
            in_chans=layout.in_chans,
            device='meta',
        )
    except RuntimeError as error:  # sizes beyond what a tensor can have
        raise InputError(f'not {layout}: {error}') from None
    expected = _shapes(network.state_dict())
    # Some kinds of pooling give a head twice as many features.
    twice = {name: (n[0], 2 * n[1]) for name, n in expected.items() if name.startswith(_HEAD) and len(n) == 2}
    if all(tuple(shapes.get(name, shape)) == shape for name, shape in twice.items()):
        expected.update(twice)
    counts = batch_counts(expected)
    expected = {name: shape for name, shape in expected.items() if name in shapes or name not in counts}
    if problems := mismatches(expected, shapes):
        raise InputError(f'not {layout}: {shorten(problems)}')
    return layout


def _check_overlap(wanted: Shapes, available: Shapes) -> None:
    # If widths do not overlap, a leading block is no sub-network, and only the very same widths fit.
    if DISJOINT not in wanted and DISJOINT not in available:
        return
    if DISJOINT not in available:
        raise InputError('overlap=False needs weights that were trained so, which these were not; leave overlap out')
    theirs = layout_of(available).widths
    if DISJOINT not in wanted or layout_of(wanted).widths != theirs:
        raise InputError(
            f'the widths of these weights do not overlap; they need a slimmable network with overlap=False and '
            f'widths={theirs}, of which `extract` gives one width'
        )


def _explain(wanted: Shapes, available: Shapes) -> str:
    # The tensors have been named; this adds the likely reason.
    try:
        ours, theirs = layout_of(wanted), layout_of(available)
    except InputError:
        return ''
    if (ours.expansion, ours.stages) != (theirs.expansion, theirs.stages) or (
        ours.widths and theirs.widths and ours.full_stem != theirs.full_stem
    ):
        return f'. The file is of {theirs}; the network is {ours}'
    lacking = [str(width) for width in ours.widths if width not in theirs.widths]
    if theirs.widths and lacking:
        held = ', '.join(map(str, theirs.widths))
        return f'. The file holds the widths {held}, not {", ".join(lacking)}; `calibrate_width` adds one to a network'
    return ''


def _largest_width(shapes: Shapes) -> float:
    return max((key_width(key) for name in shapes if (key := switched_key(name))), default=0)


def _is_slice(shape: Sequence[int], source: Sequence[int], ratio: float) -> bool:
    # Channels are sliced, kernels are not.
    return (
        len(shape) == len(source)
        and tuple(shape[2:]) == tuple(source[2:])
        and all(n == whole or abs(n - whole * ratio) < 1 for n, whole in zip(shape[:2], source[:2], strict=True))
    )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
