"""The picture of rankings marks right, wrong and junk."""

import pytest
import torch

from evaluation.pictures import GREY, NEUTRAL, RIGHT, WRONG
from tools import show_ranking
from tools.make_tiny_retrieval import write_retrieval
from utils.errors import UserError


@pytest.fixture
def draw(run_main, tmp_path, monkeypatch):
    write_retrieval(str(tmp_path), landmarks=3, size=64)
    # the third query is nearest to image 13, then to 14 and so on around
    angles = torch.arange(21) - 13
    angles = (angles % 21)[:, None] / 21
    torch.save(torch.cat([angles.cos(), angles.sin()], 1), tmp_path / "train_features.pth")
    torch.save(torch.tensor([[1.0, 0.0]] * 3), tmp_path / "query_features.pth")

    drawn = []
    monkeypatch.setattr(show_ranking, "save", lambda figure, path: drawn.append((figure, path)))

    def run(*flags):
        """The verdicts on the rows of the picture, in words."""
        common = ("--data-path", tmp_path, "--load-features", tmp_path, "--output", "x.png")
        run_main(show_ranking, *common, *flags)
        figure, path = drawn.pop()
        assert path == "x.png"
        words = {RIGHT: "right", WRONG: "wrong", NEUTRAL: "query", GREY: "junk"}
        rows: dict = {}
        for axes in filter(lambda axes: axes.images, figure.axes):
            row = rows.setdefault(axes.get_subplotspec().rowspan.start, [])
            row.append(words[axes.xaxis.label.get_color()])
        return [rows[number] for number in sorted(rows)]

    return run


def test_the_picture(draw):
    # of the third landmark: 13 to 15 are easy, 16 and 17 hard, 18 shows something else
    shown = draw("--queries", "2", "0", "--top", "6")
    assert shown[0] == ["query", *["right"] * 5, "wrong"]
    # none of these belongs to the first landmark
    assert shown[1] == ["query", *["wrong"] * 6]


def test_mistakes(draw, tmp_path):
    with pytest.raises(UserError, match="--queries must be from 0 to 2"):
        draw("--queries", "3")
    torch.save(torch.ones(5, 2), tmp_path / "train_features.pth")
    with pytest.raises(UserError, match="not the features of roxford5k"):
        draw()
