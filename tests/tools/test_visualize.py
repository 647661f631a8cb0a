"""What the pictures show, and how they are laid out."""

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, fresh, write_images
from PIL import Image

from data.source import open_source
from models.encoder import create_encoder
from models.patch_features import class_attention
from tools import sheet, visualize
from tools.feature_map import draw_map, draw_pictures
from tools.sheet import FRAME, GAP, LINE, RIGHT, TILE, WRONG, Tile, draw_sheet, overlay
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture
def draw(run_main, tmp_path, imagenet):
    """Run the tool; the picture as an array."""

    def run(what, *flags, encoder="vit_nano", weights=("--random-weights",)):
        common = ("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet)
        opts = ("--opts", *TINY, "MODEL.ENCODER", encoder, "MODEL.NAME", "m")
        run_main(visualize, what, *common, *weights, "--output", tmp_path, *flags, *opts)
        return np.array(Image.open(tmp_path / "m" / "default" / "pictures" / f"{what}.png"))

    return run


def cell(rows, columns, captions=True):
    """Height and width of a sheet of square images with one line of notes."""
    height = rows * (TILE + captions * LINE + GAP) + GAP + LINE
    return height, columns * (TILE + GAP) + GAP


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


def test_attention_sheet(draw, tmp_path):
    write_images(tmp_path / "wide", classes=1, images=2, size=40)
    picture = draw("attention", "--files", tmp_path / "wide" / "class0" / "0.jpg")
    assert picture.shape == (*cell(1, 6), 3)  # image, mean, 4 heads
    middle = GAP + TILE // 2
    shown = [picture[middle, GAP + c * (TILE + GAP) : (c + 1) * (TILE + GAP)] for c in range(6)]
    assert all(not np.array_equal(shown[0], other) for other in shown[1:])
    with pytest.raises(UserError, match="no class token"):
        draw("attention", "--images", "1", encoder="swin_tiny")


def test_a_map_of_images_has_like_ones_close():
    """Two groups of features, of red and of blue images: each colour stays on its side."""
    rng = np.random.default_rng(0)
    centres = np.repeat([[1.0, 0, 0, 0], [0, 1, 0, 0]], 20, 0)
    features = centres + 0.05 * rng.normal(size=(40, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pictures = [Image.new("RGB", (30, 20), c) for c in ("red",) * 20 + ("blue",) * 20]
    sheet = np.array(draw_pictures(features, pictures, "tsne", 0)).astype(int)
    red, blue = ((sheet == colour).all(2) for colour in ((255, 0, 0), (0, 0, 255)))
    middles = [np.argwhere(mask).mean(0) for mask in (red, blue)]
    spread = max(np.argwhere(mask).std(0).max() for mask in (red, blue))
    assert np.linalg.norm(middles[0] - middles[1]) > 2 * spread


def test_similarity_is_that_to_the_mean_of_the_patches(monkeypatch, imagenet):
    """One patch unlike all others is the darkest."""
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [])
    patches = torch.ones(4, 4, 8)
    patches[1, 2] = -patches[1, 2]
    monkeypatch.setattr(visualize, "of_patches", lambda *_: [patches])
    shown = []
    monkeypatch.setattr(visualize, "overlay", lambda picture, v: shown.append(v) or picture)
    images = visualize.choose(open_source(str(imagenet), "val"), 1, config)
    visualize.draw_similarity(visualize.Subject(config, images, None, None))
    assert np.unravel_index(shown[0].argmin(), (4, 4)) == (1, 2)
    assert shown[0].min() == 0 and shown[0].max() == 1


def test_many_heads_wrap(draw):
    picture = draw("attention", "--images", "1", "--size", "32", encoder="vit_small")
    assert picture.shape[1] == cell(2, 7)[1]  # 14 tiles


@pytest.mark.parametrize("encoder", ["vit_nano", "swin_tiny"])
def test_components_of_oblong_images(draw, tmp_path, encoder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)).save(
        tmp_path / "wide.png"
    )
    picture = draw("components", "--files", tmp_path / "wide.png", encoder=encoder)
    height = TILE // 2 + LINE + GAP + GAP + 2 * LINE  # the note takes two lines
    assert picture.shape == (height, 2 * (TILE + GAP) + GAP, 3)
    colours = picture[GAP : GAP + TILE // 2, 2 * GAP + TILE : 2 * GAP + 2 * TILE]
    assert colours.std((0, 1)).min() > 10  # all three vary


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
    pictures = []
    for seed in (0, 1):
        _, weights = fresh("vit_nano", seed)
        torch.save(FAMILIES[family](weights), tmp_path / "weights.pth")
        given = ("--pretrained", tmp_path / "weights.pth")
        pictures.append(draw("components", "--images", "2", weights=given))
    _, weights = fresh("vit_nano", 0)
    torch.save(weights, tmp_path / "weights.pth")
    plain = draw("components", "--images", "2", weights=("--pretrained", tmp_path / "weights.pth"))
    assert np.array_equal(pictures[0], plain) and not np.array_equal(pictures[1], plain)


def test_components_are_those_of_all_images_together():
    torch.manual_seed(0)
    rows = torch.randn(2 * 2400, 16) * torch.tensor([9.0, 6.0, 4.0] + [0.1] * 13)
    first, second = rows.split(2400)
    parts = visualize.principal_colours([first.view(40, 60, 16), second.view(60, 40, 16)])
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
    (colours,) = visualize.principal_colours([features], foreground=True)
    white = (colours == 1).all(2)
    expected = np.ones((6, 6), bool)
    expected[2:4, 2:5] = False
    assert np.array_equal(white, expected)


def test_neighbours(draw, imagenet):
    """A training image is its own nearest neighbour; frames say whose class is right."""
    path = imagenet / "train" / "class1" / "3.jpg"
    picture = draw("neighbours", "--images", "3", "--neighbours", "4")
    colours = set(map(tuple, picture.reshape(-1, 3)))
    assert RIGHT in colours and WRONG in colours
    assert picture.shape[1] == 5 * (TILE + 2 * FRAME + GAP) + GAP
    alone = draw("neighbours", "--files", path, "--neighbours", "2")
    colours = set(map(tuple, alone.reshape(-1, 3)))
    assert RIGHT not in colours and WRONG not in colours  # a file has no class
    width = TILE + 2 * FRAME + GAP
    tiles = [alone[GAP + FRAME :, c * width + GAP + FRAME :][:150, :150] for c in (0, 1)]
    assert np.array_equal(*tiles)


def test_the_map_keeps_classes_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(70), 6)
    features = rng.standard_normal((70, 16))[labels] + 0.01 * rng.standard_normal((420, 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names = [f"a_name_that_goes_on_and_on_for_ever_{i}" for i in range(70)]
    picture = np.array(draw_map(features, labels, names, "tsne", 0))
    blue, others = (np.abs(picture.astype(int) - c).sum(2) < 40 for c in ((45, 134, 190), (200,)))
    assert blue.sum() > 50 and others.sum() > 50
    assert picture.shape[0] < picture.shape[1] < 3000
    assert (picture[:, -1] == 255).all() and (picture[-1] == 255).all()  # nothing is cut off
    with pytest.raises(UserError, match="at least 3 images"):
        draw_map(features[:2], labels[:2], names, "tsne", 0)


def test_map_of_the_tool(draw):
    pytest.importorskip("sklearn")
    assert draw("map", "--images", "6").shape[0] > 500


def test_images_are_of_all_classes_alike(imagenet):
    config = load_config(str(ROOT / "configs/synco_vit_tiny.yaml"), [])
    chosen = visualize.choose(open_source(str(imagenet), "val"), 4, config)
    assert sorted(chosen.labels) == [0, 0, 1, 1]
    assert chosen.read_image(0).size == Image.open(chosen.names[0]).size


def test_sheet_places_tiles_and_captions():
    red, blue = (
        Image.new("RGB", size, c) for size, c in (((200, 100), "red"), ((50, 200), "blue"))
    )
    long = "a very long name of a class that does not fit"
    picture = np.array(draw_sheet([[Tile(red, long, RIGHT), Tile(blue)], [Tile(blue)]]))
    inner = TILE + 2 * FRAME
    assert picture.shape == (2 * (inner + LINE + GAP) + GAP, 2 * (inner + GAP) + GAP, 3)
    y = GAP + inner - FRAME - 50
    assert tuple(picture[y, GAP + FRAME + 100]) == (255, 0, 0)
    assert tuple(picture[y, GAP + 2]) == RIGHT
    assert tuple(picture[y, 2 * GAP + inner + inner // 2]) == (0, 0, 255)
    text = picture[GAP + inner : GAP + inner + LINE, :]
    assert (text[:, GAP : GAP + inner] != 255).any()
    assert (text[:, GAP + inner :] == 255).all()  # shortened to its column
    assert sheet.font().getlength(sheet.shorten(long, 100)) <= 100
    assert sheet.shorten(long, 100).endswith("…")


def test_overlay_is_bright_where_the_values_are():
    grey = Image.new("RGB", (100, 60), (90, 90, 90))
    values = np.zeros((3, 5))
    values[1, 3] = 1
    shown = np.asarray(overlay(grey, values)).astype(int).sum(2)
    assert shown.shape == (60, 100)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert abs(y - 30) < 10 and abs(x - 70) < 10
    assert shown.max() > 2 * shown[5, 5]


def test_sizes_are_whole_patches():
    image = Image.new("RGB", (1000, 90))
    for name, patch in (("vit_nano", 8), ("swin_tiny", 32)):
        encoder = create_encoder(name, 32)
        size = visualize.resized(image, 64, encoder).size
        assert size[0] % patch == size[1] % patch == 0
        assert size[0] <= visualize.WIDEST * 64


def test_mistakes(draw, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images there"):
        draw("components", "--files", tmp_path / "none")
    with pytest.raises(UserError, match="cannot read the image"):
        draw("components", "--files", tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="--help lists the flags"):
        draw("portrait")
