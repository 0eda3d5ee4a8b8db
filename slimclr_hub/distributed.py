"""What processes need of each other: keys, one permutation for all, and what the main process alone has found.

Without an initialised process group each function does its part for the one process there is.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.errors import InputError

T = TypeVar('T')


def from_main_process(work: Callable[[], T]) -> T:
    """The result of work that only the main process does, on all of them; all processes call this together.

    Raises:
        InputError: The work raised it, or an OSError, whose message it then has.
    """
    found: list[object] = [None]
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except (InputError, OSError) as error:
            found[0] = error if isinstance(error, InputError) else InputError(str(error))
    result = broadcast_object_list(found)[0]
    if isinstance(result, InputError):
        raise result
    return result


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place among all, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate equally shaped tensors of all processes in order of rank: [B, ...] -> [B * world size, ...].

    No gradient flows through it.
    """
    if world_size() == 1:
        return x
    gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


def gather_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """As `gather`, and each process gets the gradients that the others have for its part, summed."""
    if world_size() == 1:
        return x
    return torch.cat(list(dist.nn.functional.all_gather(x)))


def local_part(x: torch.Tensor) -> torch.Tensor:
    """This process's part of what `gather` returns."""
    return x.chunk(world_size())[rank()] if world_size() > 1 else x


def shared_permutation(n: int, device: torch.device) -> torch.Tensor:
    """A random permutation of n, drawn by the first process."""
    return shared(torch.randperm(n, device=device))


def shared(x: torch.Tensor) -> torch.Tensor:
    """The first process's `x`, in place, on all of them."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def average_batchnorm(module: nn.Module) -> None:
    """Replace the running statistics of batch normalisation by their mean over the processes."""
    if world_size() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            for statistic in layer.running_mean, layer.running_var:
                dist.all_reduce(statistic)
                statistic /= world_size()
