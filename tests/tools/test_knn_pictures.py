"""What the pictures of k-NN show."""

import numpy as np
import pytest
import torch
from helpers import write_images
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data.source import open_source
from tools import knn_pictures
from tools.knn_pictures import Judged, confused_pairs, confusion, draw_confusion, draw_neighbours
from tools.sheet import FRAME, GAP, LINE, RIGHT, TILE, WRONG


@pytest.fixture
def found(tmp_path):
    """Three classes; of the last, one image is judged right, and all others of the first wrong."""
    write_images(tmp_path / "train", classes=3, images=4)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    train, test = (open_source(str(tmp_path), split) for split in ("train", "val"))
    features = torch.nn.functional.normalize(torch.randn(12, 5), dim=1)
    judged = np.array([2, 2, 1, 2, 1, 1, 1, 1, 2, 0, 0, 0])
    return Judged(train, test, features, features, judged, 10)


def test_rows_of_right_queries_come_before_wrong_ones(found):
    """Each is its own nearest training image, whose class is the query's."""
    picture = np.array(draw_neighbours(found, 0))
    tile = TILE + 2 * FRAME
    rows = (picture.shape[0] - GAP - LINE) // (tile + LINE + GAP)
    assert rows == 10 and picture.shape[1] == 9 * (tile + GAP) + GAP
    for row in range(rows):
        y = GAP + row * (tile + LINE + GAP) + tile // 2
        query, first = (tuple(picture[y, GAP + c * (tile + GAP) + 2]) for c in (0, 1))
        assert query == (RIGHT if row < 5 else WRONG) and first == RIGHT
        pixels = [picture[y, GAP + c * (tile + GAP) + FRAME :][:TILE] for c in (0, 1)]
        assert np.array_equal(*pixels)


def test_queries_are_all_there_are_if_they_are_few(found):
    only = np.array(draw_neighbours(Judged(**{**vars(found), "judged": found.test.labels}), 0))
    colours = {tuple(only[y, GAP + 2]) for y in range(len(only))}
    assert RIGHT in colours and WRONG not in colours


def test_pairs_count_in_both_directions(monkeypatch):
    labels, judged = np.array([0, 0, 1, 2, 2, 2, 3]), np.array([1, 1, 0, 3, 3, 2, 3])
    assert confused_pairs(labels, judged) == [(0, 1), (2, 3)]
    assert confusion(labels, judged, [0, 1, 3]).tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 1]]
    monkeypatch.setattr(knn_pictures, "PAIRS", 1)
    assert confused_pairs(labels, judged) == [(0, 1)]


def test_the_matrix_shows_the_worst_pair_first(found, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_confusion(found, str(tmp_path / "confusion.png"))
    (axes,) = drawn[0].axes
    names = [found.test.classes[number] for number in (0, 2, 1)]
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    # a column is what was said: class 0 as 2, as 1, then class 2 as 0, as 2, then class 1 as 1
    assert numbers == {(1, 0): "3", (2, 0): "1", (0, 1): "3", (1, 1): "1", (2, 2): "4"}
    framed = {p.get_xy() for p in axes.patches if isinstance(p, Rectangle)}
    assert framed == {(0.5, -0.5), (1.5, -0.5), (-0.5, 0.5)}


def test_nothing_confused_gives_no_matrix(found, tmp_path):
    draw_confusion(
        Judged(**{**vars(found), "judged": found.test.labels}), str(tmp_path / "confusion.png")
    )
    assert not (tmp_path / "confusion.png").exists()
