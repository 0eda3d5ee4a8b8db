import math

import numpy as np
import pytest
import torch

from slimclr_hub.evaluate import rank
from slimclr_hub.evaluate.rank import effective_rank, gram_matrix, rank_of_gram, rank_rows


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(values: list[float], rows: int = 50) -> torch.Tensor:
    size = len(values)
    return orthonormal(rows, size) * torch.tensor(values, dtype=torch.float64) @ orthonormal(size, size, 1).T


def transcription(features: np.ndarray) -> float:
    """Equation 1 as the paper writes it, over the singular values of the matrix itself."""
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    norm = 0.0
    for value in singular:
        norm += abs(value)
    entropy = 0.0
    for value in singular:
        p = value / norm + 1e-7
        entropy -= p * math.log(p)
    return math.exp(entropy)


@pytest.mark.parametrize('size', [1, 3, 16])
def test_orthonormal_features_have_full_rank(size):
    assert effective_rank(orthonormal(40, size)) == pytest.approx(size, rel=1e-5)


def test_multiples_of_one_feature_have_rank_one():
    assert effective_rank(torch.randn(30, 1) @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-4)


def test_known_spectrum():
    """Shares 1/2, 1/4, 1/4 have an entropy of 3/2 ln 2."""
    assert effective_rank(with_spectrum([2.0, 1.0, 1.0])) == pytest.approx(2**1.5, rel=1e-5)


@pytest.mark.parametrize('shape', [(60, 20), (20, 60)], ids=['more images', 'more features'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_as_the_paper_writes_it(shape, dtype):
    """Rectified, so not centred, as features are; of fewer images than features there are as many singular values."""
    features = torch.randn(shape, generator=torch.Generator().manual_seed(3)).relu().to(dtype)
    assert effective_rank(features) == pytest.approx(transcription(features.double().numpy()), rel=1e-6)


def test_steep_spectrum():
    """Singular values over seven orders of magnitude survive the Gram matrix, which holds their squares."""
    features = with_spectrum([10.0**-i for i in range(8)])
    assert effective_rank(features) == pytest.approx(transcription(features.numpy()), rel=1e-5)


@pytest.mark.parametrize('factor', [1e-12, 1e12])
def test_scale_does_not_matter(factor):
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).relu()
    assert effective_rank(features * factor) == pytest.approx(effective_rank(features), rel=1e-9)


def test_features_of_a_dead_network():
    assert effective_rank(torch.zeros(10, 4)) == 0
    assert math.isnan(effective_rank(torch.full((10, 4), float('inf'))))


def test_many_images_are_thinned_evenly(monkeypatch):
    assert rank_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert rank_rows(100_000).tolist() == [i * 100_000 // 25_600 for i in range(25_600)]
    features = torch.randn(100, 5, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(rank, 'RANK_IMAGES', 30)
    kept = features[[i * 100 // 30 for i in range(30)]]
    assert effective_rank(features) == pytest.approx(transcription(kept.numpy()), rel=1e-9)


def test_parts_add_up(monkeypatch):
    """As processes and chunks do."""
    monkeypatch.setattr(rank, '_CHUNK', 7)
    features = torch.randn(50, 5, generator=torch.Generator().manual_seed(4)).relu()
    gram = gram_matrix(features[:23]) + gram_matrix(features[23:])
    assert gram.allclose(features.double().T @ features.double(), rtol=1e-12)
    assert rank_of_gram(gram, 50) == pytest.approx(transcription(features.numpy()), rel=1e-9)
