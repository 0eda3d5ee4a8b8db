"""The condition under which one slimmable linear layer serves two widths equally well: the paper's Appendix A.

X [N, d] are features of the full width, X1 [N, d1] those of a narrower one, T [N, C] one-hot labels. X11 and X12 are
the first d1 columns of X and the others. A linear layer of its own for each width solves theta = argmin |X theta - T|
(8) and R = (X1^T X1)^-1 X1^T T (10). If the narrower width is to use the first d1 rows of theta instead, they have to
be the same, which is Eq. (23):

    L = B11 (X11^T - X11^T X12 (X12^T X12)^-1 X12^T) T = R,    B11 = (X11^T X11 - X11^T X12 (X12^T X12)^-1 X12^T X11)^-1

L is by construction nothing other than those rows of theta, so that two least-squares problems tell both sides, by a QR
decomposition of the features rather than by inverses of their Gram matrices, which square the condition number.

Remark on the numbers of the paper. It names X of 2048 x 1024 and X1 of 2048 x 512, and for ImageNet's 1000 classes a
mean of 1.07 and a total of 1,096,665.50, which makes 1.02 million entries of |L - R|; 0.88 and 903,094.19 make as many.
512 x 1000 entries would be half of them, 1024 x 1000 fit both: X1 is of 2048 x 1024, which is what width 0.5 of a
ResNet-50 has, and X of 2048 x 2048. With as many images as features the full width reproduces T exactly, and theta is
as large as X is badly conditioned; how far L is from R then depends much on the number of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slimclr_hub.errors import InputError


@dataclass(frozen=True)
class Condition:
    """Both sides of Eq. (23) for one narrower width, and what it costs to take the one for the other.

    Args:
        features: d and d1.
        images: N.
        left: Mean of |L|.
        right: Mean of |R|.
        mean: Mean of |L - R|; the paper has 1.07 and 0.88.
        total: Sum of |L - R|; the paper has 1,096,665.50 and 903,094.19.
        relative: |L - R| / |R| in the Frobenius norm; 0 where the condition holds.
        condition_number: Largest singular value of X over the smallest.
        own: Accuracy in percent of X1 R on these images: a linear layer of the width's own.
        shared: Accuracy in percent of X1 L: the first rows of the full width's layer.
        full: Accuracy in percent of X theta, the full width.
    """

    features: tuple[int, int]
    images: int
    left: float
    right: float
    mean: float
    total: float
    relative: float
    condition_number: float
    own: float
    shared: float
    full: float


def sides(X: torch.Tensor, X1: torch.Tensor, T: torch.Tensor, ridge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R of Eq. (23), float64 [d1, C] each.

    Args:
        X: Features of the full width [N, d].
        X1: Features of the narrower width [N, d1], as it computes them: not columns of X.
        T: Targets [N, C].
        ridge: Share of the mean squared length of a column that is added to the diagonals of X^T X and X1^T X1; with 0
            the columns of both have to be independent, as the paper assumes.

    Raises:
        InputError: They are not, or the shapes do not fit.
    """
    if not (len(X) == len(X1) == len(T)) or X1.shape[1] > X.shape[1]:
        raise InputError(
            f'features of shapes {tuple(X.shape)} and {tuple(X1.shape)} and targets {tuple(T.shape)} do not belong '
            'together; give those of the same images, and the narrower width second'
        )
    return least_squares(X, T, ridge)[: X1.shape[1]], least_squares(X1, T, ridge)


def least_squares(X: torch.Tensor, T: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """argmin over theta of |X theta - T|^2 + ridge |X|^2 / d |theta|^2, Eq. (8) where `ridge` is 0: float64 [d, C].

    Raises:
        InputError: Without a ridge the columns of X [N, d] are not independent.
    """
    if ridge == 0:
        check_rank(X)
    X, T = X.double(), T.double()
    if ridge > 0:
        d = X.shape[1]
        lambda_ = ridge * X.square().sum() / d
        X = torch.cat([X, lambda_.sqrt() * torch.eye(d, dtype=X.dtype, device=X.device)])
        T = torch.cat([T, T.new_zeros(d, T.shape[1])])
    return torch.linalg.lstsq(X, T, driver='gels').solution


def check_rank(X: torch.Tensor) -> None:
    """Raise an InputError, with the rank, unless the columns of X [N, d] are independent.

    Columns that differ only by the rounding of the precision that X came in are not.
    """
    values = singular_values(X)
    # Rounding of each entry adds a matrix whose norm is about this share of the largest singular value.
    rank = int((values > values.max() * torch.finfo(X.dtype).eps * max(X.shape) ** 0.5).sum())
    if rank == X.shape[1] and len(X) >= X.shape[1]:
        return
    dead = int((X == 0).all(0).sum())
    raise InputError(
        f'{X.shape[1]} features of {len(X)} images have rank {rank}'
        + (f' ({dead} are zero for every image)' if dead else '')
        + ', and Eq. (23) needs independent ones; take more images, or a ridge such as --ridge 1e-6'
    )


def singular_values(X: torch.Tensor) -> torch.Tensor:
    """Singular values of X, float64, in descending order."""
    return torch.linalg.svdvals(X.double())


def linear_condition(X: torch.Tensor, X1: torch.Tensor, labels: torch.Tensor, ridge: float = 0.0) -> Condition:
    """Measure how far Eq. (23) is from holding.

    Args:
        X: Features of the full width [N, d].
        X1: Features of the narrower width [N, d1].
        labels: Classes [N] from 0.
        ridge: As in `sides`.

    Raises:
        InputError: As in `sides`, or a label is negative.
    """
    if labels.min() < 0:
        raise InputError('the condition needs a label for every image; give data.label_key, or other images')
    X, X1, labels = X.cpu(), X1.cpu(), labels.cpu()
    T = torch.nn.functional.one_hot(labels).double()
    L, R = sides(X, X1, T, ridge)
    theta = least_squares(X, T, ridge)
    difference = (L - R).abs()
    values = singular_values(X)
    return Condition(
        features=(X.shape[1], X1.shape[1]),
        images=len(X),
        left=L.abs().mean().item(),
        right=R.abs().mean().item(),
        mean=difference.mean().item(),
        total=difference.sum().item(),
        relative=((L - R).norm() / R.norm()).item(),
        condition_number=(values[0] / values[-1]).item(),
        own=_accuracy(X1, R, labels),
        shared=_accuracy(X1, L, labels),
        full=_accuracy(X, theta, labels),
    )


def _accuracy(X: torch.Tensor, theta: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * ((X.double() @ theta).argmax(1) == labels).double().mean().item()


def narrower(widths: Sequence[float], asked: Sequence[float] | None) -> list[float]:
    """The widths to compare with the full one: those asked for, else all below it.

    Raises:
        InputError: One of them is not a narrower width of the network, or there is none.
    """
    below = [width for width in widths if width < widths[0]]
    if not below:
        raise InputError(f'the network has width {widths[0]:g} alone; the condition compares it with a narrower one')
    if unknown := [width for width in asked or () if width not in below]:
        raise InputError(
            f'width {unknown[0]:g} is not one of {", ".join(f"{w:g}" for w in below)}, the narrower widths'
        )
    return sorted(asked, reverse=True) if asked else below
