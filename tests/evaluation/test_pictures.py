"""What the pictures show."""

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from data.davis import palette
from data.opening import open_source
from evaluation import pictures
from evaluation.pictures import (
    GREY,
    NEUTRAL,
    RIGHT,
    WRONG,
    Tile,
    confused_pairs,
    draw_confusion,
    draw_images,
    draw_judged,
    draw_map,
    draw_scores,
    film,
    grid,
    judge_ranking,
    lay_out,
    principal_colours,
    save,
)
from models.encoder import create_encoder
from models.patch_features import class_attention
from utils.config import load_config
from utils.errors import UserError


def tiles(figure):
    """(row, column) -> (caption, colour of the caption, frame or None, pixels) of a grid."""
    found = {}
    for axes in figure.axes:
        if axes.images:
            place = axes.get_subplotspec()
            spine = axes.spines["left"]
            frame = to_hex(spine.get_edgecolor()).upper() if spine.get_visible() else None
            label = axes.xaxis.label
            pixels = np.asarray(axes.images[0].get_array())
            found[place.rowspan.start, place.colspan.start] = (
                *(label.get_text(), label.get_color(), frame, pixels),
            )
    return found


def test_a_grid_places_tiles_captions_and_frames(tmp_path):
    red, blue = (
        Image.new("RGB", size, c) for size, c in (((200, 100), "red"), ((50, 200), "blue"))
    )
    long = "a very long name of a class that does not fit"
    figure = grid(
        [[Tile(red, long, "right"), Tile(blue)], [Tile(blue, "b", "junk")]], "A note. " * 20
    )
    found = tiles(figure)
    assert found.keys() == {(0, 0), (0, 1), (1, 0)}
    text, colour, frame, pixels = found[0, 0]
    assert text.startswith("✓ a very long") and text.endswith("…") and len(text) < 26
    assert colour == frame == RIGHT and (pixels == (255, 0, 0)).all()
    assert pixels.shape == (100, 200, 3)
    assert found[0, 1][:3] == ("", NEUTRAL, None) and found[1, 0][:3] == ("b", GREY, GREY)
    assert figure.texts[0].get_text().count("\n") > 1  # no wider than the picture
    save(figure, str(tmp_path / "new/grid.png"))
    drawn = np.asarray(Image.open(tmp_path / "new/grid.png").convert("RGB"))
    for shown in ((255, 0, 0), (0, 0, 255), tuple(bytes.fromhex(RIGHT[1:]))):
        assert (drawn == shown).all(2).sum() > 100
    with pytest.raises(UserError, match=r"none\.txt: cannot write the picture \(Format 'txt'"):
        save(figure, str(tmp_path / "none.txt"))


def test_heat_is_bright_where_the_values_are(tmp_path):
    values = np.zeros((3, 5))
    values[1, 3] = 1
    figure = grid([[Tile(Image.new("RGB", (100, 60), (90, 90, 90)), heat=values)]])
    save(figure, str(tmp_path / "heat.png"))
    shown = np.asarray(Image.open(tmp_path / "heat.png").convert("RGB")).astype(int).sum(2)
    box = figure.axes[0].get_window_extent()
    height = figure.get_size_inches()[1] * figure.dpi
    top, left = round(height - box.y1), round(box.x0)
    shown = shown[top + 2 : top + round(box.height) - 2, left + 2 : left + round(box.width) - 2]
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert abs(y / shown.shape[0] - 0.5) < 0.17 and abs(x / shown.shape[1] - 0.7) < 0.1


@pytest.fixture
def found(tmp_path):
    """Three classes; of the last, one image is judged right, and all others of the first wrong."""
    write_images(tmp_path / "train", classes=3, images=4)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    train, test = (open_source(str(tmp_path), split) for split in ("train", "val"))
    features = torch.nn.functional.normalize(torch.randn(12, 5), dim=1)
    judged = np.array([2, 2, 1, 2, 1, 1, 1, 1, 2, 0, 0, 0])
    return train, test, (features, features), judged


def test_rows_of_right_queries_come_before_wrong_ones(found):
    """Each is its own nearest training image, whose class is the query's."""
    shown = tiles(draw_judged(*found, k=10, seed=0))
    assert shown.keys() == {(row, column) for row in range(10) for column in range(9)}
    for row in range(10):
        text, _, frame, pixels = shown[row, 0]
        assert frame == (RIGHT if row < 5 else WRONG) and (":" in text) == (row >= 5)
        assert shown[row, 1][0].startswith("✓ 1.00 ") and shown[row, 1][2] == RIGHT
        assert np.array_equal(pixels, shown[row, 1][3])


def test_queries_are_all_there_are_if_they_are_few(found):
    train, test, features, _ = found
    only = tiles(draw_judged(train, test, features, test.labels, k=10, seed=0))
    assert {frame for (_, column), (_, _, frame, _) in only.items() if not column} == {RIGHT}


def test_pairs_count_in_both_directions():
    labels, judged = np.array([0, 0, 1, 2, 2, 2, 3]), np.array([1, 1, 0, 3, 3, 2, 3])
    assert confused_pairs(labels, judged) == [(0, 1), (2, 3)]
    assert confused_pairs(labels, judged, 1) == [(0, 1)]


def test_the_matrix_shows_the_worst_pair_first(found):
    _, test, _, judged = found
    (axes,) = draw_confusion(test.labels, judged, test.classes, 10).axes
    names = [test.classes[number] for number in (0, 2, 1)]
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    # a column is what was said: class 0 as 2, as 1, then class 2 as 0, as 2, then class 1 as 1
    assert numbers == {(1, 0): "3", (2, 0): "1", (0, 1): "3", (1, 1): "1", (2, 2): "4"}
    framed = {p.get_xy() for p in axes.patches if isinstance(p, Rectangle)}
    assert framed == {(0.5, -0.5), (1.5, -0.5), (-0.5, 0.5)}


def test_nothing_confused_gives_no_matrix(found):
    _, test, _, _ = found
    assert draw_confusion(test.labels, test.labels, test.classes, 10) is None


@pytest.mark.parametrize(
    "difficulty, expected",
    [
        ("easy", ["right", "junk", "junk", "wrong"]),
        ("medium", ["right", "right", "junk", "wrong"]),
        ("hard", ["junk", "right", "junk", "wrong"]),
    ],
)
def test_verdicts_on_rankings(difficulty, expected):
    labels = {"easy": np.array([4]), "hard": np.array([5]), "junk": np.array([6])}
    assert judge_ranking(labels, np.array([4, 5, 6, 7]), difficulty) == expected


def test_a_film_shows_the_frames_in_their_order_made_smaller(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (960, 60), colour).save(path)
    film(paths, str(tmp_path / "film.gif"))
    with Image.open(tmp_path / "film.gif") as shown:
        assert shown.n_frames == 3 and shown.size == (480, 30)
        assert shown.info["duration"] == 40 and shown.info["loop"] == 0
        for number, colour in enumerate(colours):
            shown.seek(number)
            pixel = shown.convert("RGB").getpixel((100, 10))
            assert np.abs(np.subtract(pixel, colour)).max() < 12


def test_curves_are_means_of_both_in_the_colours_of_the_masks():
    first = {"J": [0.2, 0.4], "F": [0.6, 0.6]}
    second = {"J": [1.0, 1.0], "F": [1.0, 0.0]}
    scored = {"cows": {"cows_1": first, "cows_2": second}, "empty": {}, "bike": {"bike_1": first}}
    cows, bike = draw_scores(scored).axes
    assert [axes.get_title() for axes in (cows, bike)] == ["cows: 0.600", "bike: 0.450"]
    one, two = cows.lines
    assert list(one.get_xdata()) == [1, 2]
    assert list(one.get_ydata()) == pytest.approx([0.4, 0.5])
    assert list(two.get_ydata()) == pytest.approx([1.0, 0.5])
    assert list(two.get_color()) == (palette()[2] / 255).tolist()


def test_attention_is_the_softmax_of_queries_and_keys():
    """Against what attention layers give: the values weighted by it."""
    encoder = create_encoder("vit_nano", 32).eval()
    images = torch.randn(2, 3, 32, 48)
    attention = class_attention(encoder, images)
    assert attention.shape == (2, 4, 4, 6)
    last = encoder.blocks[-1]
    seen = {}
    last.attn.qkv.register_forward_hook(lambda *a: seen.update(qkv=a[2]))
    last.attn.proj.register_forward_pre_hook(lambda *a: seen.update(mixed=a[1][0]))
    with torch.no_grad():
        encoder(images)
    values = seen["qkv"].unflatten(2, (3, 4, 32))[:, :, 2]  # BxNxheadsxd
    to_itself = 1 - attention.sum((2, 3))
    full = torch.cat([to_itself[..., None], attention.flatten(2)], 2)
    expected = torch.einsum("bhn,bnhd->bhd", full, values).flatten(1)
    torch.testing.assert_close(expected, seen["mixed"][:, 0], rtol=1e-4, atol=1e-5)


def test_similarity_is_that_to_the_mean_of_the_patches(monkeypatch, imagenet):
    """One patch unlike all others is the darkest."""
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [])
    patches = torch.ones(4, 4, 8)
    patches[1, 2] = -patches[1, 2]
    images = open_source(str(imagenet), "val")
    monkeypatch.setattr(pictures.Subject, "of_patches", lambda *_: [patches] * len(images.names))
    figure = pictures.draw_similarity(pictures.Subject(config, images, None, None))
    heat = figure.axes[1].images[1].get_array()
    assert np.unravel_index(heat.argmin(), (4, 4)) == (1, 2)
    assert "similarity" in figure.axes[1].get_xlabel()


def test_sizes_are_whole_patches():
    image = Image.new("RGB", (1000, 90))
    for name, patch in (("vit_nano", 8), ("swin_tiny", 32)):
        size = pictures.resized(image, 64, create_encoder(name, 32)).size
        assert size[0] % patch == size[1] % patch == 0
        assert size[0] <= 4 * 64


def test_components_are_those_of_all_images_together():
    torch.manual_seed(0)
    rows = torch.randn(2 * 2400, 16) * torch.tensor([9.0, 6.0, 4.0] + [0.1] * 13)
    first, second = rows.split(2400)
    parts = principal_colours([first.view(40, 60, 16), second.view(60, 40, 16)])
    assert [p.shape for p in parts] == [(40, 60, 3), (60, 40, 3)]
    colours = np.concatenate([p.reshape(-1, 3) for p in parts])
    assert colours.min() == 0 and colours.max() == 1
    for axis in range(3):  # the axes of most variance, in their order
        inner = (colours[:, axis] > 0) & (colours[:, axis] < 1)
        r = np.corrcoef(colours[inner, axis], rows[inner, axis])[0, 1]
        assert abs(r) > 0.98


def test_the_foreground_is_what_the_border_is_not():
    torch.manual_seed(0)
    features = 0.1 * torch.randn(6, 6, 8)
    features[2:4, 2:5, 0] += 10
    (colours,) = principal_colours([features], foreground=True)
    white = (colours == 1).all(2)
    expected = np.ones((6, 6), bool)
    expected[2:4, 2:5] = False
    assert np.array_equal(white, expected)


def test_a_map_of_images_has_like_ones_close():
    """Two groups of features, of red and of blue images: each colour stays on its side."""
    rng = np.random.default_rng(0)
    centres = np.repeat([[1.0, 0, 0, 0], [0, 1, 0, 0]], 20, 0)
    features = centres + 0.05 * rng.normal(size=(40, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shown = [Image.new("RGB", (30, 20), c) for c in ("red",) * 20 + ("blue",) * 20]
    (axes,) = draw_images(shown, lay_out(features, "tsne", 0)).axes
    extents = np.array([image.get_extent() for image in axes.images]).reshape(40, 2, 2)
    middles = extents.mean(2)  # of each image, x and y
    red, blue = middles[:20], middles[20:]
    assert (np.asarray(axes.images[0].get_array())[0, 0] == (255, 0, 0)).all()
    assert np.linalg.norm(red.mean(0) - blue.mean(0)) > 2 * max(red.std(0).max(), blue.std(0).max())
    width, height = np.diff(extents[0])[:, 0]
    assert width == pytest.approx(1.5 * height, rel=0.01)


def test_the_map_keeps_classes_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), [9] * 49 + [6] * 11)
    names = [f"a_name_that_goes_on_and_on_for_ever_{i}" for i in range(60)]
    points = rng.standard_normal((len(labels), 2))
    figure = draw_map(points, labels, names)
    others, *shown = figure.axes[0].collections
    assert others.get_label() == "11 more classes" and len(others.get_offsets()) == 66
    looks = {(to_hex(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in shown}
    assert len(looks) == len(shown) == 49 and all(len(c.get_label()) <= 28 for c in shown)
    assert np.array_equal(shown[3].get_offsets(), points[labels == 3])
    with pytest.raises(UserError, match="at least 3 images"):
        lay_out(points[:2], "tsne", 0)
