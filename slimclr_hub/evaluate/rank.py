"""Effective rank of features, a measure of their quality that needs no labels.

Garrido et al. 2023, RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their
Rank, https://arxiv.org/abs/2210.02885. Shapes: N images, D features.
"""

import torch

RANK_IMAGES = 25_600
"""Images that the paper estimates the rank from; more change it little."""

_EPSILON = 1e-7  # the paper's
_CHUNK = 4096  # images at a time


def rank_rows(images: int) -> torch.Tensor:
    """Indices of the images that the rank of so many is estimated from: all up to `RANK_IMAGES`, else evenly spaced."""
    taken = min(images, RANK_IMAGES)
    return torch.arange(taken) * images // max(taken, 1)


def gram_matrix(features: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Z^T Z of features Z [N, D], as float64 [D, D] on `device`, by default theirs; a chunk at a time is in float64."""
    device = device or features.device
    if device.type == 'mps':  # it has no float64
        device = torch.device('cpu')
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=device)
    for part in features.split(_CHUNK):
        part = part.to(device).double()
        gram.addmm_(part.T, part)
    return gram


def rank_of_gram(gram: torch.Tensor, images: int) -> float:
    """`effective_rank` of the features of so many images, from their `gram_matrix`."""
    if not gram.isfinite().all():
        return float('nan')
    # Singular values of Z, of which there are min(N, D): the roots of the largest eigenvalues of Z^T Z.
    eigenvalues = torch.linalg.eigvalsh(gram)[-min(images, len(gram)) :]
    values = eigenvalues.clamp(min=0).sqrt()
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum() + _EPSILON
    return (-(shares * shares.log()).sum()).exp().item()


def effective_rank(features: torch.Tensor) -> float:
    """RankMe (Eq. 1): exp of the entropy of the singular values, each as a share of their sum, plus 1e-7.

    Features [N, D], N > 0, are taken as they are, not centred or normalised, in float64, and of at most `RANK_IMAGES`
    images. Squares of singular values pass through the Gram matrix, so that those below 1e-8 of the largest are lost,
    which the 1e-7 hides.

    Returns:
        A number from 1, where all features are multiples of one, to min(N, D); 0 where all are zero, nan where one is
        not finite.
    """
    rows = rank_rows(len(features))
    if len(rows) < len(features):
        features = features[rows.to(features.device)]
    return rank_of_gram(gram_matrix(features), len(features))
