"""Weighted k-NN against the published one and against its definition."""

import pytest
import torch
import torch.nn.functional as F
from helpers import reference

from evaluation.knn import knn_classify


@pytest.fixture(scope="module")
def published():
    arrays = reference("knn.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def percent(ranked, labels):
    hits = ranked == labels[:, None]
    return [100 * hits[:, :1].sum().item() / len(labels), 100 * hits.sum().item() / len(labels)]


@pytest.mark.parametrize("chunk", [None, 1, 7, 230])
def test_figures_are_exactly_the_published_ones(published, chunk):
    expected = reference("knn.json")
    figures = expected["top1_top5_percent_by_k"]
    ranked = knn_classify(
        published["train_features"],
        published["train_labels"],
        published["test_features"],
        sorted(map(int, figures)),
        expected["temperature"],
        expected["num_classes"],
        chunk,
    )
    for k, figure in figures.items():
        assert percent(ranked[int(k)], published["test_labels"]) == figure, k


def test_votes_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    train, test = (F.normalize(torch.randn(n, 8, generator=generator)) for n in (40, 15))
    labels = torch.randint(0, 6, (40,), generator=generator)
    ranked = knn_classify(train, labels, test, [1, 4, 40], 0.1, 6)
    for k, classes in ranked.items():
        assert classes.shape == (15, min(5, k))
        for query, found in zip(test, classes, strict=True):
            near = (train @ query).topk(k).indices
            votes = [
                sum(torch.exp(train[i] @ query / 0.1).item() for i in near if labels[i] == c)
                for c in range(6)
            ]
            order = sorted(range(6), key=lambda c: -votes[c])
            assert found.tolist() == order[: min(5, k)]


def test_equal_votes_rank_by_class():
    train = torch.eye(4)
    ranked = knn_classify(train, torch.tensor([3, 2, 1, 0]), torch.ones(1, 4) / 2, [4], 1.0, 5)
    assert ranked[4].tolist() == [[0, 1, 2, 3]]


def test_a_small_temperature_does_not_overflow():
    train = F.normalize(torch.randn(20, 4))
    labels = torch.arange(20) % 2
    found = knn_classify(train, labels, train, [20], 0.001, 2)[20]
    assert found[:, 0].equal(labels)
