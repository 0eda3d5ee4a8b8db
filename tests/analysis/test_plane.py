import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from slimclr_hub.analysis.trajectory import PlanePath, Trajectory, Weights, filter_normalise, project
from slimclr_hub.errors import InputError

SHAPES = {'conv': (6, 3, 3, 3), 'fc': (5, 6)}


def plane_of(points, normalise: str = 'none') -> tuple[Weights, Weights, PlanePath]:
    """Both directions, and the path of points to the last of them."""
    (first, second), path = Trajectory(Path('run'), tuple(range(len(points))), 1, None, points).plane(normalise)
    return first, second, path


def weights(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def flat(point) -> torch.Tensor:
    return torch.cat([point[name].double().flatten() for name in SHAPES])


def orthonormal() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    basis, _ = torch.linalg.qr(torch.stack([flat(weights(1)), flat(weights(2))], 1))
    found = []
    for column in basis.T:
        parts = column.split([math.prod(SHAPES[name]) for name in SHAPES])
        found.append({name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)})
    return found[0], found[1]


def at(origin, first, second, a: float, b: float) -> dict[str, torch.Tensor]:
    """A point of the plane."""
    return {name: origin[name] + a * first[name] + b * second[name] for name in SHAPES}


PATH = [(10.0, -1.0), (8.0, 2.0), (5.0, 3.0), (2.0, 0.5), (0.0, 0.0)]


def test_filters_have_the_norms_of_the_weights():
    direction, w = weights(1), weights(2)
    scaled = filter_normalise(direction, w)
    for name in SHAPES:
        for d, before, v in zip(scaled[name], direction[name], w[name], strict=True):
            assert d.norm().item() == pytest.approx(v.norm().item(), rel=1e-12)
            assert torch.nn.functional.cosine_similarity(d.flatten(), before.flatten(), 0).item() == pytest.approx(1)


def test_filters_of_zero_stay_finite():
    direction, w = weights(1), weights(2)
    direction['conv'][1] = 0
    w['conv'][2] = 0
    scaled = filter_normalise(direction, w)
    assert not scaled['conv'][1:3].any()
    assert all(tensor.isfinite().all() for tensor in scaled.values())


def test_path_in_a_plane_is_recovered():
    origin, (first, second) = weights(0), orthonormal()
    *_, found = plane_of([at(origin, first, second, a, b) for a, b in PATH])
    coordinates = torch.tensor(found.coordinates, dtype=torch.float64)
    # Up to a rotation and mirroring within the plane: distances of all points from each other.
    path = torch.tensor(PATH, dtype=torch.float64)
    torch.testing.assert_close(torch.cdist(coordinates, coordinates), torch.cdist(path, path), rtol=0, atol=1e-7)
    assert found.coordinates[-1] == (0, 0)
    assert found.captured == pytest.approx(1, abs=1e-12)
    assert sum(found.explained) == pytest.approx(1, abs=1e-12)
    values = torch.linalg.svdvals(path - path.mean(0)).square()
    assert found.explained[0] == pytest.approx((values[0] / values.sum()).item())


def test_path_along_its_own_axes_is_recovered_point_by_point():
    """Coordinates whose columns do not correlate are their own principal components."""
    origin, (first, second) = weights(0), orthonormal()
    path = [(4.0, 1.0), (4.0, -1.0), (3.0, 0.0), (0.0, 0.0)]
    *directions, found = plane_of([at(origin, first, second, a, b) for a, b in path])
    np.testing.assert_allclose(found.coordinates, path, rtol=0, atol=1e-10)
    assert found.offsets == pytest.approx((4.0, 1.0))
    for name in SHAPES:
        torch.testing.assert_close(directions[0][name], first[name], rtol=0, atol=1e-10)
        torch.testing.assert_close(directions[1][name], second[name], rtol=0, atol=1e-10)


def test_components_are_those_of_sklearn_and_coordinates_raw_projections():
    origin = weights(0)
    points = [*(weights(seed) for seed in range(1, 8)), origin]
    *directions, found = plane_of(points)
    matrix = torch.stack([flat(point) - flat(origin) for point in points]).numpy()
    reference = PCA(2, svd_solver='full').fit(matrix)
    coordinates = np.array(found.coordinates).T
    for component, expected, along in zip(directions, reference.components_, coordinates, strict=True):
        sign = np.sign(flat(component).numpy() @ expected)
        np.testing.assert_allclose(sign * flat(component).numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(sign * along, matrix @ expected, atol=1e-11)
    np.testing.assert_allclose(found.explained, reference.explained_variance_ratio_)
    assert found.offsets == pytest.approx(np.abs(matrix @ reference.components_.T).max(0))


def test_signs_do_not_depend_on_the_solver():
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    *_, found = plane_of([*points, origin])
    assert min(found.coordinates[0]) > 0


@pytest.mark.parametrize('normalise', ['none', 'filter'])
def test_projection_is_the_nearest_point(normalise):
    """By a loop: moving away from it in the plane in any direction makes the distance larger."""
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    *directions, found = plane_of([*points, origin], normalise)
    coordinates = torch.tensor(found.coordinates, dtype=torch.float64)
    matrix = torch.stack([flat(direction) for direction in directions], 1)
    rest = total = 0.0
    for point, coordinate in zip(points, coordinates[:-1], strict=True):
        delta = flat(point) - flat(origin)
        torch.testing.assert_close(coordinate, torch.linalg.pinv(matrix) @ delta, rtol=0, atol=1e-9)
        nearest = (delta - matrix @ coordinate).norm()
        for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
            assert (delta - matrix @ (coordinate + torch.tensor(step))).norm() > nearest
        rest += nearest.item() ** 2
        total += delta.norm().item() ** 2
    assert found.captured == pytest.approx(1 - rest / total)
    assert found.offsets == pytest.approx(tuple(max(abs(c[i]) for c in found.coordinates) for i in (0, 1)))


def test_directions_that_are_not_orthogonal():
    first, second = orthonormal()
    slanted = {name: second[name] + 0.9 * first[name] for name in second}
    row = {name: 2.0 * first[name] + 3.0 * slanted[name] for name in first}
    found = project(flat(row)[None], flat(first), flat(slanted))
    torch.testing.assert_close(found, torch.tensor([[2.0, 3.0]], dtype=torch.float64))


def test_filter_normalised_directions_start_from_the_principal_components():
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    plain, scaled = (plane_of([*points, origin], how) for how in ('none', 'filter'))
    assert scaled[2].explained == plain[2].explained
    for name in SHAPES:
        torch.testing.assert_close(scaled[0][name], filter_normalise(plain[0], origin)[name])
    # A length in such a direction is one of the weights.
    assert flat(scaled[1]).norm().item() == pytest.approx(flat(origin).norm().item())


def test_single_precision():
    """Checkpoints hold float32."""
    points = [weights(seed, torch.float32) for seed in (1, 2, 3, 4, 0)]
    first, _, found = plane_of(points)
    *_, expected = plane_of([{name: tensor.double() for name, tensor in point.items()} for point in points])
    assert first['conv'].dtype == torch.float64
    assert found == expected


@pytest.mark.parametrize('count', [0, 1, 2])
def test_too_few_points(count):
    """One checkpoint apart from the last makes a line; and the same one twice does not help."""
    origin = weights(0)
    points = [weights(1) for _ in range(count)]
    with pytest.raises(
        InputError, match=r'do not span a plane; train with --diagnostics\.snapshots 20, or keep more checkpoints'
    ):
        plane_of([*points, origin])
