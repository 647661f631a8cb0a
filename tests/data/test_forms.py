"""Every form in which ImageNet lies on a disk, made from the same images and read alike."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, run_tool, tiny, write_images
from image_forms import SPLITS, WRITERS, add, copy_folder, files
from PIL import Image
from test_archives import pack, write_kit

import eval_knn
import main_pretrain
from data import parquet
from data.folders import FolderSource
from data.listing import FOLDER
from data.loader import build_pretraining_loader
from data.opening import DataPath, forms, open_source, open_splits
from data.tars import TarSource
from data.zips import ZipSource
from tools import check_data, pack_images
from utils.errors import UserError


def write_imagenets(imagenet: Path, root: Path) -> None:
    tars = []
    for folder in sorted((imagenet / "train").iterdir()):
        tar = root / f"{folder.name}.tar.made"
        with tarfile.open(tar, "w") as archive:
            for path in sorted(folder.iterdir(), reverse=True):
                archive.add(path, path.name)
        tars.append((tar, f"{folder.name}.tar"))
    pack(root / "ILSVRC2012_img_train.tar", tars)
    for tar, _ in tars:
        tar.unlink()
    images, truth = [], []
    for number, (path, _, label) in enumerate(files(imagenet, "val"), 1):
        images.append((path, f"ILSVRC2012_val_{number:08}.JPEG"))
        truth.append(2 - label)  # the kit of the test numbers classes from the last
    pack(root / "ILSVRC2012_img_val.tar", images)
    kit = root / "made"
    kit.mkdir()
    write_kit(kit, truth, ["class0", "class1"])
    inside = "ILSVRC2012_devkit_t12/data"
    pack(
        root / "ILSVRC2012_devkit_t12.tar.gz",
        [(path, f"{inside}/{path.name}") for path in kit.iterdir()],
    )
    shutil.rmtree(kit)


WRITERS = WRITERS | {"imagenets": (write_imagenets, "ImageNet's archive")}
every_form = pytest.mark.parametrize("form", WRITERS)
LABELLED = [form for form in WRITERS if form != "flat"]


@pytest.fixture(scope="session")
def in_form(imagenet, tmp_path_factory):
    """The data path of a form."""
    made: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form.replace(" ", "_"))
            WRITERS[form][0](imagenet, made[form])
        return made[form]

    return make


def configured(root: Path, *opts):
    config, _ = tiny("configs/moby_vit_tiny.yaml", "DATA.BATCH_SIZE", "4", *opts)
    config.defrost()
    config.DATA.DATA_PATH = str(root)
    return config


def test_every_form_is_tried_and_documented():
    known = [form.name for form in forms()]
    assert {form for _, form in WRITERS.values()} == set(known)
    page = (ROOT / "docs/data.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in known] == known


@pytest.mark.parametrize("form", LABELLED)
@pytest.mark.parametrize("split", SPLITS)
def test_a_form_has_the_images_and_labels_of_the_folder(imagenet, in_form, form, split):
    folder = FolderSource(str(imagenet), split)
    source = open_source(str(in_form(form)), split)
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.labels.dtype == np.int64
    assert source.classes in (folder.classes, ["0", "1"])
    assert len(set(source.names)) == len(folder.names)
    for index in range(len(folder.names)):
        assert source.read(index) == folder.read(index)
        assert source.read_image(index).tobytes() == folder.read_image(index).tobytes()


@every_form
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_form_gives_the_batches_of_the_folder(imagenet, in_form, form, workers, monkeypatch):
    """In two epochs, and from the middle of one, as after a resume."""
    monkeypatch.setattr("data.loader.processors", lambda: 4)
    batches = []
    for root in (imagenet, in_form(form)):
        loader = build_pretraining_loader(configured(root, "DATA.NUM_WORKERS", workers))
        loader.start_at(0)
        found = [torch.stack([b.first, b.second]) for (b,) in loader]
        loader.start_at(1, images_seen=8)
        found += [torch.stack([b.first, b.second]) for (b,) in loader]
        batches.append(found)
    assert len(batches[0]) == 6 + 4
    assert all(one.equal(other) for one, other in zip(*batches, strict=True))


@pytest.mark.parametrize("form", LABELLED)
def test_the_figures_are_those_of_the_folder(imagenet, in_form, form, tmp_path, run_main):
    figures = []
    for name, root in (("one", imagenet), ("other", in_form(form))):
        run_main(
            eval_knn,
            *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", root),
            *("--output", tmp_path / name, "--nb-knn", 1, 5, "--random-weights", "--opts"),
            *("DATA.IMG_SIZE", "32", "MODEL.ENCODER", "vit_nano", "DATA.NUM_WORKERS", "0"),
            *("DATA.BATCH_SIZE", "4", "MODEL.NAME", "run"),
        )
        results = tmp_path / name / "run/default/knn_imagenet/results.json"
        figures.append(json.loads(results.read_text())["knn"])
    assert figures[0] == figures[1]


@pytest.mark.parametrize("train", LABELLED)
def test_validation_images_may_lie_in_another_form(in_form, tmp_path, train):
    """Whose classes may have names, or numbers in the order of the names."""
    for name in in_form(train).iterdir():
        if not name.name.startswith(("val", "ILSVRC2012_img_val", FOLDER)):
            (tmp_path / name.name).symlink_to(name)
    (tmp_path / "val").symlink_to(in_form("folder") / "val")
    found = open_splits(DataPath(str(tmp_path)))
    assert found[0].classes == found[1].classes == ["class0", "class1"]
    assert [source.labels.tolist() for source in found] == [[0] * 12 + [1] * 12, [0] * 4 + [1] * 3]


@every_form
def test_a_form_is_packed_and_gives_the_batches(imagenet, in_form, form, tmp_path, monkeypatch):
    run_tool(monkeypatch, pack_images, in_form(form), tmp_path / "out")
    names = {name for name in os.listdir(tmp_path / "out") if not name.startswith(".")}
    assert names == {"train.tar", "val.tar"}
    for split in SPLITS:
        folder = FolderSource(str(imagenet), split)
        packed = open_source(str(tmp_path / "out"), split)
        original = open_source(str(in_form(form)), split, labelled=False)
        assert packed.classes == original.classes
        assert packed.labels.tolist() == original.labels.tolist()
        for index in range(len(folder.names)):
            assert packed.read(index) == folder.read(index)


@every_form
def test_check_data_reads_it(in_form, form, tmp_path, monkeypatch, capsys):
    run_tool(monkeypatch, check_data, "imagenet", in_form(form), "--workers", 0)
    out, flat = capsys.readouterr().out, form == "flat"
    assert f"train: 24 images of {1 if flat else 2} classes, 0 bad" in out
    others = "" if flat else ", eval_knn.py, eval_linear.py"
    assert out.endswith(f": ready for main_pretrain.py{others}\n")


def test_the_log_says_which_form_was_taken(imagenet, tmp_path, logged):
    for form in ("csv", "shards", "zip"):
        WRITERS[form][0](imagenet, tmp_path)
    open_source(str(tmp_path), "train")
    assert logged == [f"{tmp_path}: train is read from WebDataset shards, not from a list, a zip"]
    assert isinstance(open_source(str(tmp_path), "train", zipped=True), ZipSource)
    copy_folder(imagenet, tmp_path)
    assert isinstance(open_source(str(tmp_path), "train"), FolderSource)


def test_images_without_classes_are_for_pretraining_alone(in_form, tmp_path):
    with pytest.raises(UserError, match="no folder with images in it"):
        open_source(str(in_form("flat")), "train")
    source = open_source(str(in_form("flat") / "train"), "train", labelled=False)
    assert len(source.names) == 24 and set(source.labels) == {0}
    with pytest.raises(UserError, match="no folder val/"):
        open_source(str(in_form("flat") / "train"), "val", labelled=False)
    with pytest.raises(UserError, match="no folder train/"):
        open_source(str(tmp_path), "train", labelled=False)


def test_a_list_beside_imagenets_archive_gives_its_classes(imagenet, in_form, tmp_path):
    archive = in_form("imagenets") / "ILSVRC2012_img_val.tar"
    (tmp_path / archive.name).symlink_to(archive)
    with pytest.raises(UserError, match=r"has no classes: put ILSVRC2012_devkit_t12\.tar\.gz"):
        open_source(str(tmp_path), "val")
    lines = [
        f"ILSVRC2012_val_{number:08}.JPEG {label}\n"
        for number, (_, _, label) in enumerate(files(imagenet, "val"), 1)
    ]
    (tmp_path / "val.txt").write_text("".join(lines))
    source = open_source(str(tmp_path), "val")
    assert isinstance(source, TarSource)
    assert source.labels.tolist() == [0] * 4 + [1] * 3
    (tmp_path / "val.txt").write_text("".join(lines[1:]))
    (tmp_path / archive.name).unlink()
    shutil.copy(archive, tmp_path)
    with pytest.raises(UserError, match="no class is known of ILSVRC2012_val_00000001"):
        open_source(str(tmp_path), "val")


def test_numbers_of_classes_are_numbers_and_no_text(tmp_path):
    """Of twelve classes: as text, 10 comes before 2."""
    for number in range(12):
        folder = tmp_path / f"train/n{number:02}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(image(20 * number))
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(12):
            add(archive, f"ILSVRC2012_val_{number + 1:08}.JPEG", image(20 * number))
    lines = [f"ILSVRC2012_val_{number + 1:08}.JPEG {number}\n" for number in range(12)]
    (tmp_path / "val.txt").write_text("".join(lines))
    train, val = open_splits(DataPath(str(tmp_path)))
    assert train.classes == val.classes == [f"n{number:02}" for number in range(12)]
    for source in (train, val):
        for index, label in enumerate(source.labels.tolist()):
            assert source.read_image(index).getpixel((0, 0))[0] == 20 * label


def test_numbers_from_1_beside_names_are_refused(tmp_path):
    """Each would be the class before."""
    for number, name in enumerate(("ant", "bee", "cat")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(image(number))
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / f"images/{number}.png").write_bytes(image(number))
    (tmp_path / "val.csv").write_text("images/1.png,1\nimages/2.png,2\n")
    with pytest.raises(UserError, match="no image of val has the class number 0, which is ant"):
        open_splits(DataPath(str(tmp_path)))


def test_a_line_of_titles_is_no_image(tmp_path):
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    (tmp_path / "val.csv").write_text("filename,class_id\n0.png,0\n1.png,1\n")
    source = open_source(str(tmp_path), "val")
    assert source.classes == ["0", "1"] and source.labels.tolist() == [0, 1]


def test_pretraining_from_parquet_says_what_an_image_costs(in_form, logged):
    build_pretraining_loader(configured(in_form("parquet")))
    (line,) = logged
    assert "an image read from Parquet costs" in line and "tools.pack_images" in line


def test_without_pyarrow_parquet_is_refused_in_one_line(in_form, monkeypatch):
    monkeypatch.setattr(parquet, "ParquetFile", None)
    with pytest.raises(
        UserError, match=r"needs pyarrow: pip install pyarrow \(extra \[parquet\]\)$"
    ):
        open_source(str(in_form("parquet")), "train")


def image(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def truncated_tar(root: Path) -> None:
    with tarfile.open(root / "train.tar", "w") as archive:
        for name in ("a/0.png", "a/1.png"):
            add(archive, name, image() * 100)
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[: len(content) // 3])


def compressed_tar(root: Path) -> None:
    with tarfile.open(root / "train.tar", "w:gz") as archive:
        add(archive, "a/0.png", image())


def shard(root: Path, **members: bytes) -> None:
    with tarfile.open(root / "train-000000.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name.replace("_", "."), content)


def table(root: Path, **columns) -> None:
    pq.write_table(pa.table(columns), root / "train-00000-of-00001.parquet")


def text(root: Path, name: str, content: str) -> None:
    (root / name).write_text(content)


MISTAKES = {
    "a truncated tar": (truncated_tar, r"train\.tar: cannot read"),
    "a compressed tar": (compressed_tar, r"train\.tar: cannot read"),
    "an empty tar": (lambda r: (r / "train.tar").touch(), r"train\.tar: cannot read"),
    "a shard without labels": (
        lambda r: shard(r, k_png=image()),
        r"train-000000\.tar: k needs a class number in k\.cls",
    ),
    "a label that is a word": (
        lambda r: shard(r, k_png=image(), k_cls=b"cat"),
        r"train-000000\.tar: k needs a class number",
    ),
    "several labels": (
        lambda r: shard(r, k_png=image(), k_json=b'{"label": [1, 2]}'),
        r"train-000000\.tar: k needs a class number",
    ),
    "a member twice": (
        lambda r: shard(r, k_png=image(), k_cls=b"0", k_PNG=image()),
        r"train-000000\.tar: two members are called k\.PNG",
    ),
    "a key with a dot": (
        lambda r: shard(r, k_1_png=image(), k_1_cls=b"0", k_png=image(), k_cls=b"0"),
        r"train-000000\.tar: k\.1\.png has a dot in its key",
    ),
    "only keys with dots": (
        lambda r: shard(r, k_1_png=image(), k_2_png=image(), k_cls=b"0"),
        r"train-000000\.tar: k\.1\.png has a dot in its key",
    ),
    "two labels of a path": (
        lambda r: text(r, "train.txt", "a.jpg 0\nb.jpg 1\na.jpg 1\n"),
        r"train\.txt: a\.jpg has the labels 0 and 1",
    ),
    "a shard without images": (lambda r: shard(r, k_cls=b"1"), "no images in the shards"),
    "other columns": (
        lambda r: table(r, img=[b"x"], label=[0]),
        r"expected the columns image\.bytes and label, found img, label",
    ),
    "no class": (
        lambda r: table(r, image=[{"bytes": b"x", "path": "x"}], label=[-1]),
        "a label is no class number",
    ),
    "no parquet": (
        lambda r: text(r, "train-00000-of-00001.parquet", "PAR1 nothing"),
        r"parquet: cannot read \(Parquet magic",
    ),
    "a line without a label": (
        lambda r: text(r, "train.txt", "a.jpg 0\nb.jpg\n"),
        r"train\.txt:2: expected a path and a label",
    ),
    "a path that leaves": (
        lambda r: text(r, "train.csv", "../a.jpg,0\n"),
        r"train\.csv:1: \.\./a\.jpg lies outside of the data path",
    ),
    "a huge class": (lambda r: text(r, "train.txt", "a.jpg 100000\n"), "100000 is too large"),
    "an empty list": (lambda r: text(r, "train.txt", "\n"), r"train\.txt: lists no images"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path), "train")
    assert "\n" not in str(error.value)


def link(archive, name: str, aim: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, aim
    archive.addfile(member)


def test_a_tar_has_what_unpacking_it_gives(tmp_path):
    """By GNU's tar: hard links, also of a member that comes again; links to later members."""
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, "a/0.png", image(10))
        link(archive, "a/hard.png", "a/0.png", tarfile.LNKTYPE)
        link(archive, "b/soft.png", "../a/1.png", tarfile.SYMTYPE)
        link(archive, "b/again.png", "soft.png", tarfile.SYMTYPE)
        link(archive, "b/gone.png", "absent.png", tarfile.SYMTYPE)
        link(archive, "b/self.png", "self.png", tarfile.SYMTYPE)
        add(archive, "./a/0.png", image(20))
        add(archive, "a/1.png", image(30))
        link(archive, "b/.hidden.png", "a/0.png", tarfile.LNKTYPE)
    packed = open_source(str(tmp_path), "train")
    unpacked = tmp_path / "unpacked/train"
    unpacked.mkdir(parents=True)
    subprocess.run(["tar", "-xf", tmp_path / "train.tar", "-C", unpacked], check=True)
    folder = open_source(str(tmp_path / "unpacked"), "train")
    assert list(packed.names) == [name.removeprefix(f"{unpacked}/") for name in folder.names]
    assert packed.labels.tolist() == folder.labels.tolist()
    for index in range(len(folder.names)):
        assert packed.read(index) == folder.read(index)


def test_an_image_that_a_list_has_and_the_disk_lacks_is_named(tmp_path):
    text(tmp_path, "train.txt", "a.jpg 0\n")
    source = open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match=rf"{tmp_path}/a\.jpg"):
        source.read(0)


def test_an_interrupted_pack_goes_on(imagenet, tmp_path, monkeypatch):
    """Killed after any number of images, within one or between two."""
    source, whole = FolderSource(str(imagenet), "train"), tmp_path / "whole.tar"
    pack_images.pack_tar(source, str(whole))
    content = whole.read_bytes()
    for length in range(0, len(content), len(content) // 25):
        part = tmp_path / "train.tar.part"
        part.write_bytes(content[:length])
        reads = Mock(side_effect=source.read)
        with monkeypatch.context() as patched:
            patched.setattr(source, "read", reads)
            pack_images.pack_tar(source, str(tmp_path / "train.tar"))
        assert (tmp_path / "train.tar").read_bytes() == content
        assert reads.call_count <= 24 + 24 * (1 - length / len(content)) + 2
        assert not part.exists()


def test_a_part_of_other_images_is_not_gone_on_with(imagenet, tmp_path):
    path = str(tmp_path / "train.tar")
    pack_images.pack_tar(FolderSource(str(imagenet), "val"), path)
    os.rename(path, f"{path}.part")
    with pytest.raises(UserError, match="holds other images: remove it to pack anew"):
        pack_images.pack_tar(FolderSource(str(imagenet), "train"), path)


def test_a_disk_that_changes_what_is_written_is_noticed(imagenet, tmp_path, monkeypatch):
    source = FolderSource(str(imagenet), "train")
    path = str(tmp_path / "train.tar")
    honest = source.read
    calls = iter(range(100))
    monkeypatch.setattr(source, "read", lambda i: honest(i) + b" " * (next(calls) == 5))
    with pytest.raises(UserError, match="is not what was packed"):
        pack_images.pack_tar(source, path)
    assert not os.path.exists(path)


def test_classes_that_are_no_folders_are_packed(tmp_path):
    """Labels of a list may hold slashes and dots; their order is kept."""
    write_images(tmp_path / "images", classes=1, images=3)
    lines = "".join(
        f"images/class0/{i}.jpg,{label}\n" for i, label in enumerate(["b/x", ".a", "b/x"])
    )
    (tmp_path / "train.csv").write_text(lines)
    source = open_source(str(tmp_path), "train")
    assert source.classes == [".a", "b/x"]
    pack_images.pack_tar(source, str(tmp_path / "out.tar"))
    packed = TarSource(str(tmp_path), str(tmp_path / "out.tar"))
    assert packed.classes == source.classes and packed.labels.tolist() == [0, 1, 1]
    assert [packed.read(i) for i in range(3)] == [source.read(i) for i in range(3)]


@pytest.mark.slow
def test_a_run_from_a_tar_resumes_as_one_from_the_folder(imagenet, in_form, tmp_path, run_main):
    ends = []
    for root in (imagenet, in_form("packed")):
        output = tmp_path / root.name
        for epochs in ("1", "2"):
            run_main(
                main_pretrain,
                *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", root),
                *("--output", output, "--opts", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4"),
                *("MODEL.ENCODER", "vit_nano", "TRAIN.EPOCHS", epochs, "MODEL.NAME", "run"),
                *("MODEL.CONTRAST_NUM_NEGATIVE", "32", "TRAIN.WARMUP_EPOCHS", "0"),
            )
        state = torch.load(output / "run/default/checkpoint.pth", weights_only=True)
        ends.append(state["model"])
    assert all(value.equal(ends[1][name]) for name, value in ends[0].items())
