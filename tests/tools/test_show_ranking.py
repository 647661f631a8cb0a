"""The picture of rankings marks right, wrong and junk."""

import numpy as np
import pytest
import torch
from PIL import Image

from tools import show_ranking
from tools.make_tiny_retrieval import write_retrieval
from tools.show_ranking import BORDER, COLOURS, TILE, judge
from utils.errors import UserError


@pytest.mark.parametrize(
    "difficulty, expected",
    [
        ("easy", ["right", "junk", "junk", "wrong"]),
        ("medium", ["right", "right", "junk", "wrong"]),
        ("hard", ["junk", "right", "junk", "wrong"]),
    ],
)
def test_verdicts(difficulty, expected):
    labels = {"easy": np.array([4]), "hard": np.array([5]), "junk": np.array([6])}
    assert judge(labels, np.array([4, 5, 6, 7]), difficulty) == expected


@pytest.fixture
def draw(run_main, tmp_path):
    write_retrieval(str(tmp_path), landmarks=3, size=64)
    # the third query is nearest to image 13, then to 14 and so on around
    angles = torch.arange(21) - 13
    angles = (angles % 21)[:, None] / 21
    torch.save(torch.cat([angles.cos(), angles.sin()], 1), tmp_path / "train_features.pth")
    torch.save(torch.tensor([[1.0, 0.0]] * 3), tmp_path / "query_features.pth")

    def run(*flags):
        path = tmp_path / "ranking.png"
        common = ("--data-path", tmp_path, "--load-features", tmp_path, "--output", path)
        run_main(show_ranking, *common, *flags)
        return np.array(Image.open(path))

    return run


def test_the_picture(draw):
    picture = draw("--queries", "2", "0", "--top", "6")
    assert picture.shape == (2 * TILE, 7 * TILE, 3)
    marks = [tuple(picture[BORDER // 2, column * TILE + TILE // 2]) for column in range(7)]
    # of the third landmark: 13 to 15 are easy, 16 and 17 hard, 18 shows something else
    expected = [(0, 0, 0), *[COLOURS["right"]] * 5, COLOURS["wrong"]]
    assert marks == expected
    # none of these belongs to the first landmark
    others = [tuple(picture[TILE + BORDER // 2, c * TILE + TILE // 2]) for c in range(1, 7)]
    assert others == [COLOURS["wrong"]] * 6


def test_mistakes(draw, tmp_path):
    with pytest.raises(UserError, match="--queries must be from 0 to 2"):
        draw("--queries", "3")
    torch.save(torch.ones(5, 2), tmp_path / "train_features.pth")
    with pytest.raises(UserError, match="not the features of roxford5k"):
        draw()
