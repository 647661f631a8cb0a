"""What lies beside images and is none of them, in folders and in lists."""

import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest
from helpers import zip_folder
from torchvision.datasets import ImageFolder

import eval_knn
from data.folders import FolderSource
from data.image import read_file
from data.listing import Listing, is_hidden, list_classes, list_images, read_lines
from data.opening import open_source
from data.zips import ZipSource
from logger import create_logger
from utils.errors import UserError


def listed(source) -> tuple[list[str], list[int]]:
    return list(source.names), source.labels.tolist()


def classes_of(folder: Path) -> tuple[list[str], list[str], list[int]]:
    listing = Listing(str(folder))
    list_classes(str(folder), listing)
    found = listing.listed(str(folder))
    return found.classes, list(found.names), found.labels.tolist()


LATIN_1 = os.fsdecode(b"caf\xe9.jpg")


@pytest.fixture
def folder(imagenet, tmp_path) -> Path:
    """A copy of the training images that a test may litter."""
    return Path(shutil.copytree(imagenet / "train", tmp_path / "data" / "train"))


def copy_to(name: str):
    def litter(folder: Path) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "class0/0.jpg", target)

    return litter


def named_pipe(folder: Path) -> None:
    os.mkfifo(folder / "class0/pipe.jpg")


def named_socket(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder / "class0")  # a socket's path may have about 100 letters
    try:
        socket.socket(socket.AF_UNIX).bind("socket.jpg")
    finally:
        os.chdir(here)


def link(name: str, aim: str):
    return lambda folder: (folder / name).symlink_to(aim)


LITTER = {
    "checkpoints of a notebook": copy_to(".ipynb_checkpoints/0-checkpoint.jpg"),
    "an empty hidden folder": lambda folder: (folder / ".ipynb_checkpoints").mkdir(),
    "checkpoints within a class": copy_to("class1/.ipynb_checkpoints/0-checkpoint.jpg"),
    "a double of macOS": copy_to("class0/._0.jpg"),
    "an archive's double of macOS": copy_to("__MACOSX/class0/0.jpg"),
    "thumbnails of Windows": copy_to("class0/Thumbs.db"),
    "a folder's settings": copy_to("class1/.DS_Store"),
    "a file beside the classes": copy_to("index.jpg"),
    "previews of a NAS": copy_to("class0/@eaDir/0.jpg"),
    "previews as a class": copy_to("@eaDir/0.jpg"),
    "what a file system found": lambda folder: (folder / "lost+found").mkdir(mode=0),
    "an empty class": lambda folder: (folder / "class00").mkdir(),
    "a class of texts": lambda folder: copy_to("class00/notes.txt")(folder),
    "a link to nowhere": link("class0/gone.jpg", "absent.jpg"),
    "a link to itself": link("class0/self.jpg", "self.jpg"),
    "a class that links nowhere": link("class00", "absent"),
    "a link to a device": link("class0/null.jpg", "/dev/zero"),
    "a link to the folder above": link("class0/again", ".."),
    "a pipe": named_pipe,
    "a socket": named_socket,
}


@pytest.mark.parametrize("litter", LITTER.values(), ids=LITTER)
def test_litter_is_left_out_and_counted_in_one_line(folder, litter, logged):
    clean = FolderSource(str(folder.parent), "train")
    assert not logged
    litter(folder)
    source = FolderSource(str(folder.parent), "train")
    assert listed(source) == listed(clean)
    assert source.classes == ["class0", "class1"]
    (line,) = logged
    assert line.startswith(f"{folder}: left out: 1 ")


def test_folders_of_runs_are_not_searched(folder, logged):
    """Beside the classes, and within one; a configuration without a checkpoint is no run."""
    clean = listed(FolderSource(str(folder.parent), "train"))
    for place in ("class0/output/run", "run"):
        copy_to(f"{place}/pictures/0.jpg")(folder)
        copy_to(f"{place}/0.jpg")(folder)
        (folder / place / "config.json").write_text("{}")
        (folder / place / "checkpoint.pth").write_bytes(b"x")
    assert listed(FolderSource(str(folder.parent), "train")) == clean
    assert "2 folders of a run" in logged[-1]
    (folder / "class0/output/run/checkpoint.pth").unlink()
    assert len(FolderSource(str(folder.parent), "train").names) == len(clean[0]) + 2


@pytest.mark.parametrize(
    ("place", "taken"), [("..", "data, other"), ("train", "class0, class1"), (".", None)]
)
def test_a_wrong_folder_is_warned_of(folder, logged, place, taken):
    (folder.parent.parent / "other").mkdir()
    root = os.path.join(folder.parent, place)
    found = open_source(root, "train", labelled=False)
    lines = [line for line in logged if "taken as" in line]
    if taken is None:
        assert not lines and found.classes == ["class0", "class1"]
        return
    (line,) = lines
    assert f"all 24 images below it are taken as one class, whatever their folders ({taken}" in line
    meant = line.rsplit("did you mean ")[1].rstrip("?")
    assert os.path.samefile(meant, folder.parent)


def test_splits_that_would_be_classes_are_warned_of(folder, logged):
    folder.rename(folder.parent.parent / "images")
    folder.mkdir(parents=True)
    shutil.move(folder.parent.parent / "images", folder / "train")
    assert FolderSource(str(folder.parent), "train").classes == ["train"]
    assert f"is the data path {folder}?" in logged[-1]


def test_one_line_counts_everything(folder, logged):
    for litter in (named_pipe, *(copy_to(f"class0/.{i}.jpg") for i in range(3))):
        litter(folder)
    FolderSource(str(folder.parent), "train")
    assert logged == [f"{folder}: left out: 3 hidden, 1 pipes, devices or links to no file"]


def test_links_to_an_image_and_to_a_class_are_what_they_lead_to(folder, tmp_path):
    shutil.move(folder / "class1", tmp_path / "elsewhere")
    (folder / "class1").symlink_to(tmp_path / "elsewhere")
    (folder / "class0/link.jpg").symlink_to("0.jpg")
    classes, paths, labels = classes_of(folder)
    assert classes == ["class0", "class1"]
    assert labels == [0] * 13 + [1] * 12
    assert str(folder / "class0/link.jpg") in paths


NAMES = ("a b.jpg", "a\nb.jpg", 'it\'s "so".jpg', "new\r\nline.JPG", "Ünï.jpeg", LATIN_1, "-.png")


def test_the_order_is_that_of_torchvision(folder):
    """Of folders in a class too, and of names that are odd."""
    for name in NAMES:
        for place in ("class0", "class0/sub", "class0/sub-b", "class0/sub/deeper", "odd\n'class"):
            copy_to(f"{place}/{name}")(folder)
    classes, paths, labels = classes_of(folder)
    expected = ImageFolder(folder, loader=str)
    assert classes == expected.classes
    assert list(zip(paths, labels, strict=True)) == expected.samples
    source = FolderSource(str(folder.parent), "train")
    for index in range(len(paths)):
        assert source.read_image(index).mode == "RGB"


@pytest.mark.parametrize("place", [".", "class0"])
def test_a_folder_that_may_not_be_read_is_no_empty_one(folder, monkeypatch, place):
    locked = os.path.normpath(folder / place)
    real = os.scandir

    def scandir(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the superuser may read everything
    with pytest.raises(UserError, match="Permission denied") as error:
        FolderSource(str(folder.parent), "train")
    assert str(error.value).startswith(f"{locked}: ")


def test_nothing_but_litter(tmp_path):
    (tmp_path / "train/class0").mkdir(parents=True)
    (tmp_path / "train/class0/gone.jpg").symlink_to("absent")
    with pytest.raises(UserError, match=r"train: no folder with images in it, but left out: 1 "):
        FolderSource(str(tmp_path), "train")


def test_images_that_are_not_sorted_into_classes(tmp_path):
    (tmp_path / "val").mkdir()
    for number in (1, 2):
        (tmp_path / f"val/ILSVRC2012_val_0000000{number}.JPEG").touch()
    with pytest.raises(UserError, match=r"but left out: 2 beside the class folders"):
        FolderSource(str(tmp_path), "val")


def test_hidden_names():
    assert all(map(is_hidden, (".git", "._a.jpg", "Thumbs.db", "THUMBS.DB", "@eaDir", "__MACOSX")))
    assert not any(map(is_hidden, ("a.jpg", "thumbs.db.jpg", "_a", "@home", "lost")))


def test_reasons_add_up_over_folders(folder):
    left_out = Counter({"hidden": 5})
    copy_to("class0/.a.jpg")(folder)
    assert len(list_images(str(folder / "class0"), left_out)) == 12
    assert left_out == {"hidden": 6}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_no_pipe_or_device_is_read(tmp_path, make):
    path = str(tmp_path / "x.jpg")
    make(path)
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image \(no regular file"):
        read_file(path)


def figures(run_main, data: Path, output: Path, *more: str) -> str:
    run_main(
        *(eval_knn, "--cfg", "configs/demo.yaml", "--data-path", data, "--output", output),
        *("--random-weights", "--nb-knn", "1", "5", "--batch-size", "8", *more),
        *("--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"),
    )
    (results,) = output.glob("*/*/knn_imagenet/results.json")
    return results.read_text().split('"provenance"')[0]


def test_the_figures_with_litter_are_those_without(imagenet, tmp_path, run_main):
    littered = Path(shutil.copytree(imagenet, tmp_path / "littered"))
    for litter in LITTER.values():
        for split in ("train", "val"):
            shutil.rmtree(littered / split / "class00", ignore_errors=True)
            if (littered / split / "class00").is_symlink():
                (littered / split / "class00").unlink()
            if not (littered / split / ".ipynb_checkpoints").exists():
                litter(littered / split)
    clean = figures(run_main, imagenet, tmp_path / "a")
    assert figures(run_main, littered, tmp_path / "b") == clean
    (log,) = (tmp_path / "b").glob("*/*/knn_imagenet/log_rank0.txt")
    lines = [line for line in log.read_text().splitlines() if "left out: " in line]
    assert [line.split(": left out")[0].rsplit("/", 1)[1] for line in lines] == ["train", "val"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\n", [(1, "a"), (2, "b")]),
        (b"\xef\xbb\xbfa\nb", [(1, "a"), (2, "b")]),
        (b"a\r\n\r\n  \r\nb c\r\n", [(1, "a"), (4, "b c")]),
        (b"a\rb", [(1, "a"), (2, "b")]),
        ("é\u2028x\n".encode(), [(1, "é\u2028x")]),  # no end of a line to a file system
        (b"", []),
    ],
)
def test_the_lines_of_a_list(tmp_path, content, lines):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    assert list(read_lines(str(path))) == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\0\n", r"list\.txt:3: holds a NUL byte"),
        (b"caf\xe9", r"list\.txt: not a UTF-8 text"),
        ("a\n".encode("utf-16"), r"list\.txt: not a UTF-8 text"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_lines(str(path)))


def test_a_list_of_a_zip_from_windows_and_with_hidden_files(folder, tmp_path, logged):
    zip_folder(folder.parent, "train", tmp_path)
    clean = ZipSource(str(tmp_path), "train")
    listing = tmp_path / "train_map.txt"
    lines = listing.read_text().splitlines()
    lines[3:3] = ["", ".ipynb_checkpoints/0.jpg\t2", "class0/._0.jpg\t0", "Thumbs.db\t0"]
    listing.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    source = ZipSource(str(tmp_path), "train")
    assert listed(source) == listed(clean)
    assert source.classes == clean.classes
    assert source.read(5) == clean.read(5)
    assert logged == [f"{tmp_path}/train.zip: left out: 3 hidden"]


def test_the_log_takes_names_that_are_no_text(tmp_path, capsys):
    logger = create_logger(str(tmp_path), 0)
    logger.info("%s is bad", LATIN_1)
    assert "caf\\udce9.jpg is bad" in (tmp_path / "log_rank0.txt").read_text()
    assert "caf\\udce9.jpg is bad" in capsys.readouterr().out
