import math

import numpy as np
import pytest
import torch

from slimclr_hub.analysis.landscape import (
    filter_normalise,
    find_directions,
    offset,
    principal_directions,
    project,
)
from slimclr_hub.errors import InputError

SHAPES = {'conv': (6, 3, 3, 3), 'fc': (5, 6), 'norm': (6,), 'bias': (5,)}
MOVING = ('conv', 'fc')


def weights(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def flat(point) -> torch.Tensor:
    return torch.cat([point[name].double().flatten() for name in MOVING])


def orthonormal() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    basis, _ = torch.linalg.qr(torch.stack([flat(weights(1)), flat(weights(2))], 1))
    found = []
    for column in basis.T:
        parts = column.split([math.prod(SHAPES[name]) for name in MOVING])
        found.append({name: part.reshape(SHAPES[name]) for name, part in zip(MOVING, parts, strict=True)})
    return found[0], found[1]


def at(origin, first, second, a: float, b: float) -> dict[str, torch.Tensor]:
    """A point of the plane; what does not take part is anywhere."""
    moved = {name: origin[name] + a * first[name] + b * second[name] for name in MOVING}
    return {**weights(77), **moved}


PATH = [(10.0, -1.0), (8.0, 2.0), (5.0, 3.0), (2.0, 0.5), (0.0, 0.0)]


def test_filters_have_the_norms_of_the_weights():
    direction, w = weights(1), weights(2)
    scaled = filter_normalise(direction, w)
    assert set(scaled) == set(MOVING)  # biases and normalisation do not move
    for name in MOVING:
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
    found = find_directions([at(origin, first, second, a, b) for a, b in PATH], origin, filter_normalised=False)
    # Up to a rotation and mirroring within the plane: distances of all points from each other.
    path = torch.tensor(PATH, dtype=torch.float64)
    torch.testing.assert_close(
        torch.cdist(found.coordinates, found.coordinates), torch.cdist(path, path), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(found.coordinates[-1], torch.zeros(2, dtype=torch.float64))
    assert found.captured == pytest.approx(1, abs=1e-12)
    assert sum(found.explained) == pytest.approx(1, abs=1e-12)
    values = torch.linalg.svdvals(path).square()
    assert found.explained[0] == pytest.approx((values[0] / values.sum()).item())


def test_path_along_its_own_axes_is_recovered_point_by_point():
    """Coordinates with orthogonal columns are their own principal components."""
    origin, (first, second) = weights(0), orthonormal()
    path = [(4.0, 1.0), (4.0, -1.0), (3.0, 0.0), (0.0, 0.0)]
    found = find_directions([at(origin, first, second, a, b) for a, b in path], origin, filter_normalised=False)
    torch.testing.assert_close(found.coordinates, torch.tensor(path, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.offsets == pytest.approx((4.0, 1.0))
    for name in MOVING:
        torch.testing.assert_close(found.first[name], first[name], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.second[name], second[name], rtol=0, atol=1e-10)


def test_components_are_those_of_sklearn_around_the_origin():
    from sklearn.decomposition import TruncatedSVD  # a PCA that subtracts no mean

    origin = weights(0)
    points = [weights(seed) for seed in range(1, 8)]
    offsets = [offset(point, origin) for point in points]
    (first, second), explained = principal_directions(offsets)
    matrix = torch.stack([flat(each) for each in offsets]).numpy()
    reference = TruncatedSVD(2, algorithm='arpack').fit(matrix)
    for component, expected in zip((first, second), reference.components_, strict=True):
        assert abs(float(flat(component).numpy() @ expected)) == pytest.approx(1, abs=1e-9)
        assert flat(component).norm().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(explained, reference.singular_values_**2 / (matrix**2).sum())


def test_signs_do_not_depend_on_the_solver():
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    coordinates = find_directions([*points, origin], origin, filter_normalised=False).coordinates
    assert (coordinates[0] > 0).all()


@pytest.mark.parametrize('filter_normalised', [False, True])
def test_projection_is_the_nearest_point(filter_normalised):
    """By a loop: moving away from it in the plane in any direction makes the distance larger."""
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    found = find_directions(points, origin, filter_normalised)
    matrix = torch.stack([flat(found.first), flat(found.second)], 1)
    rest = total = 0.0
    for point, coordinate in zip(points, found.coordinates, strict=True):
        delta = flat(point) - flat(origin)
        torch.testing.assert_close(coordinate, torch.linalg.pinv(matrix) @ delta, rtol=0, atol=1e-9)
        nearest = (delta - matrix @ coordinate).norm()
        for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
            assert (delta - matrix @ (coordinate + torch.tensor(step))).norm() > nearest
        rest += nearest.item() ** 2
        total += delta.norm().item() ** 2
    assert found.captured == pytest.approx(1 - rest / total)
    assert found.offsets == pytest.approx(tuple(max(abs(c[i].item()) for c in found.coordinates) for i in (0, 1)))


def test_directions_that_are_not_orthogonal():
    first, second = orthonormal()
    slanted = {name: second[name] + 0.9 * first[name] for name in second}
    row = {name: 2.0 * first[name] + 3.0 * slanted[name] for name in first}
    torch.testing.assert_close(project([row], first, slanted), torch.tensor([[2.0, 3.0]], dtype=torch.float64))


def test_filter_normalised_directions_start_from_the_principal_components():
    origin = weights(0)
    points = [weights(seed) for seed in range(1, 5)]
    plain, scaled = (find_directions(points, origin, how) for how in (False, True))
    assert scaled.explained == plain.explained
    for name in MOVING:
        expected = filter_normalise(plain.first, origin)[name]
        torch.testing.assert_close(scaled.first[name], expected)
    # A length in such a direction is one of the weights.
    assert flat(scaled.second).norm().item() == pytest.approx(flat(origin).norm().item())


def test_single_precision_and_what_does_not_take_part():
    """Checkpoints hold float32; a normalisation that moves far changes nothing."""
    origin, points = weights(0, torch.float32), [weights(seed, torch.float32) for seed in range(1, 5)]
    before = find_directions(points, origin, filter_normalised=False)
    for point in points:
        point['norm'] += 1000
    after = find_directions(points, origin, filter_normalised=False)
    torch.testing.assert_close(before.coordinates, after.coordinates, rtol=0, atol=0)
    assert before.first['conv'].dtype == torch.float64


@pytest.mark.parametrize('count', [0, 1, 2])
def test_too_few_points(count):
    """One checkpoint apart from the last makes a line; and the same one twice does not help."""
    origin = weights(0)
    points = [weights(1) for _ in range(count)]
    with pytest.raises(
        InputError, match=r'do not span a plane; train with --diagnostics\.snapshots 20, or keep more checkpoints'
    ):
        find_directions([*points, origin], origin, filter_normalised=False)
