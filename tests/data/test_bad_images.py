"""Bad images: replaced and counted in pre-training, an error that names them elsewhere."""

import io
import logging
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_forked, spawn, zip_folder
from PIL import Image

import data.dataset
import data.zips
from data import opencv
from data.augmentation import draw_view, view_augmentations
from data.dataset import CropAndFlip, TestImages, TrainImages, TwoViews, Views
from data.folders import FolderSource
from data.image import FORMATS, MAX_BYTES, decode_rgb
from data.loader import BadImages, build_pretraining_loader
from data.zips import ZipSource
from utils.config import load_config
from utils.errors import UserError

BAD = 17  # index of the damaged image: class1/3.jpg


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def resized_head(width: int, height: int) -> bytes:
    """A small JPEG whose head claims another size."""
    content = encoded((8, 8), "JPEG")
    start = content.index(b"\xff\xc0") + 5  # marker, length, depth, then the sides
    return content[:start] + struct.pack(">HH", height, width) + content[start + 4 :]


def damage(kind: str, path: Path) -> None:
    content = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "too large":
        with open(path, "r+b") as file:
            file.truncate(MAX_BYTES + 1)  # a hole, which takes no space
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "text": b"not an image, whatever its name says",
                "50000 x 1": encoded((50_000, 1)),
                "1 x 50000": encoded((1, 50_000), "JPEG"),
                # more pixels than PIL's limit, and more than twice as many, where PIL has an error
                "bomb": resized_head(10_000, 10_000),
                "large bomb": resized_head(60_000, 60_000),
                # for which PIL would start another program
                "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
                "no pixels": b"P6 0 0 255\n",
            }[kind]
        )


KINDS = [
    *("empty", "truncated", "text", "50000 x 1", "1 x 50000", "bomb", "large bomb", "postscript"),
    *("no pixels", "deleted", "folder", "too large"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def source(imagenet, tmp_path) -> FolderSource:
    """24 images that a test may damage."""
    shutil.copytree(imagenet, tmp_path / "data")
    return FolderSource(str(tmp_path / "data"), "train")


def two_views(source, **options) -> TwoViews:
    return TwoViews(source, view_augmentations("byol", 0.08), 32, seed=0, **options)


@every_kind
@pytest.mark.parametrize("backend", ["opencv", "pil"])
def test_pre_training_replaces_it(source, kind, backend, recwarn):
    before = two_views(source, backend=backend)[3, BAD]
    assert before.replaced == -1
    damage(kind, Path(source.names[BAD]))
    images = two_views(source, backend=backend)
    found = images[3, BAD]
    stand_in = list(images._candidates(3, BAD))[1]
    assert found.replaced == BAD and found.label == source.labels[stand_in]
    assert found.first.shape == (32, 32, 3) and not found.first.equal(before.first)
    again, later = images[3, BAD], images[4, BAD]
    assert again.first.equal(found.first) and again.second.equal(found.second)
    assert not later.first.equal(found.first)  # another epoch, another image
    assert not later.second.equal(found.second)
    assert images[3, BAD - 1].replaced == -1
    assert not recwarn.list


@every_kind
def test_evaluations_name_it(source, kind):
    damage(kind, Path(source.names[BAD]))
    for images, key in (
        (TestImages(source, 32), BAD),
        (TrainImages(source, CropAndFlip(32), 0), (0, BAD)),
        (two_views(source, replacements=0), (0, BAD)),  # --eval of main_pretrain.py
    ):
        with pytest.raises(UserError) as error:
            images[key]
        assert str(error.value).startswith(source.names[BAD] + ": ")
        assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_the_content_counts_not_the_extension(source, kind):
    Path(source.names[BAD]).write_bytes(encoded((40, 40), kind))
    assert two_views(source)[0, BAD].replaced == -1
    assert np.asarray(source.read_image(BAD)).reshape(-1, 3).mean(0) == pytest.approx(
        [255, 0, 0], abs=3
    )
    assert kind in FORMATS


@pytest.mark.parametrize("decode", [decode_rgb, opencv.decode_array])
def test_long_panoramas_are_no_bombs(decode):
    assert np.asarray(decode(encoded((1000, 10), "JPEG"), "x")).shape == (10, 1000, 3)


def test_a_bad_replacement_is_replaced_too(source):
    for index in range(24):
        if index != 7:
            damage("text", Path(source.names[index]))
    good = decode_rgb(source.read(7), "")
    images = two_views(source, replacements=200)
    drawn = list(images._candidates(0, BAD))
    assert drawn[0] == BAD and drawn.index(7) > 1
    (image, _), used = images._decode_or_replace(0, BAD)
    assert np.array_equal(image, opencv.decode_array(source.read(7), "")) and used == 7
    assert images[0, BAD][2:4] == (BAD, source.labels[7])
    assert image.shape == (good.height, good.width, 3)


def test_the_search_ends_when_all_images_are_gone(source, monkeypatch):
    shutil.rmtree(Path(source.names[0]).parent.parent)
    read = []
    monkeypatch.setattr(source, "read", lambda index: read.append(index) or source_read(index))
    source_read = FolderSource.read.__get__(source)
    with pytest.raises(UserError, match=r"class1/3\.jpg.*nor can the 8 images") as error:
        two_views(source)[0, BAD]
    assert len(read) == 9 and str(error.value).isprintable()


def config_for(root, workers: int, zipped: bool = False):
    config = load_config(
        str(ROOT / "configs/moby_vit_tiny.yaml"),
        [
            *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", str(workers)),
            *("DATA.ZIP_MODE", str(zipped)),
        ],
    )
    config.DATA.DATA_PATH = str(root)
    return config


def test_workers_and_a_resume_replace_alike(source, tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.processors", lambda: 4)
    for index in (2, BAD):
        damage("truncated", Path(source.names[index]))
    epochs = []
    for workers, first in ((0, 0), (2, 0), (1, 3)):
        loader = build_pretraining_loader(config_for(tmp_path / "data", workers))
        loader.start_at(1, 4 * first)
        views, replaced = [], []
        for (batch,) in loader:
            views.append(torch.stack([batch.first, batch.second]))
            third = batch.replaced
            assert third.dtype == torch.int64 and third.shape == (4,)
            replaced.append(third)
        epochs.append((torch.stack(views), torch.stack(replaced)))
    for one, two, resumed in zip(*epochs, strict=True):
        assert one.equal(two) and one[3:].equal(resumed)
    assert sorted(set(epochs[0][1].flatten().tolist())) == [-1, 2, BAD]


def test_the_validation_images_are_not_replaced(source, tmp_path):
    damage("text", tmp_path / "data/val/class0/1.jpg")
    loader = build_pretraining_loader(config_for(tmp_path / "data", 0), "val")
    with pytest.raises(UserError, match=r"val/class0/1\.jpg: not a readable image"):
        list(loader)


def break_member(path: Path, name: str) -> None:
    """Flip a byte in the middle of a member, whose checksum then does not fit."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    content[info.header_offset + 60 + info.compress_size // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("cache", ["no", "full"])
def test_a_damaged_member_of_a_zip_is_replaced(source, tmp_path, cache):
    zip_folder(tmp_path / "data", "train", tmp_path / "zips")
    break_member(tmp_path / "zips/train.zip", "class1/3.jpg")
    config = config_for(tmp_path / "zips", 2, zipped=True)
    config.DATA.CACHE_MODE = cache
    found = torch.cat([b.replaced for (b,) in build_pretraining_loader(config)])
    assert sorted(found.tolist()) == [-1] * 23 + [BAD]
    with pytest.raises(UserError, match=r"train\.zip: cannot read class1/3\.jpg \(Bad CRC"):
        ZipSource(str(tmp_path / "zips"), "train").read_image(BAD)


def test_a_zip_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(data.zips, "MAX_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", b"\0" * (2**20 + 1))
    (tmp_path / "train_map.txt").write_text("bomb.jpg\t0\n")
    with pytest.raises(UserError, match=r"cannot read bomb\.jpg \(the file is too large\)"):
        ZipSource(str(tmp_path), "train").read(0)


@pytest.mark.parametrize("name", ["../secret.jpg", "/secret.jpg", "class0/../../secret.jpg"])
def test_a_list_cannot_leave_its_zip(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr(name, b"x")
        archive.writestr("0.jpg", b"y")
    (tmp_path / "train_map.txt").write_text(f"{name}\t0\n0.jpg\t0\n")
    source = ZipSource(str(tmp_path), "train")
    assert {source.read(index) for index in range(len(source.names))} <= {b"x", b"y"}


def batch(replaced: torch.Tensor) -> Views:
    """A batch of which nothing else matters."""
    return Views(*[torch.empty(0)] * 2, replaced, *[torch.empty(0)] * 2)


class Log(logging.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__("test")
        self.lines: list[str] = []

    def handle(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_each_bad_image_is_logged_once(source):
    damage("empty", Path(source.names[2]))
    log = Log()
    bad = BadImages(source, 0.1, log)
    for _ in range(3):
        bad.note([batch(torch.tensor([-1, 2, -1, 2]))])
        bad.check()
    assert len(log.lines) == 1
    assert f"process 0 replaced a bad image: {source.names[2]}: not a readable" in log.lines[0]
    bad.note([batch(torch.tensor([5]))])
    bad.check()
    assert log.lines[1].endswith(f"{source.names[5]}: could be read only at a second try")


@pytest.mark.parametrize(("fraction", "stops"), [(0.0, 1), (0.04, 1), (0.05, 2), (1.0, None)])
def test_a_larger_share_of_bad_images_stops_the_run(source, fraction, stops):
    log = Log()
    bad = BadImages(source, fraction, log)
    for number, index in enumerate((3, 8, 8), 1):
        damage("text", Path(source.names[index]))
        bad.note([batch(torch.tensor([index]))])
        if number == stops:
            with pytest.raises(UserError, match=rf"{number} of 24 images are bad.*check_data"):
                bad.check()
            return
        bad.check()
    assert stops is None


def count_in_a_group(rank: int, folder: str) -> None:
    """Two processes see the same bad image in different epochs, and one of its own each."""
    source = FolderSource(f"{folder}/data", "train")
    log = Log()
    bad = BadImages(source, 3 / 24, log)
    for seen in ([2, 3], [3, -1], [4, 4], [2, -1]):
        bad.note([batch(torch.tensor(seen[rank]))])
        bad.check()
    assert len(log.lines) == len(bad.bad) == 3, log.lines
    assert [line.split()[1] for line in log.lines] == ["0", "1", "0"]
    bad.note([batch(torch.tensor([9] if rank else [-1]))])
    with pytest.raises(UserError, match="4 of 24"):
        bad.check()


@pytest.mark.slow
def test_processes_count_together(source, tmp_path):
    for index in range(24):
        damage("empty", Path(source.names[index]))
    spawn(count_in_a_group, 2, str(tmp_path))


CORRUPT = """
import sys
sys.path.insert(0, {root!r})
from data.loader import build_pretraining_loader
from utils.config import load_config
config = load_config({cfg!r}, {opts!r})
config.DATA.DATA_PATH = {data!r}
list(build_pretraining_loader(config))
print("done", file=sys.stderr)
"""


@pytest.mark.slow
def test_libjpegs_remarks_stay_off_the_terminal(source, tmp_path):
    """Bytes before the end of a JPEG are lost, which its decoders only remark upon."""
    path = Path(source.names[BAD])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4] + b"\xff\xd9")
    opts = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "1"]
    script = tmp_path / "load.py"
    cfg = str(ROOT / "configs/moby_vit_tiny.yaml")
    values = {"root": str(ROOT), "cfg": cfg, "opts": opts, "data": str(tmp_path / "data")}
    script.write_text(CORRUPT.format(**values))
    done = run_forked(str(script))
    assert done.returncode == 0
    assert done.stdout == "done\n"


def test_views_are_drawn_for_the_place_not_for_the_replacement(source, monkeypatch):
    """Else an image that stands in for another would enter a batch twice, drawn alike."""
    damage("text", Path(source.names[BAD]))
    seeds = []

    def draw(rng, *arguments):
        seeds.append(rng.random())
        return draw_view(rng, *arguments)

    monkeypatch.setattr(data.dataset, "draw_view", draw)
    two_views(source)[0, BAD]
    expected = [np.random.default_rng((0, 0, BAD, number)).random() for number in (0, 1)]
    assert seeds == expected
