"""Retrieval scores against the official evaluation, and the cases its figures hide."""

import numpy as np
import pytest
from helpers import reference
from hypothesis import given
from hypothesis import strategies as st

from evaluation.retrieval_metrics import (
    DIFFICULTIES,
    positions_without_junk,
    precision_at,
    rank_images,
    score_difficulty,
    trapezoid_average_precision,
)


@pytest.fixture(scope="module")
def rankings():
    arrays = reference("retrieval.npz")
    return rank_images(arrays["database_features"], arrays["query_features"])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_official_figures(rankings, difficulty):
    truth = reference("retrieval.json")
    expected = truth["expected"][difficulty]
    scores = score_difficulty(rankings, truth["gnd"], difficulty)
    assert scores["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
    assert list(scores["mP@k"]) == [1, 5, 10]
    assert list(scores["mP@k"].values()) == pytest.approx(expected["mP@1,5,10"], abs=1e-9)
    precisions = [np.nan if ap is None else ap for ap in expected["AP"]]
    np.testing.assert_allclose(scores["AP"], precisions, atol=1e-9)


def test_the_reference_has_queries_without_positives_hard_ones_and_junk():
    truth = reference("retrieval.json")["gnd"]
    assert any(not query["easy"] and not query["hard"] for query in truth)
    assert any(query["easy"] and not query["hard"] for query in truth)
    assert any(query["hard"] and not query["easy"] for query in truth)
    assert any((query["easy"] or query["hard"]) and not query["junk"] for query in truth)


def test_trapezoids_not_rectangles():
    # right, wrong, right: (1 + 1) / 2 and (1/2 + 2/3) / 2, each for half of the recall
    assert trapezoid_average_precision(np.array([0, 2]), 2) == pytest.approx(0.5 + 7 / 24)
    # of two to find, one is not in the ranking
    assert trapezoid_average_precision(np.array([0]), 2) == 0.5
    # a first image that is wrong: precision starts at 0
    assert trapezoid_average_precision(np.array([1]), 1) == 0.25


def test_precision_stops_at_the_last_right_image():
    positions = np.array([0, 2])
    assert precision_at(positions, 1) == 1.0
    assert precision_at(positions, 2) == 0.5
    assert precision_at(positions, 10) == pytest.approx(2 / 3)


@given(data=st.data(), size=st.integers(1, 20))
def test_junk_leaves_the_ranking(data, size):
    ranking = np.array(data.draw(st.permutations(range(size))))
    labels = data.draw(st.lists(st.sampled_from("prj"), min_size=size, max_size=size))
    positives = [i for i in range(size) if labels[i] == "p"]
    junk = [i for i in range(size) if labels[i] == "j"]
    kept = [i for i in ranking if labels[i] != "j"]
    expected = [place for place, i in enumerate(kept) if labels[i] == "p"]
    assert positions_without_junk(ranking, positives, junk).tolist() == expected


def test_a_positive_that_is_also_junk_stays():
    # as in the official evaluation, which counts the junk before a positive
    assert positions_without_junk(np.array([3, 1, 2, 0]), [1, 2], [3, 1]).tolist() == [0, 0]


def test_equal_similarities_keep_the_order_of_the_database():
    database = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert rank_images(database, np.array([[1.0, 0.0]])).tolist() == [[1, 3, 0, 2]]


def test_nothing_to_find_at_all():
    truth = [{"easy": [0], "hard": [], "junk": []}]
    scores = score_difficulty(np.array([[0, 1]]), truth, "hard")
    assert np.isnan([scores["mAP"], *scores["mP@k"].values(), *scores["AP"]]).all()
    assert score_difficulty(np.array([[0, 1]]), truth, "medium")["mAP"] == 1.0
