"""Linear classification of frozen features."""

import torch
import torch.nn.functional as F
from torch import nn

from slimclr_hub.errors import InputError


def linear_predict(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, weight_decay: float = 1e-3
) -> torch.Tensor:
    """Classify `queries` by multinomial logistic regression on `bank`; shapes are those of `knn.knn_predict`.

    A quick estimate, not the paper's evaluation protocol (section 4.1): the regression sees no augmented images.

    Raises:
        InputError: As `fit_linear`.
    """
    linear, mean, scale = fit_linear(bank, labels, weight_decay)
    with torch.no_grad():
        return linear((queries - mean) * scale).argmax(1)


def fit_linear(
    bank: torch.Tensor,
    labels: torch.Tensor,
    weight_decay: float = 1e-3,
    iterations: int = 100,
    classes: int = 0,
    floor: float = 0.0,
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Fit a multinomial logistic regression to features [N, D] and classes [N]; there are at least `classes`.

    Features are standardised by the bank's mean and deviation, or `floor` times the mean of all deviations where that
    is more; the regression starts from zero and is fitted to the
    whole bank by at most `iterations` of L-BFGS, so the result is a function of the features alone. The loss is the
    mean cross-entropy plus `weight_decay` times half the squared norm of the weights.

    Returns:
        The regression, and (mean [D], scale [D]): it takes (x - mean) * scale for features x.

    Raises:
        InputError: The bank is empty or a label is negative.
    """
    if not len(bank):
        raise InputError('the linear probe has no labelled images to learn from')
    if labels.min() < 0:
        raise InputError('the linear probe needs a label for every training image; set probe.every to 0 without them')
    mean, std = bank.mean(0), bank.std(0, correction=0)
    std = std.clamp(min=floor * std.mean())
    # A constant feature would be divided by zero; it carries no information.
    scale = torch.where(std > 0, 1 / std, torch.zeros_like(std))
    bank = (bank - mean) * scale
    # Uninitialised: random weights would advance the generator that training draws from.
    linear = nn.utils.skip_init(nn.Linear, bank.shape[1], max(classes, int(labels.max()) + 1), device=bank.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=iterations, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(bank), labels) + weight_decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        bank, labels = bank.clone(), labels.clone()  # tensors of inference mode cannot be part of a graph
        optimizer.step(closure)
    return linear, mean, scale
