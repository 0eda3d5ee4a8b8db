"""Exact principal components of a few long rows, such as gradients or weights over training."""

from typing import NamedTuple

import torch

from slimclr_hub.errors import InputError


class Components(NamedTuple):
    """Principal components of N rows of D numbers.

    Args:
        directions: [K, D], orthonormal, in descending order of the variance along them; float64. The largest entry of
            each is positive. A direction along which rows do not vary is zero.
        projections: [N, K], the rows as they are along the directions, without subtracting the mean; float64.
        ratios: [K], share of each component in the variance of the rows.
    """

    directions: torch.Tensor
    projections: torch.Tensor
    ratios: torch.Tensor


def principal_components(rows: torch.Tensor, count: int = 2) -> Components:
    """Compute `count` principal components of [N, D] about their mean, as scikit-learn's PCA does, in float64.

    They come from the Gram matrix [N, N], as N is far below D.

    Raises:
        InputError: There are fewer than two rows, or fewer rows or columns than components.
    """
    length, columns = rows.shape
    if length < 2 or not 1 <= count <= min(length, columns):
        raise InputError(f'{count} principal components of {length} rows of {columns} numbers; give more rows')
    rows = rows.double()
    centred = rows - rows.mean(0)
    squares, vectors = torch.linalg.eigh(centred @ centred.T)
    squares, vectors = squares.flip(0).clamp(min=0.0), vectors.flip(1)
    total = squares.sum()
    # Values below the rounding of the rows are zero, and have no direction.
    rounding = rows.square().sum() * length * torch.finfo(rows.dtype).eps
    squares = squares.where(squares > rounding, 0.0)[:count]
    lengths = squares.sqrt()
    directions = (vectors[:, :count].T @ centred) / lengths.where(lengths > 0, 1.0)[:, None]
    directions = directions.where(lengths[:, None] > 0, 0.0)
    peaks = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions.where(peaks >= 0, -directions)
    return Components(directions, rows @ directions.T, squares / total.where(total > 0, 1.0))
