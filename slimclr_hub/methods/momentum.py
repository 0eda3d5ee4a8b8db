"""The momentum encoder: a dense network that follows the full width of a slimmable one."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from slimclr_hub.weights.slices import switch_name, width_key


class Followers:
    """Parameters, not buffers, of dense modules, and those of slimmable modules at a width that they follow.

    They are paired once, here, by name; they may be moved and loaded afterwards, but not replaced.

    Args:
        pairs: (dense, slimmable).
        width: The width that the dense ones have.
        lerp: Move them in one pass over memory, instead of two products and a sum with a tensor between; equal but for
            rounding.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]], width: float, lerp: bool = True) -> None:
        self.followers: list[torch.Tensor] = []
        self.leaders: list[torch.Tensor] = []
        self.lerp = lerp
        for follower, leader in pairs:
            leading: Mapping[str, nn.Parameter] = dict(leader.named_parameters())
            for name, parameter in follower.named_parameters():
                self.followers.append(parameter)
                self.leaders.append(leading[name if name in leading else switch_name(name, width_key(width))])

    @torch.no_grad()
    def move(self, momentum: float) -> None:
        """Move each follower to momentum * follower + (1 - momentum) * leader, in place (He et al. 2020, Eq. 2)."""
        if self.lerp:
            torch._foreach_lerp_(self.followers, self.leaders, 1.0 - momentum)
            return
        # Each product rounded, as the authors' implementation does: early training amplifies rounding a thousandfold,
        # and in this form four steps reproduce its recorded numbers to the last bit.
        moves = torch._foreach_mul(self.leaders, 1.0 - momentum)
        torch._foreach_mul_(self.followers, momentum)
        torch._foreach_add_(self.followers, list(moves))
