"""Exact principal components of few long rows, such as gradients or weights over training."""

from dataclasses import dataclass

import torch

from slimclr_hub.errors import InputError


@dataclass(frozen=True)
class Components:
    """Principal components of N rows of D numbers.

    Args:
        directions: [K, D], orthonormal, in descending order of the variance along them; float64. The largest entry of
            each is positive. A direction along which the rows do not vary is zero.
        projections: [N, K], the rows, less `origin`, along the directions; float64.
        variances: [K], squared length of each column of `projections` over N - 1, which is the variance along a
            direction where the origin is the mean.
        ratios: [K], the share of each in the squared length of all rows, less `origin`.
        origin: [D], what was taken off every row; float64.
    """

    directions: torch.Tensor
    projections: torch.Tensor
    variances: torch.Tensor
    ratios: torch.Tensor
    origin: torch.Tensor


def principal_components(rows: torch.Tensor, count: int = 2, origin: torch.Tensor | None = None) -> Components:
    """The directions along which rows vary most.

    From the Gram matrix of the rows [N, N], since there are far fewer of them than columns, in float64.

    Args:
        rows: [N, D], at least two.
        count: K, components wanted.
        origin: [D], where directions start: the mean of the rows unless given. Li et al. 2018
            (https://arxiv.org/abs/1712.09913), whom the paper follows, take the last weights of a trajectory.

    Raises:
        InputError: There are fewer than two rows, or no more rows or columns than components.
    """
    length, columns = rows.shape
    if length < 2 or not 1 <= count <= min(length, columns):
        raise InputError(f'{count} principal components of {length} rows of {columns} numbers; give more rows')
    rows = rows.double()
    origin = rows.mean(0) if origin is None else origin.to(rows)
    centred = rows - origin
    squares, vectors = torch.linalg.eigh(centred @ centred.T)
    squares, vectors = squares.flip(0).clamp(min=0.0), vectors.flip(1)
    total = squares.sum()
    # What is below the rounding of the largest is nothing, and has no direction.
    squares = squares.where(squares > squares[0] * length * torch.finfo(squares.dtype).eps, 0.0)[:count]
    lengths = squares.sqrt()
    directions = (vectors[:, :count].T @ centred) / lengths.where(lengths > 0, 1.0)[:, None]
    directions = directions.where(lengths[:, None] > 0, 0.0)
    peaks = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions.where(peaks >= 0, -directions)
    return Components(
        directions=directions,
        projections=centred @ directions.T,
        variances=squares / (length - 1),
        ratios=squares / total.where(total > 0, 1.0),
        origin=origin,
    )
