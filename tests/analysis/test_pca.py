import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from slimclr_hub.analysis.pca import principal_components
from slimclr_hub.errors import InputError


@pytest.fixture
def rows():
    """[9, 40], with variance of its own along each direction, and far from zero."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    return random * torch.linspace(3, 0.1, 40) + 5


def test_agrees_with_scikit_learn(rows):
    """On rows far from zero; projections are those of the rows themselves, scikit-learn's those of rows - mean."""
    found = principal_components(rows, 4)
    expected = PCA(4, svd_solver='full').fit(rows.numpy())
    signs = np.sign((found.directions.numpy() * expected.components_).sum(1))
    np.testing.assert_allclose(found.directions.numpy() * signs[:, None], expected.components_, atol=1e-12)
    projections = found.projections.numpy() * signs
    np.testing.assert_allclose(projections, rows.numpy() @ expected.components_.T, atol=1e-11)
    np.testing.assert_allclose(projections - projections.mean(0), expected.transform(rows.numpy()), atol=1e-11)
    np.testing.assert_allclose(found.projections.var(0).numpy(), expected.explained_variance_, rtol=1e-11)
    np.testing.assert_allclose(found.ratios.numpy(), expected.explained_variance_ratio_, rtol=1e-11)


def test_directions_are_orthonormal_and_their_signs_fixed(rows):
    found = principal_components(rows, 5)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(5, dtype=torch.float64))
    flipped = principal_components(-rows, 5)
    torch.testing.assert_close(flipped.directions, found.directions)
    torch.testing.assert_close(flipped.projections, -found.projections)


def test_rows_on_a_line_have_one_direction():
    """Closed form: points t * (3, 4, 0) / 5."""
    positions = torch.tensor([-1.0, 0.0, 7.0], dtype=torch.float64)
    found = principal_components(positions[:, None] * torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64))
    expected = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found.directions, expected)
    torch.testing.assert_close(found.projections[:, 0], positions)
    torch.testing.assert_close(found.ratios, torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize('value', [0.0, 0.1])
def test_rows_that_do_not_vary_have_no_direction(value):
    found = principal_components(torch.full((3, 5), value))
    assert not found.directions.any()
    assert not found.ratios.any()


@pytest.mark.parametrize(('shape', 'count'), [((1, 5), 1), ((3, 5), 4), ((5, 2), 3), ((3, 5), 0)])
def test_too_few_rows(shape, count):
    with pytest.raises(InputError, match=f'{count} principal components of {shape[0]} rows of {shape[1]}'):
        principal_components(torch.zeros(shape), count)
