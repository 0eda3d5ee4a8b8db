"""The momentum encoder: a dense network that follows the full width of a slimmable one."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from slimclr_hub.weights.slices import switch_name, width_key


def pair_parameters(follower: nn.Module, leader: nn.Module, key: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters of the dense `follower` and of the slimmable `leader` at the width `key`, in the same order."""
    leading: Mapping[str, nn.Parameter] = dict(leader.named_parameters())
    followers: list[torch.Tensor] = []
    leaders: list[torch.Tensor] = []
    for name, parameter in follower.named_parameters():
        followers.append(parameter)
        leaders.append(leading[name if name in leading else switch_name(name, key)])
    return followers, leaders


def follow_modules(pairs: Iterable[tuple[nn.Module, nn.Module]], width: float, momentum: float) -> None:
    """Move the parameters, not the buffers, of dense modules towards slimmable ones at a width.

    Args:
        pairs: (dense, slimmable).
        width: The width that the dense ones have.
        momentum: Share of itself that each parameter keeps.
    """
    for follower, leader in pairs:
        follow(*pair_parameters(follower, leader, width_key(width)), momentum)


@torch.no_grad()
def follow(followers: list[torch.Tensor], leaders: list[torch.Tensor], momentum: float) -> None:
    """Move each follower to momentum * follower + (1 - momentum) * leader, in place (He et al. 2020, Eq. 2).

    Two products and a sum, each rounded, rather than `lerp`: early training amplifies rounding a thousandfold, and in
    this form four steps reproduce the recorded numbers of the authors' implementation to the last bit.
    """
    moves = torch._foreach_mul(leaders, 1.0 - momentum)
    torch._foreach_mul_(followers, momentum)
    torch._foreach_add_(followers, list(moves))
