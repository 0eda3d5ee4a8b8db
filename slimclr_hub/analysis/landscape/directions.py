"""Directions in the space of weights, along which an error surface is drawn.

Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, sections 4 and 7, https://arxiv.org/abs/1712.09913. A
point or direction is a mapping from the names of tensors to tensors; biases and batch normalisation, whose tensors have
one dimension, stay at their final values in all of it (their option `biasbn`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from slimclr_hub.analysis.pca import principal_components
from slimclr_hub.errors import InputError

Weights = Mapping[str, torch.Tensor]
"""Name -> tensor."""

_NOTHING = 1e-9  # of the largest coordinate


@dataclass(frozen=True)
class Directions:
    """Two directions from a point, and where other points lie in their plane.

    Args:
        first: First direction, float64 tensors.
        second: Second direction, as the first.
        explained: Share of the points' squared distances from the origin that lies along each principal component.
        coordinates: Coordinates of the points, float64 [T, 2], by least squares.
        captured: Share of the squared distances that lies in the plane.
    """

    first: Weights
    second: Weights
    explained: tuple[float, float]
    coordinates: torch.Tensor
    captured: float

    @property
    def offsets(self) -> tuple[float, float]:
        """Largest distance from the origin along each direction, which the paper tells of the second (section 4.4)."""
        largest = self.coordinates.abs().amax(0)
        return largest[0].item(), largest[1].item()


def find_directions(points: Sequence[Weights], origin: Weights, filter_normalised: bool) -> Directions:
    """Principal components of a trajectory, scaled if asked for, and its path along them.

    Args:
        points: The weights at several times; two of them at least apart from the origin.
        origin: The final weights.
        filter_normalised: Scale each filter of a component to the norm of the same filter of `origin`. A coordinate
            then counts lengths of the weights; else it is a distance in the space of weights.

    Raises:
        InputError: Fewer than two points that differ from the origin and each other.
    """
    offsets = [offset(point, origin) for point in points]
    (first, second), explained = principal_directions(offsets)
    if filter_normalised:
        first, second = filter_normalise(first, origin), filter_normalise(second, origin)
    coordinates = project(offsets, first, second)
    total = sum(_dot(each, each) for each in offsets)
    rest = 0.0
    for each, (a, b) in zip(offsets, coordinates.tolist(), strict=True):
        left = {name: tensor - a * first[name] - b * second[name] for name, tensor in each.items()}
        rest += _dot(left, left)
    return Directions(first, second, explained, coordinates, 1 - rest / total)


def moves(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes part: the weight of a convolution or linear layer; no bias, no normalisation."""
    return tensor.ndim > 1


def offset(point: Weights, origin: Weights) -> dict[str, torch.Tensor]:
    """`point` - `origin` in the tensors that take part, float64."""
    return {name: point[name].double() - tensor.double() for name, tensor in origin.items() if moves(tensor)}


def filter_normalise(direction: Weights, weights: Weights) -> dict[str, torch.Tensor]:
    """Scale each filter of a direction to the norm of the same filter of the weights: d <- d / |d| |w| (section 4).

    Args:
        direction: Any direction. A filter of it that is zero stays so.
        weights: The point that it starts from. A filter is what makes one output channel, `weight[i]`.

    Returns:
        The tensors of more than one dimension; without others, which counts as zero.
    """
    scaled = {}
    for name, d in direction.items():
        if not moves(d):
            continue
        w = weights[name].to(d)
        axes = tuple(range(1, d.ndim))
        norms = torch.linalg.vector_norm(d, dim=axes, keepdim=True)
        scale = torch.where(norms > 0, torch.linalg.vector_norm(w, dim=axes, keepdim=True) / norms, 0.0)
        scaled[name] = d * scale
    return scaled


def principal_directions(offsets: Sequence[Weights]) -> tuple[list[dict[str, torch.Tensor]], tuple[float, float]]:
    """First two principal components of the matrix [theta_1 - theta_n; ...; theta_{n-1} - theta_n] (section 7).

    The origin is the final point, not the mean of the rows, which a PCA such as scikit-learn's (and so the code of the
    authors of that paper) would subtract first: with it the plane need not go along the way to the minimum, and
    offsets would not be offsets from the minimum. The first row that is not at zero along a component has a positive
    coordinate, so that all runs begin on the same side.

    Args:
        offsets: Rows, as `offset` gives them; the final point's own, which is zero, changes nothing.

    Returns:
        Both components, each of norm 1 over all tensors, and their shares of the sum of squares.

    Raises:
        InputError: The rows do not span a plane.
    """
    rows = torch.stack([_flat(row) for row in offsets]) if offsets else torch.zeros(0, 1)
    found = principal_components(rows, 2, torch.zeros(rows.shape[1])) if len(rows) > 1 else None
    if found is None or found.ratios[1] == 0:
        raise InputError(
            f'{len(offsets)} points of a trajectory do not span a plane; train with --diagnostics.snapshots 20, or '
            'keep more checkpoints (--run.keep_checkpoints, --run.checkpoint_steps)'
        )
    components = []
    for direction, path in zip(found.directions, found.projections.T, strict=True):
        sign = torch.sign(path[path.abs() > _NOTHING * path.abs().max()][0])
        parts = (sign * direction).split([tensor.numel() for tensor in offsets[0].values()])
        components.append(
            {name: part.reshape(tensor.shape) for part, (name, tensor) in zip(parts, offsets[0].items(), strict=True)}
        )
    return components, (found.ratios[0].item(), found.ratios[1].item())


def project(offsets: Sequence[Weights], first: Weights, second: Weights) -> torch.Tensor:
    """Coordinates [T, 2] of the nearest points of a plane, whose directions need not be orthogonal."""
    ab = _dot(first, second)
    gram = torch.tensor([[_dot(first, first), ab], [ab, _dot(second, second)]], dtype=torch.float64)
    right = torch.tensor([[_dot(row, first), _dot(row, second)] for row in offsets], dtype=torch.float64)
    return torch.linalg.solve(gram, right.T).T


def _flat(point: Weights) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in point.values()])


def _dot(a: Weights, b: Weights) -> float:
    return torch.dot(_flat(a), _flat(b)).item()
