"""Scores of the revisited Oxford and Paris benchmarks (arXiv 1803.11285)."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

# labels of the images that are right, and of those that are taken out of the ranking
DIFFICULTIES = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
KS = (1, 5, 10)

Scores = TypedDict("Scores", {"mAP": float, "mP@k": dict[int, float], "AP": list[float]})


def rank_images(database: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The database's images by falling similarity to each query; equal ones keep their order.

    Args:
        database: (N, F), L2-normalised.
        queries: (Q, F), L2-normalised.

    Returns:
        (Q, N), numbers of images.
    """
    return np.argsort(-(queries @ database.T), axis=1, kind="stable")


def positions_without_junk(
    ranking: np.ndarray, positives: ArrayLike, junk: ArrayLike
) -> np.ndarray:
    """Places of the positives, from 0, each less the junk before it.

    Args:
        ranking: (N,), numbers of images, the best first.
        positives: numbers of the right images.
        junk: numbers of the images that count neither as right nor as wrong.

    Returns:
        (P,), rising.
    """
    is_junk = np.isin(ranking, junk)
    places = np.arange(len(ranking)) - is_junk.cumsum() + is_junk
    return places[np.isin(ranking, positives)]


def trapezoid_average_precision(positions: np.ndarray, positives: int) -> float:
    """Area under precision over recall, by the trapezoid rule, as in the official evaluation.

    Args:
        positions: (P,), rising places of the positives from 0.
        positives: how many there are to find, at least one.

    Returns:
        from 0 to 1.
    """
    found = np.arange(len(positions))
    # nothing is wrong before the first image
    before = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))
    after = (found + 1) / (positions + 1)
    return float(((before + after) / 2).sum() / positives)


def precision_at(positions: np.ndarray, k: int) -> float:
    """Share of right images among the first ``k``, or up to the last right one if that is sooner.

    Args:
        positions: (P,), rising places of the positives from 0, at least one.
        k: number of images.

    Returns:
        from 0 to 1.
    """
    k = min(int(positions[-1]) + 1, k)
    return float((positions < k).sum() / k)


def score_difficulty(
    rankings: np.ndarray, ground_truth: Sequence[Mapping[str, ArrayLike]], difficulty: str
) -> Scores:
    """Mean average precision and mean precision at each k of ``KS``.

    Queries without positives at this difficulty are left out of the means.

    Args:
        rankings: (Q, N), from ``rank_images``.
        ground_truth: for each query the numbers of its ``easy``, ``hard`` and ``junk`` images.
        difficulty: a key of ``DIFFICULTIES``.

    Returns:
        ``mAP``, ``mP@k`` by k and ``AP`` by query, from 0 to 1; NaN if there is nothing to find.
    """
    right, ignored = DIFFICULTIES[difficulty]
    precisions = np.full(len(ground_truth), np.nan)
    at_k = []
    for number, (ranking, labels) in enumerate(zip(rankings, ground_truth, strict=True)):
        positives = np.concatenate([labels[name] for name in right])
        if not len(positives):
            continue
        junk = np.concatenate([labels[name] for name in ignored])
        positions = positions_without_junk(ranking, positives, junk)
        precisions[number] = trapezoid_average_precision(positions, len(positives))
        at_k.append([precision_at(positions, k) for k in KS])
    scored = precisions[~np.isnan(precisions)]
    means = np.mean(at_k, axis=0) if at_k else np.full(len(KS), np.nan)
    return {
        "mAP": float(scored.mean()) if len(scored) else float("nan"),
        "mP@k": dict(zip(KS, means.tolist(), strict=True)),
        "AP": precisions.tolist(),
    }
