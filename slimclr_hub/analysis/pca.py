"""Exact principal components of a few long rows, such as gradients or weights over training."""

from dataclasses import dataclass

import torch

from slimclr_hub.errors import InputError


@dataclass(frozen=True)
class Components:
    """Principal components of N rows of D numbers.

    Args:
        directions: [K, D], orthonormal, in descending order of variance; float64. The largest entry of each is
            positive. A direction without variance is zero.
        projections: [N, K], the rows minus `origin`, along the directions; float64.
        variances: [K], squared length of each column of `projections` over N - 1; the variance along a direction if the
            origin is the mean.
        ratios: [K], share of each component in the squared length of all rows minus `origin`.
        origin: [D], subtracted from every row; float64.
    """

    directions: torch.Tensor
    projections: torch.Tensor
    variances: torch.Tensor
    ratios: torch.Tensor
    origin: torch.Tensor


def principal_components(rows: torch.Tensor, count: int = 2, origin: torch.Tensor | None = None) -> Components:
    """Compute principal components in float64 from the Gram matrix of the rows [N, N], as N is far below D.

    Args:
        rows: [N, D], at least two.
        count: Number of components, K.
        origin: [D], the point from which directions start; the mean of the rows by default. Li et al. 2018
            (https://arxiv.org/abs/1712.09913), whom the paper follows, take the last weights of a trajectory.

    Raises:
        InputError: There are fewer than two rows, or fewer rows or columns than components.
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
    # Values below the rounding of the largest are zero, and have no direction.
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
