"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, section 3.4,
https://arxiv.org/abs/1805.01978.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from slimclr_hub.errors import InputError

_BANK_CHUNK = 65_536  # labelled images at a time


def default_k(images: int, classes: int) -> int:
    """Default k: a tenth of the labelled images of a class, from 5 to 200; with many more, frequent classes win."""
    return min(max(round(images / classes / 10), 5), 200)


class Neighbours(NamedTuple):
    """The nearest labelled images of queries: cosine similarities, the largest first, and integer classes, [Q, K]."""

    similarity: torch.Tensor
    labels: torch.Tensor


def nearest(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, bank_chunk: int = _BANK_CHUNK
) -> Neighbours:
    """Find the `k` nearest neighbours of each query by cosine similarity, or all N where those are fewer.

    Features, [Q, D] and [N, D], are of length 1; labels are integers [N]. Taking `bank_chunk` labelled images at a time
    bounds the memory by Q x `bank_chunk`.
    """
    found = Neighbours(queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0))
    for part, classes in zip(bank.split(bank_chunk), labels.split(bank_chunk), strict=True):
        similarity, index = (queries @ part.T).topk(min(k, len(part)), dim=1)
        found = merge([found, Neighbours(similarity, classes[index])], k)
    return found


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Merge the neighbours that several searches found for the same queries, and keep the `k` nearest."""
    similarity, labels = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return Neighbours(similarity, labels.gather(1, index))


def vote(
    neighbours: Neighbours, ks: Sequence[int], temperature: float | None, classes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Count votes for each class by the k nearest of `neighbours`, for each of several k in ascending order.

    A neighbour of similarity s votes with weight exp(s / temperature), here divided by that of the nearest one so that
    a small temperature does not overflow. `temperature=None` is the limit of a large one: all votes count the same.

    Yields:
        k and the votes [Q, classes], which the next step adds to.
    """
    similarity, labels = neighbours
    if temperature is None:
        weight = torch.ones_like(similarity)
    else:
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(similarity), classes, device=weight.device, dtype=weight.dtype)
    for start, stop in pairwise([0, *sorted(ks)]):
        votes.scatter_add_(1, labels[:, start:stop], weight[:, start:stop])
        yield stop, votes


def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    k: int = 200,
    temperature: float | None = 0.1,
    chunk: int = 1024,
) -> torch.Tensor:
    """Classify `queries` by a vote of their k nearest neighbours in `bank`, by cosine similarity.

    Args:
        queries: Features [Q, D], of any length.
        bank: Features of labelled images [N, D].
        labels: Their classes, integers [N] from 0.
        k: Neighbours; all N where those are fewer.
        temperature: tau, as in `vote`.
        chunk: Queries at a time, which bounds the memory.

    Returns:
        Predicted classes [Q]; of classes with equal votes the first.

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
        ((_, votes),) = vote(nearest(part, bank, labels, k), [k], temperature, classes)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)
