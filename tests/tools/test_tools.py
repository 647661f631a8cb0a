"""The tools that make data."""

import shutil

import numpy as np
import pytest
from helpers import run_tool, write_images
from PIL import Image

from data.folders import FolderSource
from tools import make_fake_imagenet, split_images
from utils.errors import UserError


def test_fake_imagenet_is_seeded_and_in_imagenets_layout(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ("--train", 2, "--val", 1, "--seed", seed)
        run_tool(monkeypatch, make_fake_imagenet, tmp_path / name, *options)
    sources = [FolderSource(str(tmp_path / name), "train") for name in "abc"]
    assert len(sources[0].classes) == 12 and len(sources[0].names) == 24
    assert len(FolderSource(str(tmp_path / "a"), "val").names) == 12
    one, same, other = ([s.read_image(i).tobytes() for i in range(24)] for s in sources)
    assert one == same
    assert all(x != y for x, y in zip(one, other, strict=True))
    assert len(set(one)) == 24


def test_mean_colours_do_not_give_the_class_away():
    """A class is no nearer to its own mean colour than to that of the others."""
    means = np.array(
        [
            [
                make_fake_imagenet.draw(np.random.default_rng((c, i)), *kind, 48, 48).mean((0, 1))
                for i in range(30)
            ]
            for c, kind in enumerate(make_fake_imagenet.CLASSES)
        ]
    )  # 12 x 30 x 3
    centres = means[:, :15].mean(1)
    distance = ((means[:, 15:, None] - centres) ** 2).sum(-1)
    right = (distance.argmin(-1) == np.arange(12)[:, None]).mean()
    assert right < 0.2  # chance is 0.083, with a standard error of 0.02


def test_a_tree_of_images_becomes_train_and_val(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = tmp_path / "in" / "cats" / ("deep" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 4), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "in" / "cats" / "bad.png").write_text("no image")
    (tmp_path / "in" / "dogs").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("not a folder")
    run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out", "--val-share", 0.3)
    train, val = (FolderSource(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert train.classes == ["cats"] and (len(train.names), len(val.names)) == (7, 3)
    pictures = [s.read_image(i).tobytes() for s in (train, val) for i in range(len(s.names))]
    assert len(set(pictures)) == 10
    assert "left out: " in capsys.readouterr().out


def test_images_without_classes_become_one(monkeypatch, capsys, tmp_path):
    write_images(tmp_path / "in" / "2019", classes=1, images=3)
    write_images(tmp_path / "in", classes=1, images=2)
    shutil.copy(tmp_path / "in" / "class0" / "0.jpg", tmp_path / "in" / "on_top.jpg")
    run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out", "--one-class")
    assert "5 training and 1 validation images" in capsys.readouterr().out
    found = sorted(path.name for path in (tmp_path / "out").glob("*/images/*"))
    assert found == sorted(
        ["2019__class0__0.jpg", "2019__class0__1.jpg", "2019__class0__2.jpg"]
        + ["class0__0.jpg", "class0__1.jpg", "on_top.jpg"]
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no class with at least two readable images"):
        run_tool(monkeypatch, split_images, tmp_path / "empty", tmp_path / "o", "--one-class")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("images", [1, 2, 3, 10])
def test_each_class_has_images_in_both_or_is_named(monkeypatch, capsys, tmp_path, share, images):
    write_images(tmp_path / "in/rare", classes=1, images=images)
    write_images(tmp_path / "in/often", classes=1, images=4)
    run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out", "--val-share", share)
    classes = [sorted(p.name for p in (tmp_path / "out" / s).iterdir()) for s in ("train", "val")]
    both = ["often", "rare"] if images > 1 else ["often"]
    assert classes == [both, both]
    assert ("in/rare: 1 readable images" in capsys.readouterr().out) == (images == 1)


def test_a_missing_tree_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="none: no such file or folder"):
        run_tool(monkeypatch, split_images, tmp_path / "none", tmp_path / "out")


def test_a_second_split_into_one_folder_is_refused(monkeypatch, tmp_path):
    """It would have training images among the validation images."""
    write_images(tmp_path / "in", classes=2, images=4)
    run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="out/train: it has images already"):
        run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out", "--seed", "1")


def test_two_images_that_would_get_one_name_are_refused(monkeypatch, tmp_path):
    write_images(tmp_path / "in" / "a" / "x", classes=1, images=2)
    shutil.copy(tmp_path / "in/a/x/class0/0.jpg", tmp_path / "in/a/x__class0__0.jpg")
    with pytest.raises(UserError, match=r"another image became x__class0__0\.jpg too"):
        run_tool(monkeypatch, split_images, tmp_path / "in", tmp_path / "out")
