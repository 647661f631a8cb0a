"""Video scores against the official toolkit, and the cases its figures hide."""

import numpy as np
import pytest
from helpers import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evaluation.video_metrics import (
    _dilate,
    contour,
    contour_accuracy,
    region_similarity,
    statistics,
)

MASKS = npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, max_side=12))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("name, metric", [("J", region_similarity), ("F", contour_accuracy)])
def test_the_official_figures(number, name, metric):
    arrays = reference("davis.npz")
    expected = reference("davis.json")["per_object"][str(number)][f"{name}_mean_recall_decay"]
    values = [
        metric(annotation == number, prediction == number)
        for annotation, prediction in zip(arrays["annotations"], arrays["predictions"], strict=True)
    ]
    assert statistics(values[1:-1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", [region_similarity, contour_accuracy])
def test_empty_masks(metric):
    empty, square = np.zeros((2, 20, 30), dtype=bool)
    square[5:9, 5:9] = True
    assert metric(empty, empty) == 1.0
    assert metric(square, square) == 1.0
    assert metric(square, empty) == 0.0
    assert metric(empty, square) == 0.0


def test_a_mask_of_the_whole_frame_has_no_contour():
    whole, part = np.ones((2, 20, 30), dtype=bool)
    part[5:9, 5:9] = False
    assert contour_accuracy(whole, whole) == 1.0
    assert contour_accuracy(part, whole) == 0.0


def test_region_similarity_by_hand():
    a, b = np.zeros((2, 4, 4), dtype=bool)
    a[:2], b[1:3] = True, True
    assert region_similarity(a, b) == pytest.approx(1 / 3)


@pytest.mark.parametrize("shift, expected", [(1, 1.0), (2, 0.5)])
def test_contours_match_within_the_tolerance(shift, expected):
    # 0.008 of the diagonal of 60 x 80 pixels, rounded up, is one pixel
    a, b = np.zeros((2, 60, 80), dtype=bool)
    a[:, :40], b[:, : 40 + shift] = True, True
    if shift == 2:
        a[30:] = b[30:]
    assert contour_accuracy(a, b) == pytest.approx(expected, abs=0.04)


@given(mask=MASKS)
def test_contour_pixel_by_pixel(mask):
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            others = mask[y, right], mask[below, x], mask[below, right]
            assert contour(mask)[y, x] == any(other != mask[y, x] for other in others)


@given(a=MASKS, data=st.data())
def test_scores_are_symmetric_and_between_0_and_1(a, data):
    b = data.draw(npst.arrays(bool, a.shape))
    for metric in (region_similarity, contour_accuracy):
        assert 0 <= metric(a, b) <= 1
        assert metric(a, b) == pytest.approx(metric(b, a))


def test_statistics():
    # nine frames: the first quarter holds frames 0, 1, 2 and the last 6, 7, 8
    values = [0.9, 0.9, 0.6, 0.5, 0.5, 0.5, 0.3, 0.2, 0.1]
    assert statistics(values) == pytest.approx((0.5, 3 / 9, 0.8 - 0.2))
    assert statistics([0.7]) == (0.7, 1.0, 0.0)
    # a quarter's edge between two frames goes to the later: 3 frames, edges 0, 1, 1, 2, 2
    assert statistics([1.0, 0.5, 0.0])[2] == pytest.approx(0.75)
    # more frames than a byte counts
    assert statistics([1.0] * 200 + [0.0] * 200)[2] == 1.0


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5])
def test_contours_grow_by_a_disc(radius):
    point = np.zeros((13, 13), dtype=bool)
    point[6, 6] = True
    y, x = np.mgrid[:13, :13] - 6
    assert np.array_equal(_dilate(point, radius), np.hypot(x, y) <= radius)
