"""Metrics of classification: top-k accuracy, mean per class, 11-point mean average precision."""

import torch

from data.transfer import DIFFICULT, MAP, MEAN_PER_CLASS, TOP1


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Share of images whose class is among the ``k`` with the highest scores.

    Among equal scores the lower class number comes first, on every device.

    Args:
        scores: (N, C), without NaN.
        labels: (N,), class numbers.
        k: how many classes count; if ``k`` exceeds C, all do.

    Returns:
        per cent.

    Raises:
        ValueError: NaN.
    """
    return 100 * (_ranks(scores, labels) < k).double().mean().item()


def mean_per_class_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy of each class, averaged; a class without images is left out.

    Args, returns and errors as for ``top_k_accuracy``.
    """
    right = (_ranks(scores, labels) == 0).double()
    images = torch.bincount(labels, minlength=scores.shape[1])
    hits = torch.bincount(labels, right, minlength=scores.shape[1])
    present = images > 0
    return 100 * (hits[present] / images[present]).mean().item()


def mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """The 11-point average precision of each class, averaged; one without positives is left out.

    The metric of PASCAL VOC 2007 (Everingham et al. 2010), used for transfer by
    Kornblith et al. 2019. An image counts for a class unless its objects of that class are all
    marked "difficult".

    Args:
        scores: (N, C), without NaN.
        targets: (N, C), 1 for a positive, 0 for a negative, ``DIFFICULT`` for one left out.

    Returns:
        per cent.

    Raises:
        ValueError: NaN, or no class with positives.
    """
    precisions = []
    for column, target in zip(scores.unbind(1), targets.unbind(1), strict=True):
        counted = target != DIFFICULT
        if (target == 1).any():
            precisions.append(average_precision(column[counted], target[counted] == 1))
    if not precisions:
        raise ValueError("no class has a positive image")
    return sum(precisions) / len(precisions)


def average_precision(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The 11-point average precision: mean over recalls 0, 0.1, ..., 1 of the best precision.

    The best is over all thresholds that reach the recall. Equal scores lie on one side of every
    threshold, so the order of the images does not matter. If all scores are equal, the result is
    the share of positives. Integer arithmetic decides whether a recall is reached.

    Args:
        scores: (N,), without NaN.
        positive: (N,) of bool, at least one true.

    Returns:
        per cent.

    Raises:
        ValueError: NaN.
    """
    total = int(positive.sum())
    _refuse_nan(scores)
    ordered, order = scores.sort(descending=True)
    last_of_equal = torch.ones_like(ordered, dtype=torch.bool)
    last_of_equal[:-1] = ordered[:-1] != ordered[1:]
    found = positive[order].long().cumsum(0)[last_of_equal]
    named = torch.nonzero(last_of_equal).flatten() + 1
    precision = found.double() / named
    best = [precision[10 * found >= tenth * total].max() for tenth in range(11)]
    return 100 * torch.stack(best).mean().item()


METRICS = {
    TOP1: top_k_accuracy,
    MEAN_PER_CLASS: mean_per_class_accuracy,
    MAP: mean_average_precision,
}


def _ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the right one, (N,)."""
    _refuse_nan(scores)
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def _refuse_nan(scores: torch.Tensor) -> None:
    # every comparison with NaN is false, so NaN would count as right
    if scores.isnan().any():
        raise ValueError("scores hold NaN")
