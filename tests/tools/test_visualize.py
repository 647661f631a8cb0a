"""The tool that draws what an encoder has learned."""

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, fresh, write_images
from PIL import Image

from data.opening import open_source
from evaluation import pictures
from tools import visualize
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture
def draw(run_main, tmp_path, imagenet, monkeypatch):
    """Run the tool; the picture as an array, and its figure."""
    figures = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda f, path: [figures.append(f), save(f, path)])

    def run(what, *flags, encoder="vit_nano", weights=("--random-weights",)):
        common = ("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet)
        opts = ("--opts", *TINY, "MODEL.ENCODER", encoder, "MODEL.NAME", "m")
        run_main(visualize, what, *common, *weights, "--output", tmp_path, *flags, *opts)
        path = tmp_path / "m" / "default" / "pictures" / f"{what}.png"
        return np.array(Image.open(path)), figures.pop()

    return run


def texts(figure) -> dict:
    """Captions by row and column."""
    places = [axes for axes in figure.axes if axes.images]
    spans = [axes.get_subplotspec() for axes in places]
    return {
        (span.rowspan.start, span.colspan.start): axes.get_xlabel()
        for span, axes in zip(spans, places, strict=True)
    }


def test_attention_sheet(draw, tmp_path):
    write_images(tmp_path / "wide", classes=1, images=2, size=40)
    path = tmp_path / "wide" / "class0" / "0.jpg"
    _, figure = draw("attention", "--files", path)
    heads = [f"head {number}" for number in range(1, 5)]
    assert [texts(figure)[0, column] for column in range(6)] == ["0.jpg", "mean", *heads]
    maps = [np.asarray(axes.images[1].get_array()) for axes in figure.axes[1:6]]
    np.testing.assert_allclose(maps[0], np.mean(maps[1:], axis=0), rtol=1e-5)
    assert not np.array_equal(maps[1], maps[2])
    with pytest.raises(UserError, match="no class token"):
        draw("attention", "--images", "1", encoder="swin_tiny")


def test_many_heads_wrap(draw):
    _, figure = draw("attention", "--images", "1", "--size", "32", encoder="vit_small")
    assert {row for row, _ in texts(figure)} == {0, 1}  # 14 tiles
    assert max(column for _, column in texts(figure)) == 6


@pytest.mark.parametrize("encoder", ["vit_nano", "swin_tiny"])
def test_components_of_oblong_images(draw, tmp_path, encoder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)).save(
        tmp_path / "wide.png"
    )
    _, figure = draw("components", "--files", tmp_path / "wide.png", encoder=encoder)
    assert list(texts(figure).values()) == ["wide.png", "components"]
    colours = np.asarray(figure.axes[1].images[0].get_array())
    assert colours.shape[1] == 2 * colours.shape[0] and colours.std((0, 1)).min() > 10


def test_neighbours(draw, imagenet):
    """A training image is its own nearest neighbour; frames say whose class is right."""
    path = imagenet / "train" / "class1" / "3.jpg"
    _, figure = draw("neighbours", "--images", "3", "--neighbours", "4")
    shown = texts(figure)
    assert shown.keys() == {(row, column) for row in range(3) for column in range(5)}
    marks = {text[0] for (_, column), text in shown.items() if column}
    assert marks == {"✓", "✗"}
    for (row, column), text in shown.items():
        assert not column or (text[0] == "✓") == (text.split()[-1] == shown[row, 0])
    _, alone = draw("neighbours", "--files", path, "--neighbours", "2")
    assert not any(mark in text for text in texts(alone).values() for mark in "✓✗")
    query, nearest = (np.asarray(axes.images[0].get_array()) for axes in alone.axes[:2])
    assert np.array_equal(query, nearest)


FAMILIES = {
    "this project": lambda weights: {"model": prefixed("encoder.", weights)},
    "DINO": lambda weights: {"teacher": prefixed("module.backbone.", weights)},
    "MoCo v3": lambda weights: {"state_dict": prefixed("module.base_encoder.", weights)},
    "timm": lambda weights: weights,
}


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_familys_checkpoint_is_drawn(draw, tmp_path, family):
    """The network has its weights: another seed of the file gives another picture."""
    drawn = []
    for seed in (0, 1):
        _, weights = fresh("vit_nano", seed)
        torch.save(FAMILIES[family](weights), tmp_path / "weights.pth")
        given = ("--pretrained", tmp_path / "weights.pth")
        drawn.append(draw("components", "--images", "2", weights=given)[0])
    _, weights = fresh("vit_nano", 0)
    torch.save(weights, tmp_path / "weights.pth")
    given = ("--pretrained", tmp_path / "weights.pth")
    plain, _ = draw("components", "--images", "2", weights=given)
    assert np.array_equal(drawn[0], plain) and not np.array_equal(drawn[1], plain)


def test_map_of_the_tool(draw):
    pytest.importorskip("sklearn")
    picture, _ = draw("map", "--images", "6")
    assert picture.shape[0] > 500


def test_images_are_of_all_classes_alike(imagenet):
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [])
    chosen = visualize.choose(open_source(str(imagenet), "val"), 4, config)
    assert sorted(chosen.labels) == [0, 0, 1, 1]
    assert chosen.read_image(0).size == Image.open(chosen.names[0]).size


def test_mistakes(draw, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images there"):
        draw("components", "--files", tmp_path / "none")
    with pytest.raises(UserError, match="no such file or folder"):
        draw("components", "--files", tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="--help lists the flags"):
        draw("portrait")
