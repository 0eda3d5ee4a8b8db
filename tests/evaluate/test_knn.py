from collections import defaultdict
from math import exp, sqrt

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import default_k, knn_predict


def features(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters of various lengths, so that neighbours disagree and normalisation matters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    points = centres[labels] + 1.5 * torch.randn(count, 16, generator=generator, dtype=torch.float64)
    return points * (0.1 + 5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)), labels


def classify_by_loops(queries, bank, labels, k, temperature) -> list[int]:
    """Wu et al. 2018, section 3.4, one number at a time."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    predictions = []
    for query in queries:
        neighbours = sorted(
            ((cosine(query, other), label) for other, label in zip(bank, labels, strict=True)), reverse=True
        )
        votes: dict[int, float] = defaultdict(float)
        for similarity, label in neighbours[:k]:
            votes[label] += exp(similarity / temperature)
        predictions.append(max(votes, key=lambda label: votes[label]))
    return predictions


def test_equals_sklearn_without_weights():
    (queries, _), (bank, labels) = features(200, 2, 1), features(300, 2, 2)
    # An odd number of votes between two classes has no ties, which either side may break as it likes.
    reference = KNeighborsClassifier(7, metric='cosine').fit(bank.numpy(), labels.numpy())
    ours = knn_predict(queries, bank, labels, k=7, temperature=1e9)
    expected = reference.predict(queries.numpy())
    assert ours.tolist() == expected.tolist()
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize('temperature', [0.05, 0.1, 1.0])
def test_equals_sklearn_with_weights(temperature):
    (queries, _), (bank, labels) = features(200, 6, 1), features(300, 6, 2)
    reference = KNeighborsClassifier(
        20, metric='cosine', weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.numpy(), labels.numpy())
    ours = knn_predict(queries, bank, labels, k=20, temperature=temperature)
    assert ours.tolist() == reference.predict(queries.numpy()).tolist()
    assert len(ours.unique()) == 6


def test_temperature_matters():
    (queries, _), (bank, labels) = features(200, 6, 1), features(300, 6, 2)
    sharp, flat = (knn_predict(queries, bank, labels, k=50, temperature=t) for t in (0.01, 10))
    assert not sharp.equal(flat)
    # At a very low temperature the nearest neighbour decides alone.
    assert knn_predict(queries, bank, labels, k=50, temperature=1e-6).equal(knn_predict(queries, bank, labels, k=1))


def test_equals_a_transcription_in_loops():
    (queries, _), (bank, labels) = features(20, 4, 1), features(40, 4, 2)
    expected = classify_by_loops(queries.tolist(), bank.tolist(), labels.tolist(), 9, 0.1)
    assert knn_predict(queries, bank, labels, k=9, temperature=0.1).tolist() == expected


def test_more_neighbours_than_images():
    (queries, _), (bank, labels) = features(20, 3, 1), features(15, 3, 2)
    assert knn_predict(queries, bank, labels, k=200).equal(knn_predict(queries, bank, labels, k=15))


@pytest.mark.parametrize('chunk', [1, 7, 100, 1000])
def test_chunks_change_nothing(chunk):
    (queries, _), (bank, labels) = features(100, 5, 1), features(150, 5, 2)
    assert knn_predict(queries, bank, labels, k=20, chunk=chunk).equal(knn_predict(queries, bank, labels, k=20))


@pytest.mark.parametrize('temperature', [1e-3, 1e-6, 1e-30])
def test_small_temperature_does_not_overflow(temperature):
    (queries, _), (bank, labels) = features(100, 5, 1), features(150, 5, 2)
    ours = knn_predict(queries.float(), bank.float(), labels, k=20, temperature=temperature)
    nearest = (torch.nn.functional.normalize(queries.float()) @ torch.nn.functional.normalize(bank.float()).T).argmax(1)
    # exp(1 / temperature) is infinite in float32, and infinities of several classes would all look alike.
    assert ours.equal(labels[nearest])


def test_length_of_features_does_not_matter():
    (queries, _), (bank, labels) = features(50, 5, 1), features(150, 5, 2)
    scaled = knn_predict(1000 * queries, bank / 1000, labels, k=20)
    assert scaled.equal(knn_predict(queries, bank, labels, k=20))


def test_a_single_class_and_classes_without_images():
    queries, _ = features(10, 2)
    assert knn_predict(queries, queries, torch.zeros(10, dtype=torch.long), k=3).tolist() == [0] * 10
    labels = torch.tensor([0, 7] * 5)
    assert knn_predict(queries, queries, labels, k=1).equal(labels)


def test_images_without_labels():
    queries, labels = features(10, 2)
    labels[3] = -1
    with pytest.raises(InputError, match=r'label.*knn\.every'):
        knn_predict(queries, queries, labels)


def test_empty_bank():
    queries, _ = features(10, 2)
    with pytest.raises(InputError, match='no labelled images'):
        knn_predict(queries, queries[:0], torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize(
    ('images', 'classes', 'k'),
    [(1600, 10, 16), (162, 8, 5), (10, 40, 5), (6000, 10, 60), (1_281_167, 1000, 128), (50_000, 10, 200)],
)
def test_k_follows_the_images_of_a_class(images, classes, k):
    assert default_k(images, classes) == k
