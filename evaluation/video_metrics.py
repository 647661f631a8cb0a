"""Scores of video object segmentation as in DAVIS 2017 (arXiv 1704.00675)."""

from collections.abc import Sequence

import cv2
import numpy as np

TOLERANCE = 0.008  # distance between matching contours, as a share of the frame's diagonal


def region_similarity(annotation: np.ndarray, prediction: np.ndarray) -> float:
    """J: the intersection over the union of two masks, 1 if both are empty.

    Args:
        annotation, prediction: (H, W) of bool.

    Returns:
        from 0 to 1.

    Source: Perazzi et al., CVPR 2016, section 4.1.
    """
    union = np.count_nonzero(annotation | prediction)
    return np.count_nonzero(annotation & prediction) / union if union else 1.0


def contour_accuracy(annotation: np.ndarray, prediction: np.ndarray) -> float:
    """F: the F-measure of the contour pixels that have a counterpart close by.

    It takes and returns what ``region_similarity`` does.

    Source: Perazzi et al., CVPR 2016, section 4.1, with the tolerance of the official toolkit.
    """
    radius = int(np.ceil(TOLERANCE * np.hypot(*annotation.shape)))
    right, predicted = contour(annotation), contour(prediction)
    if not right.any() or not predicted.any():
        return float(right.any() == predicted.any())
    precision = (predicted & _dilate(right, radius)).sum() / predicted.sum()
    recall = (right & _dilate(predicted, radius)).sum() / right.sum()
    return float(2 * precision * recall / max(precision + recall, np.finfo(float).tiny))


def contour(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask, (H, W) of bool, that differ from the one right, below or diagonal.

    Beyond the edge, the last row and column are repeated.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def statistics(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, recall and decay of one object's J or F over the frames.

    Args:
        values: one for each scored frame, the first and last of the video left out.

    Returns:
        the mean, the share of frames above 0.5, and how much the last quarter lies below the
        first.
    """
    scores = np.asarray(values, dtype=np.float64)
    # the quarters share the frames at their edges; halves round up
    edges = np.floor(np.linspace(0, len(scores) - 1, 5) + 0.5 + 1e-10).astype(int)
    decay = scores[: edges[1] + 1].mean() - scores[edges[3] :].mean()
    return float(scores.mean()), float((scores > 0.5).mean()), float(decay)


def _dilate(contours: np.ndarray, radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = (x**2 + y**2 <= radius**2).astype(np.uint8)
    return cv2.dilate(contours.astype(np.uint8), disc) > 0
