"""tools/pack_images.py --zip: what the zips hold, and what they cannot; tars are in test_forms."""

import io
import os
import shutil
import tarfile
import warnings
import zipfile

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT

from data import opening
from data.folders import FolderSource
from data.loader import build_pretraining_loader
from data.opening import open_source
from data.zips import ZipSource
from tools import pack_images
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture
def pack(monkeypatch):
    """Run the tool."""

    def run(*arguments) -> None:
        monkeypatch.setattr("sys.argv", ["pack_images.py", "--zip", *map(str, arguments)])
        pack_images.main()

    return run


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_zip_has_the_images_and_labels_of_the_folder(imagenet, tmp_path, pack, split):
    pack(imagenet, tmp_path / "new")
    folder, zipped = FolderSource(str(imagenet), split), ZipSource(str(tmp_path / "new"), split)
    assert zipped.labels.tolist() == folder.labels.tolist()
    assert [f"{imagenet}/{split}/{name}" for name in zipped.names] == list(folder.names)
    for index in range(len(folder.names)):
        assert zipped.read(index) == folder.read(index)
    names = {"train.zip", "train_map.txt", "val.zip", "val_map.txt"}
    assert set(os.listdir(tmp_path / "new")) == names  # and no temporary file
    with zipfile.ZipFile(tmp_path / "new" / f"{split}.zip") as archive:
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["no", "part", "full"])
def test_training_sees_the_same_batches(imagenet, tmp_path, pack, monkeypatch, workers, cache):
    """Each of several workers opens the archive for itself."""
    monkeypatch.setattr("data.loader.processors", lambda: 4)
    pack(imagenet, tmp_path)
    batches = []
    for path, zipped in ((imagenet, False), (tmp_path, True)):
        config = load_config(
            str(ROOT / "configs/moby_vit_tiny.yaml"),
            [
                *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", str(workers)),
                *("DATA.DATA_PATH", str(path), "DATA.ZIP_MODE", str(zipped)),
                *("DATA.CACHE_MODE", cache),
            ],
        )
        loader = build_pretraining_loader(config)
        batches.append([torch.stack([b.first, b.second]) for (b,) in loader])
    assert len(batches[0]) == 6
    for one, other in zip(*batches, strict=True):
        assert one.equal(other)


def test_only_what_is_there_is_packed(imagenet, tmp_path, pack, capsys):
    shutil.copytree(imagenet / "val", tmp_path / "data" / "val")
    pack(tmp_path / "data", tmp_path)
    assert not (tmp_path / "train.zip").exists()
    assert capsys.readouterr().out == f"val: 7 images in {tmp_path}/val.zip\n"


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", "a\udcffb.jpg"])
def test_names_that_a_list_cannot_hold_are_refused(imagenet, tmp_path, pack, name):
    shutil.copytree(imagenet / "val", tmp_path / "data" / "val")
    shutil.copy(imagenet / "val/class0/0.jpg", tmp_path / "data/val/class0" / name)
    with pytest.raises(UserError, match="cannot be listed: rename it") as error:
        pack(tmp_path / "data", tmp_path / "out")
    assert str(error.value).isprintable()
    assert not os.listdir(tmp_path / "out")


def test_a_failure_leaves_the_old_zip(imagenet, tmp_path, pack, monkeypatch):
    pack(imagenet, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match=r"cannot pack train \(No space left on device\)"):
        pack(imagenet, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("missing", ["data", "splits", "file"])
def test_mistakes_are_named(imagenet, tmp_path, pack, missing, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    if missing != "data":
        data.mkdir()
    if missing == "file":
        shutil.copytree(imagenet / "val", data / "val")

        def list_and_lose(*arguments, **options):
            source = open_source(*arguments, **options)
            (data / "val/class1/2.jpg").unlink(missing_ok=True)
            return source

        monkeypatch.setattr(opening, "open_source", list_and_lose)
    messages = {
        "data": "data: the data path does not exist",
        "splits": "no folder train/ in the data path",
        "file": r"class1/2\.jpg",
    }
    message = messages[missing]
    with pytest.raises(UserError, match=message):
        pack(data, out)


def test_two_images_of_one_name_are_refused(tmp_path, pack):
    """As in shards that count from 0 anew; a zip would have the last one twice."""
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number:06}.tar", "w") as archive:
            for name, content in (("0000.jpg", JPEG[number]), ("0000.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"two images are called .*0000\.jpg"):
        pack(tmp_path, tmp_path / "out")
    assert not os.listdir(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own
        for content in JPEG:
            archive.writestr("a/0.jpg", content)
    (tmp_path / "train_map.txt").write_text("a/0.jpg\t0\n")
    with pytest.raises(UserError, match=r"train\.zip: it has a/0\.jpg twice"):
        ZipSource(str(tmp_path), "train")


JPEG = [cv2.imencode(".jpg", np.full((8, 8, 3), value, np.uint8))[1].tobytes() for value in (9, 99)]
