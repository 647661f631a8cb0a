"""Label propagation against DINO's, block by block, and its neighbourhood against loops."""

import numpy as np
import pytest
import torch
from helpers import reference
from torch.nn.functional import normalize, one_hot

import evaluation.label_propagation as module
from evaluation.label_propagation import LabelPropagation, outside_neighborhood, propagate


@pytest.mark.parametrize("block", [1, 4 * 14 * 14 * 10 * 3, module.BLOCK])
def test_dino(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    arrays, settings = reference("label_propagation.npz"), reference("label_propagation.json")
    features = torch.from_numpy(arrays["features"])
    propagation = LabelPropagation(
        features[0],
        torch.from_numpy(arrays["first_segmentation"]).permute(1, 2, 0),
        settings["n_last_frames"],
        settings["size_mask_neighborhood"],
        settings["topk"],
        settings["temperature"],
    )
    for frame, expected in zip(features[1:], arrays["propagated"], strict=True):
        labels = propagation.step(frame).permute(2, 0, 1)
        np.testing.assert_allclose(labels, expected, atol=1e-5)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def labels_of(height, width, classes=3):
    drawn = draw(height, width, classes)
    return one_hot(drawn.argmax(2), classes).float()


@pytest.mark.parametrize("radius, n_last", [(None, 2), (0, 2), (3, 0)])
def test_a_radius_and_a_context(radius, n_last):
    frames = draw(4, 5, 7, 6)
    first = labels_of(5, 7)
    propagation = LabelPropagation(frames[0], first, n_last, radius, topk=10**6)
    outputs = [first, *(propagation.step(frame) for frame in frames[1:])]
    context = [0, *range(1, 3)][: 1 + n_last]
    y, x = np.divmod(np.arange(35), 7)
    near = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) <= (
        99 if radius is None else radius
    )
    flat = normalize(frames, dim=3).flatten(1, 2).double()
    affinity = torch.cat(
        [(flat[3] @ flat[t].T / 0.1).exp() * torch.tensor(near) for t in context], 1
    )
    known = torch.cat([outputs[t].flatten(0, 1) for t in context]).double()
    expected = affinity @ known / affinity.sum(1, keepdim=True)
    torch.testing.assert_close(outputs[3].flatten(0, 1).double(), expected, atol=1e-5, rtol=0)


def test_equally_similar_patches_count_equally():
    # one row of three patches, all alike: even the best one alone is all three
    same = torch.ones(1, 1, 3, 2) / 2**0.5
    labels = torch.eye(3)[None, None]
    expected = torch.full((1, 3, 3), 1 / 3)
    torch.testing.assert_close(propagate(same[0], same, labels, None, 1, 0.1), expected)


@pytest.mark.parametrize("height, width, radius", [(3, 5, 1), (4, 4, 2), (2, 3, 0), (1, 6, 9)])
def test_the_neighbourhood_by_loops(height, width, radius):
    expected = torch.ones(height, width, height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            for p in range(max(0, i - radius), min(height, i + radius + 1)):
                for q in range(max(0, j - radius), min(width, j + radius + 1)):
                    expected[i, j, p, q] = False
    outside = outside_neighborhood(height, width, radius, torch.device("cpu"))
    assert torch.equal(outside, expected)
    assert outside_neighborhood(height, width, radius, torch.device("cpu")) is outside


def test_what_is_kept_does_not_grow_with_the_video():
    propagation = LabelPropagation(draw(3, 4, 2), labels_of(3, 4), n_last_frames=2)
    for frame in draw(9, 3, 4, 2):
        propagation.step(frame)
    assert len(propagation.recent) == 2


def test_the_least_that_is_accepted():
    """One patch, no movement, and no frame but the first: labels stay where the best match is."""
    features, labels = draw(3, 4, 2), labels_of(3, 4)
    propagation = LabelPropagation(features, labels, n_last_frames=0, radius=0, topk=1)
    torch.testing.assert_close(propagation.step(features), labels)
    assert not propagation.recent
    default = LabelPropagation(features, labels)
    assert (default.radius, default.topk, default.temperature) == (12, 5, 0.1)
    assert default.recent.maxlen == 7
