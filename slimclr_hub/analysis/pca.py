"""Exact principal components of a few long rows, such as gradients or weights over training."""

from typing import NamedTuple

import torch

from slimclr_hub.errors import InputError


class Components(NamedTuple):
    """Principal components of N rows of D numbers about the origin.

    Args:
        directions: [K, D], orthonormal, in descending order of the rows' squared length along them; float64. The
            largest entry of each is positive. A direction along which there is none is zero.
        projections: [N, K], the rows along the directions; float64.
        ratios: [K], share of each component in the squared length of all rows.
    """

    directions: torch.Tensor
    projections: torch.Tensor
    ratios: torch.Tensor


def principal_components(rows: torch.Tensor, count: int = 2) -> Components:
    """Compute `count` principal components of [N, D] in float64 from the Gram matrix [N, N], as N is far below D.

    The mean is not subtracted: rows are offsets from the point from which directions start.

    Raises:
        InputError: There are fewer than two rows, or fewer rows or columns than components.
    """
    length, columns = rows.shape
    if length < 2 or not 1 <= count <= min(length, columns):
        raise InputError(f'{count} principal components of {length} rows of {columns} numbers; give more rows')
    rows = rows.double()
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    squares, vectors = squares.flip(0).clamp(min=0.0), vectors.flip(1)
    total = squares.sum()
    # Values below the rounding of the largest are zero, and have no direction.
    squares = squares.where(squares > squares[0] * length * torch.finfo(squares.dtype).eps, 0.0)[:count]
    lengths = squares.sqrt()
    directions = (vectors[:, :count].T @ rows) / lengths.where(lengths > 0, 1.0)[:, None]
    directions = directions.where(lengths[:, None] > 0, 0.0)
    peaks = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions.where(peaks >= 0, -directions)
    return Components(directions, rows @ directions.T, squares / total.where(total > 0, 1.0))
