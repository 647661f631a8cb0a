"""Metrics against cases worked out by hand and against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.transfer import DIFFICULT
from evaluation.classification_metrics import (
    average_precision,
    mean_average_precision,
    mean_per_class_accuracy,
    top_k_accuracy,
)

SCORES = torch.tensor(
    [
        [0.9, 0.5, 0.1, 0.0],  # class 0 is first
        [0.1, 0.9, 0.5, 0.0],  # class 0 is third
        [0.8, 0.9, 0.1, 0.0],  # class 1 is first
        [0.2, 0.1, 0.0, 0.9],  # class 0 is second
        [0.3, 0.3, 0.3, 0.0],  # class 3 is last
    ]
)
LABELS = torch.tensor([0, 0, 1, 0, 3])


def test_top_k_by_hand():
    assert top_k_accuracy(SCORES, LABELS) == pytest.approx(40)
    assert top_k_accuracy(SCORES, LABELS, 2) == pytest.approx(60)
    assert top_k_accuracy(SCORES, LABELS, 3) == pytest.approx(80)
    assert top_k_accuracy(SCORES, LABELS, 5) == 100


def test_mean_per_class_leaves_an_empty_class_out():
    # class 0: 1 of 3, class 1: 1 of 1, class 2: no image, class 3: 0 of 1
    assert mean_per_class_accuracy(SCORES, LABELS) == pytest.approx(100 * (1 / 3 + 1 + 0) / 3)


def test_equal_scores_name_the_lower_class():
    scores = torch.zeros(4, 4)
    labels = torch.arange(4)
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 4)] == [25, 50, 100]
    assert mean_per_class_accuracy(scores, labels) == 25


def test_average_precision_by_hand():
    # ranked + - + -: precision 1 up to recall 0.5 (six of the points), then 2/3 (five)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    positive = torch.tensor([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    # ranked - - +: precision 1/3 at every recall
    assert average_precision(-scores[:3], positive[[0, 1, 3]]) == pytest.approx(100 / 3)


def test_the_best_precision_at_a_higher_recall_counts_for_the_lower():
    # ranked - + +: recall 0.5 at precision 1/2, recall 1 at 2/3, which is the best of all
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert average_precision(scores, torch.tensor([False, True, True])) == pytest.approx(200 / 3)


def test_a_recall_of_three_tenths_is_reached_by_three_of_ten():
    # three positives, seven negatives, seven positives: in floats 3 * 0.1 > 3 / 10
    positive = torch.tensor([True] * 3 + [False] * 7 + [True] * 7)
    expected = (4 * 1 + 7 * 10 / 17) / 11
    result = average_precision(torch.arange(17, 0, -1.0), positive)
    assert result == pytest.approx(100 * expected)


def test_tied_scores():
    # + first, then a tie of + - -: recall 0.5 at precision 1, recall 1 at 2/4
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0])
    positive = torch.tensor([True, True, False, False])
    assert average_precision(scores, positive) == pytest.approx(100 * (6 + 5 * 0.5) / 11)
    for order in ([1, 2, 3, 0], [3, 1, 0, 2]):
        assert average_precision(scores[order], positive[order]) == pytest.approx(
            100 * (6 + 5 * 0.5) / 11
        )
    assert average_precision(torch.zeros(4), positive) == pytest.approx(50)


def test_difficult_objects_and_classes_without_positives():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.2], [0.7, 0.3, 0.1], [0.6, 0.4, 0.0]])
    targets = torch.tensor([[1, 0, -1], [-1, 0, 0], [0, 0, 0], [1, -1, -1]])
    # class 0 is ranked + (difficult) - +: 1 up to recall 0.5, then 2/3; the others have no +
    expected = 100 * (6 + 5 * 2 / 3) / 11
    assert mean_average_precision(scores, targets) == pytest.approx(expected)
    targets[1, 1] = 1  # ranked (difficult) - + -: 1/2 at every recall
    assert mean_average_precision(scores, targets) == pytest.approx((expected + 50) / 2)


def plain_average_precision(scores, targets):
    """Every threshold, every recall, in exact fractions."""
    kept = [(s, t) for s, t in zip(scores, targets, strict=True) if t != DIFFICULT]
    total = sum(t for _, t in kept)
    points = []
    for threshold in {s for s, _ in kept}:
        named = [t for s, t in kept if s >= threshold]
        points.append((sum(named), len(named)))
    best = []
    for tenth in range(11):
        best.append(max(tp / n for tp, n in points if tp * 10 >= tenth * total))
    return 100 * sum(best) / 11


@settings(deadline=None)  # other work on the machine is no failure
@given(data=st.data())
def test_mean_average_precision_against_plain_loops(data):
    images, classes = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 4))
    levels = data.draw(st.integers(1, 30))  # few levels make many ties
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = rng.integers(0, levels, (images, classes)) / 8
    targets = rng.choice([1, 0, 0, DIFFICULT], (images, classes))
    expected = [
        plain_average_precision(scores[:, c].tolist(), targets[:, c].tolist())
        for c in range(classes)
        if (targets[:, c] == 1).any()
    ]
    if not expected:
        with pytest.raises(ValueError, match="no class"):
            mean_average_precision(torch.tensor(scores), torch.tensor(targets))
        return
    result = mean_average_precision(torch.tensor(scores), torch.tensor(targets))
    assert result == pytest.approx(sum(expected) / len(expected))
    shuffled = rng.permutation(images)
    assert mean_average_precision(
        torch.tensor(scores[shuffled]), torch.tensor(targets[shuffled])
    ) == pytest.approx(result)


@settings(deadline=None)
@given(data=st.data())
def test_accuracies_against_plain_loops(data):
    images, classes = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = rng.integers(0, data.draw(st.integers(1, 20)), (images, classes)).astype(np.float32)
    labels = rng.integers(0, classes, images)
    k = data.draw(st.integers(1, 6))
    hits = {c: [] for c in range(classes)}
    named = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranking = sorted(range(classes), key=lambda c: -row[c])  # stable: lower class first
        named += label in ranking[:k]
        hits[label].append(ranking[0] == label)
    shares = [sum(h) / len(h) for h in hits.values() if h]
    both = torch.tensor(scores), torch.tensor(labels)
    assert top_k_accuracy(*both, k) == pytest.approx(100 * named / images)
    assert mean_per_class_accuracy(*both) == pytest.approx(100 * sum(shares) / len(shares))


@pytest.mark.parametrize(
    "metric", [top_k_accuracy, mean_per_class_accuracy, mean_average_precision]
)
def test_scores_of_nan_are_refused(metric):
    """A comparison with NaN is false, so it would count as right."""
    targets = torch.tensor([[0, 1]]) if metric is mean_average_precision else torch.tensor([0])
    with pytest.raises(ValueError, match="NaN"):
        metric(torch.tensor([[0.0, math.nan]]), targets)
