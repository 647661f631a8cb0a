"""Films and curves of what was segmented."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data.davis import palette
from tools.video_pictures import LONGEST, MILLISECONDS, draw_scores, film


def test_a_film_shows_the_frames_in_their_order_made_smaller(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (2 * LONGEST, 60), colour).save(path)
    film(paths, str(tmp_path / "film.gif"))
    with Image.open(tmp_path / "film.gif") as shown:
        assert shown.n_frames == 3 and shown.size == (LONGEST, 30)
        assert shown.info["duration"] == MILLISECONDS and shown.info["loop"] == 0
        for number, colour in enumerate(colours):
            shown.seek(number)
            pixel = shown.convert("RGB").getpixel((100, 10))
            assert np.abs(np.subtract(pixel, colour)).max() < 12


def test_curves_are_means_of_both_in_the_colours_of_the_masks(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_: drawn.append(figure))
    first = {"J": [0.2, 0.4], "F": [0.6, 0.6]}
    second = {"J": [1.0, 1.0], "F": [1.0, 0.0]}
    scored = {"cows": {"cows_1": first, "cows_2": second}, "empty": {}, "bike": {"bike_1": first}}
    draw_scores(scored, str(tmp_path / "j_and_f.png"))
    cows, bike = drawn[0].axes
    assert [axes.get_title() for axes in (cows, bike)] == ["cows: 0.600", "bike: 0.450"]
    one, two = cows.lines
    assert list(one.get_xdata()) == [1, 2]
    assert list(one.get_ydata()) == pytest.approx([0.4, 0.5])
    assert list(two.get_ydata()) == pytest.approx([1.0, 0.5])
    assert list(two.get_color()) == (palette()[2] / 255).tolist()
