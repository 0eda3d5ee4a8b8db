"""Weighted k-nearest-neighbour classification on frozen features."""

import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError


def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> torch.Tensor:
    """Classes of `queries` by a vote of their k nearest neighbours in `bank`, by cosine similarity.

    A neighbour of similarity s votes with weight exp(s / temperature). Wu et al. 2018, Unsupervised Feature Learning
    via Non-Parametric Instance Discrimination, section 3.4, https://arxiv.org/abs/1805.01978.

    Args:
        queries: Features [Q, D], of any length.
        bank: Features of labelled images [N, D].
        labels: Their classes, integers [N] from 0.
        k: Neighbours; all N where those are fewer.
        temperature: tau.
        chunk: Queries at a time, which bounds the memory by chunk x N.

    Returns:
        Predicted classes [Q].

    Raises:
        InputError: The bank is empty or a label is negative.
    """
    if not len(bank):
        raise InputError('k-NN has no labelled images to search')
    if labels.min() < 0:
        raise InputError('k-NN needs a label for every image of the training split; set knn.every to 0 without them')
    bank = F.normalize(bank, dim=1)
    classes = int(labels.max()) + 1
    predictions = []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, neighbour = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        # The largest similarity is subtracted so that a small temperature does not overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=part.device, dtype=weight.dtype)
        predictions.append(votes.scatter_add_(1, labels[neighbour], weight).argmax(1))
    return torch.cat(predictions)
