"""Fitting a file of tensors to a network, strictly: what does not fit is an error that names the tensor."""

from collections.abc import Mapping, Sequence

import torch

from slimclr_hub.errors import InputError
from slimclr_hub.models.dense import DenseResNet
from slimclr_hub.models.slimmable_resnet import SlimmableResNet
from slimclr_hub.models.widths import width_key
from slimclr_hub.weights.slices import is_switched, leading, switch_name, unswitch_name

_FIRST_CONV = 'conv1.weight'
_NAMED_AT_MOST = 5


def checkpoint_filter_fn(
    tensors: Mapping[str, torch.Tensor], model: SlimmableResNet | DenseResNet
) -> dict[str, torch.Tensor]:
    """Cut a slimmable network's tensors to those of `model`, which may hold fewer widths or be dense.

    A head of other classes is left out, as timm does; the first convolution keeps its input channels, which timm
    adapts after this.

    Args:
        tensors: State dict of a slimmable network, or of a network just like `model`.
        model: The network to load them into.

    Raises:
        InputError: A tensor is missing, misshapen or not expected; the message names it.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    key = width_key(model.width)
    if _FIRST_CONV not in tensors:
        raise InputError(f'{_FIRST_CONV} is missing: this is not a file of a {type(model).__name__}')
    ratio = wanted[_FIRST_CONV][0] / tensors[_FIRST_CONV].shape[0]

    fitted, used, problems = {}, set(), []
    for name, shape in wanted.items():
        source = name
        if isinstance(model, DenseResNet) and name not in tensors:
            source = switch_name(name, key)
        if source not in tensors:
            if not name.startswith('fc.'):
                problems.append(f'missing {source}')
            continue
        used.add(source)
        tensor = tensors[source]
        if name == _FIRST_CONV:
            shape = (shape[0], *tensor.shape[1:])
        if name.startswith('fc.') and tensor.shape[0] != shape[0]:
            continue
        # What belongs to one width is never sliced.
        if not _is_slice(shape, tensor.shape, 1.0 if len(shape) == 1 or is_switched(source) else ratio):
            problems.append(f'{source} has shape {list(tensor.shape)}, {list(shape)} or its multiple is needed')
            continue
        fitted[name] = leading(tensor, shape)
    known = {unswitch_name(name) for name in used} | {'fc.weight', 'fc.bias'}
    problems += [f'unexpected {name}' for name in tensors if unswitch_name(name) not in known]
    if problems:
        more = f' and {len(problems) - _NAMED_AT_MOST} more' if len(problems) > _NAMED_AT_MOST else ''
        raise InputError(f'the weights do not fit: {"; ".join(problems[:_NAMED_AT_MOST])}{more}')
    return fitted


def _is_slice(shape: Sequence[int], source: Sequence[int], ratio: float) -> bool:
    # Channels are sliced, kernels are not.
    return tuple(shape[2:]) == tuple(source[2:]) and all(
        n == whole or abs(n - whole * ratio) < 1 for n, whole in zip(shape[:2], source[:2], strict=True)
    )
