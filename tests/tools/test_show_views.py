"""tools/show_views.py: a sheet of views."""

import numpy as np
import pytest
from helpers import ROOT, run_tool

from data.augmentation import ViewParameters
from tools import show_views
from utils.errors import UserError

CFG = ("--cfg", ROOT / "configs/moby_vit_tiny.yaml")


def test_a_sheet_has_the_image_and_both_kinds_of_views(imagenet, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(show_views, "save", lambda figure, path: drawn.append(figure))
    image, out = imagenet / "train/class0/3.jpg", tmp_path / "sheet.png"
    opts = ("--opts", "AUG.SSL_AUG_TYPE", "custom", "AUG.VIEW2.GREY", "1.0")
    run_tool(monkeypatch, show_views, image, *CFG, "--views", 4, "--output", out, *opts)
    assert capsys.readouterr().out == f"{out} written\n"
    coloured: dict = {0: [], 1: [], 2: []}
    for axes in filter(lambda axes: axes.images, drawn[0].axes):
        pixels = np.asarray(axes.images[0].get_array()).astype(int)
        row = coloured[axes.get_subplotspec().rowspan.start]
        row.append(bool((np.ptp(pixels, axis=2) > 8).any()))
    # the second kind is grey, always
    assert [len(row) for row in coloured.values()] == [1, 4, 4]
    assert [any(row) for row in coloured.values()] == [True, True, False]


def test_what_was_drawn_is_said():
    view = ViewParameters((0, 0, 9, 9), True, (("hue", 0.1),), False, 1.25, True)
    assert show_views.done(view) == ["flip", "jitter", "blur 1.2", "solarise"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg", *CFG], r"none\.jpg"),
        (
            ["IMAGE", *CFG, "--opts", "AUG.SSL_AUG_TYPE", "colourful"],
            "must be byol, simclr or custom",
        ),
        (["IMAGE", *CFG, "--output", "file/x.png"], "cannot write the picture"),
    ],
)
def test_mistakes_are_named(imagenet, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    image = str(imagenet / "train/class0/3.jpg")
    with pytest.raises(UserError, match=message):
        run_tool(monkeypatch, show_views, *(image if a == "IMAGE" else a for a in arguments))
