"""Which images are held out."""

import numpy as np
import torch
from PIL import Image

from evaluation.protocols import hold_out, set_aside


def test_a_part_of_each_class_is_held_out():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 25)
    held_out = hold_out(labels, 0, 5)
    assert torch.bincount(labels[held_out]).tolist() == [10, 2, 5]
    assert not held_out.equal(hold_out(labels, 1, 5))
    assert held_out.equal(hold_out(labels, 0, 5))
    labels = torch.arange(60) % 3
    assert torch.bincount(labels[hold_out(labels, 0, 10)]).tolist() == [2, 2, 2]


class Numbered:
    """Images whose pixels are their numbers."""

    def __init__(self, labels):
        self.labels, self.classes = np.asarray(labels), ["a", "b"]
        self.names = [f"image {i}" for i in range(len(labels))]

    def read_image(self, index):
        return Image.new("RGB", (1, 1), (index, 0, 0))


def test_what_is_set_aside_is_not_trained_on():
    source = Numbered([0, 1] * 20)
    kept, aside = set_aside(source, 3)
    assert (len(kept.names), len(aside.names)) == (36, 4)
    assert sorted([*kept.names, *aside.names]) == sorted(source.names)
    assert aside.labels.tolist().count(0) == aside.labels.tolist().count(1) == 2
    for part in (kept, aside):
        assert part.classes == source.classes
        for i, name in enumerate(part.names):
            number = part.read_image(i).getpixel((0, 0))[0]
            assert name == f"image {number}" and part.labels[i] == source.labels[number]


def test_images_with_several_labels_are_set_aside():
    kept, aside = set_aside(Numbered(np.eye(20, 2, dtype=np.int64)), 0)
    assert kept.labels.shape == (18, 2) and aside.labels.shape == (2, 2)
