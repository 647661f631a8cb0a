"""Features that nothing has learned."""

import numpy as np
import torch

from data.loader import normalize
from evaluation.baselines import BINS, SIDE, ColourHistogram, RawPixels


def test_histogram_is_numpy_s():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 20, 30), np.uint8)
    features = ColourHistogram()(normalize(torch.from_numpy(images)))
    for image, feature in zip(images, features, strict=True):
        pixels = image.reshape(3, -1).T
        counts, _ = np.histogramdd(pixels, bins=BINS, range=[(0, 256)] * 3)
        expected = torch.from_numpy((counts / len(pixels)).ravel() ** 0.5).float()
        torch.testing.assert_close(feature, expected)


def test_histogram_does_not_see_the_place_of_a_colour():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    mixed = images.flatten(2)[:, :, torch.randperm(64)].view_as(images)
    first, second = ColourHistogram()(normalize(torch.cat([images, mixed])))
    assert torch.equal(first, second)
    other = ColourHistogram()(normalize(255 - images))[0]
    assert first @ other < 0.9 < first @ second


def test_raw_pixels_of_a_small_image_are_its_own():
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(RawPixels()(images), images.flatten(1))
    assert RawPixels()(torch.randn(1, 3, 40, 60)).shape == (1, 3 * SIDE * SIDE)
