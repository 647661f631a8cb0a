"""Features of every image of a folder, a list or another form."""

import csv

import numpy as np
import pytest
import torch
from helpers import run_script, run_tool, write_images
from PIL import Image

from synco_vit import load_encoder
from tools import embed, pack_images
from utils.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Photographs at several depths, one of them damaged."""
    write_images(tmp_path / "photos/2019", classes=2, images=3)
    write_images(tmp_path / "photos", classes=1, images=2)
    (tmp_path / "photos/class0/bad.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path):
    """A file of weights of a small encoder."""
    torch.manual_seed(0)
    torch.save(load_encoder("vit_nano", img_size=32).state_dict(), tmp_path / "nano.pth")
    return tmp_path / "nano.pth"


def expected(weights, paths):
    encoder = load_encoder(weights)
    with torch.inference_mode():
        views = torch.stack([encoder.transform(Image.open(path)) for path in paths])
        return encoder(views).numpy()


def test_every_readable_image_has_its_path_and_feature(
    run_main, monkeypatch, capsys, tmp_path, weights, photos
):
    out = tmp_path / "new/features.npz"
    monkeypatch.setattr(embed, "PART", 3)  # so that there are several
    run_main(embed, weights, photos, "--out", out, "--batch-size", 2, "--workers", 1)
    found = np.load(out)
    paths = sorted(str(p) for p in photos.glob("**/*.jpg") if p.name != "bad.jpg")
    assert sorted(found["paths"]) == paths and len(paths) == 8
    assert found["features"].dtype == np.float32
    np.testing.assert_allclose(found["features"], expected(weights, found["paths"]), atol=1e-5)
    said = capsys.readouterr().out
    assert said.count("left out: ") == 1 and "bad.jpg" in said and "8 images" in said
    assert not (tmp_path / "new/features.npz.parts").exists()


def test_all_endings_hold_the_same(run_main, monkeypatch, tmp_path, weights, photos):
    parquet = pytest.importorskip("pyarrow.parquet")
    for ending in embed.ENDINGS:
        out = tmp_path / f"f{ending}"
        run_main(embed, weights, photos, "--output", out, "--workers", 0)
    found = np.load(tmp_path / "f.npz")
    head, *rows = csv.reader((tmp_path / "f.csv").open(encoding="utf-8"))
    assert head[:2] == ["path", "f0"] and [row[0] for row in rows] == found["paths"].tolist()
    assert np.array_equal(np.array([row[1:] for row in rows], np.float32), found["features"])
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == found["paths"].tolist()
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), found["features"])


def test_a_list_and_a_packed_form_are_read(run_main, monkeypatch, tmp_path, weights, imagenet):
    names = [f"train/class1/{number}.jpg" for number in (3, 1)]
    (tmp_path / "list.txt").write_text("".join(f"{imagenet / name}\n" for name in names) + "\n")
    run_main(embed, weights, tmp_path / "list.txt", "--out", tmp_path / "l.npz")
    found = np.load(tmp_path / "l.npz")
    assert found["paths"].tolist() == [str(imagenet / name) for name in names]
    run_tool(monkeypatch, pack_images, imagenet, tmp_path / "packed")
    run_main(embed, weights, tmp_path / "packed", "--out", tmp_path / "p.npz")
    packed = np.load(tmp_path / "p.npz")
    (place,) = (i for i, path in enumerate(packed["paths"]) if path.endswith("class1/3.jpg"))
    np.testing.assert_allclose(packed["features"][place], found["features"][0], atol=1e-5)


def test_it_goes_on_where_it_was_stopped(run_main, monkeypatch, tmp_path, weights, photos):
    out = tmp_path / "f.npz"
    flags = (weights, photos, "--out", out, "--workers", 0)
    monkeypatch.setattr(embed, "PART", 3)
    join = embed.join
    monkeypatch.setattr(embed, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_main(embed, *flags)
    monkeypatch.setattr(embed, "join", join)
    parts = sorted((tmp_path / "f.npz.parts").glob("*.npz"))
    assert len(parts) == 3
    parts[1].unlink()
    torch.manual_seed(1)
    torch.save(load_encoder("vit_nano", img_size=32).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="of other images or another encoder"):
        run_main(embed, tmp_path / "other.pth", *flags[1:])
    kept = parts[0].stat().st_mtime_ns
    read = []
    get = embed.Views.__getitem__
    monkeypatch.setattr(embed.Views, "__getitem__", lambda s, i: read.append(i) or get(s, i))
    run_main(embed, *flags)
    assert read == [3, 4, 5] and kept and len(np.load(out)["paths"]) == 8


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, weights, photos):
    for processes in (0, 2):
        out = tmp_path / f"{processes}.npz"
        done = run_script("tools.embed", weights, photos, "--out", out, processes=processes)
        assert done.returncode == 0, done.stdout
    one, two = (np.load(tmp_path / f"{processes}.npz") for processes in (0, 2))
    assert one["paths"].tolist() == two["paths"].tolist()
    np.testing.assert_allclose(one["features"], two["features"], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("WEIGHTS", "PHOTOS", "--out", "f.txt"), "the ending must be one of .npz"),
        (("WEIGHTS", "none", "--out", "f.npz"), "none: no such file"),
        (("none", "PHOTOS", "--out", "f.npz"), "none: no such file, and no encoder"),
        (("WEIGHTS", "PHOTOS"), "--out"),
    ],
)
def test_mistakes(run_main, monkeypatch, tmp_path, weights, photos, arguments, message):
    monkeypatch.chdir(tmp_path)
    words = {"WEIGHTS": weights, "PHOTOS": photos}
    with pytest.raises(UserError, match=message):
        run_main(embed, *(words.get(word, word) for word in arguments))
