"""The list of images that is kept: what it holds, when it no longer holds, and where it lies."""

import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_forked, spawn
from hypothesis import given
from hypothesis import strategies as st
from image_forms import WRITERS
from safetensors import safe_open

from data import listing
from data.folders import FolderSource
from data.listing import FOLDER, Listing
from data.loader import EpochBatches
from data.opening import open_source
from data.source import PartOfSource
from utils.distributed import all_gather_objects, first_on_each_node
from utils.errors import UserError
from utils.provenance import names_digest

NAME = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=9)


@pytest.fixture(autouse=True)
def keeping(monkeypatch, tmp_path):
    """Keep the list of however few images, and trust what has just changed."""
    monkeypatch.setattr(listing, "WORTH_KEEPING", 1)
    monkeypatch.setattr(listing, "SETTLED", -60)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def root(imagenet, tmp_path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(imagenet, tmp_path / "data", copy_function=os.link))


def listed(root: Path, split: str = "train") -> tuple[list[str], list[int], list[str]]:
    source = FolderSource(str(root), split)
    return list(source.names), source.labels.tolist(), source.classes


def is_read_again(root: Path, monkeypatch) -> bool:
    """Whether the folders are listed, rather than the list that is kept taken."""
    calls = []
    real = os.scandir
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda path: calls.append(path) or real(path))
        listed(root)
    return bool(calls)


@given(st.lists(st.tuples(NAME, st.integers(0, 2**62)), min_size=1, max_size=30))
def test_a_listing_keeps_what_is_added(entries):
    making = Listing(".")
    for name, number in entries:
        making.add([name, f"{name}{name}"], number, place=[number, 7])
    found = making.listed("/top")
    expected = [n for name, _ in entries for n in (name, f"{name}{name}")]
    assert list(found.names) == [f"/top/{name}" for name in expected]
    assert [found.names.short(i) for i in range(len(expected))] == expected
    assert found.labels.tolist() == [number for _, number in entries for _ in range(2)]
    assert found.columns["place"].tolist() == [n for _, number in entries for n in (number, 7)]
    assert names_digest(found.names, "/top") == names_digest(expected, "")


def test_what_is_kept_is_what_is_listed(root, monkeypatch, logged):
    (root / "train/class0" / os.fsdecode(b"caf\xe9 \n.jpg")).write_bytes(b"x")
    (root / "train/class0/Thumbs.db").write_bytes(b"x")
    first = listed(root)
    assert os.listdir(root / FOLDER) == ["train.index"]
    assert not is_read_again(root, monkeypatch)
    assert listed(root) == first
    assert len(set(logged)) == 1 and len(logged) == 3  # what is left out is said each time
    source = FolderSource(str(root), "train")
    assert source.names[-1] == first[0][-1] and source.names[2:5] == first[0][2:5]
    with pytest.raises(IndexError):
        source.names[25]
    assert list(pickle.loads(pickle.dumps(source)).names) == first[0]
    some = PartOfSource(source, [3, 1])
    assert list(some.names) == [first[0][3], first[0][1]] and some.labels.tolist() == [0, 0]
    assert some.names[:1] == [first[0][3]]


CHANGES = {
    "a new image": lambda root: (root / "train/class0/new.jpg").write_bytes(b"x"),
    "an image less": lambda root: (root / "train/class1/3.jpg").unlink(),
    "another name": lambda root: (root / "train/class1/3.jpg").rename(root / "train/class1/4_.jpg"),
    "a new class": lambda root: shutil.copytree(root / "train/class0", root / "train/class00"),
    "a new folder in a class": lambda root: (root / "train/class0/sub").mkdir(),
    "a class less": lambda root: shutil.rmtree(root / "train/class1"),
    "a list of another version": lambda root: (root / FOLDER / "train.index").write_bytes(b"1"),
    "no list": lambda root: (root / FOLDER / "train.index").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(root, monkeypatch, change):
    listed(root)
    change(root)
    with monkeypatch.context() as patched:
        patched.setattr(listing, "WORTH_KEEPING", 10**9)
        assert is_read_again(root, monkeypatch)
        truth = listed(root)
    assert listed(root) == truth  # and is kept
    assert not is_read_again(root, monkeypatch)


def test_a_cut_list_is_made_anew(root, monkeypatch):
    truth = listed(root)
    path = root / FOLDER / "train.index"
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        assert listed(root) == truth
        assert path.read_bytes() == content


def test_folders_that_have_just_changed_are_not_trusted(root, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED", 2.0)
    os.utime(root / "train/class0")
    listed(root)
    assert not (root / FOLDER).exists()
    old = time.time() - 10
    for folder in (root / "train", root / "train/class0", root / "train/class1"):
        os.utime(folder, (old, old))
    listed(root)
    assert (root / FOLDER / "train.index").exists()


def test_few_images_are_not_kept(root, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_KEEPING", 25)
    listed(root)
    assert not (root / FOLDER).exists()


def test_where_the_data_cannot_be_written_the_users_cache_is_used(root, monkeypatch, logged):
    (root / FOLDER).write_bytes(b"")  # in the way, which stops the superuser too
    truth = listed(root)
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).rglob("train.index"))) == 1
    assert not is_read_again(root, monkeypatch) and not logged
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    Path(os.environ["XDG_CACHE_HOME"]).write_bytes(b"")
    assert listed(root) == truth
    (line,) = logged
    assert line.startswith(f"{root}: each process lists the 24 images for itself, as no list")


def test_the_list_moves_with_the_data(root, tmp_path, monkeypatch):
    listed(root)
    root.rename(tmp_path / "moved")
    assert not is_read_again(tmp_path / "moved", monkeypatch)
    assert listed(tmp_path / "moved")[0][0] == f"{tmp_path}/moved/train/class0/0.jpg"


@pytest.mark.parametrize("form", ["packed", "shards", "zip", "text list"])
def test_archives_are_read_again_when_they_change(imagenet, tmp_path, monkeypatch, form):
    WRITERS[form][0](imagenet, tmp_path)
    truth = list(open_source(str(tmp_path), "train").names)
    kept = next((tmp_path / FOLDER).glob("train*.index"))
    before = kept.stat().st_mtime_ns
    assert list(open_source(str(tmp_path), "train").names) == truth
    assert kept.stat().st_mtime_ns == before
    for path in tmp_path.glob("train*"):
        os.utime(path, (1, 1))
    assert list(open_source(str(tmp_path), "train").names) == truth
    assert kept.stat().st_mtime_ns > before


def test_a_new_shard_is_noticed(imagenet, tmp_path):
    WRITERS["shards"][0](imagenet, tmp_path)
    assert len(open_source(str(tmp_path), "train").names) == 24
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "train-000003.tar")
    assert len(open_source(str(tmp_path), "train").names) == 32
    (tmp_path / "train-000003.tar").unlink()
    assert len(open_source(str(tmp_path), "train").names) == 24


def test_other_classes_of_an_archive_are_noticed(tmp_path, imagenet):
    """A kept list must not outlive the list that gave its classes."""
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in (1, 2)]
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for name in names:
            archive.add(imagenet / "val/class0/0.jpg", name)
    for labels in ((0, 1), (1, 0), (0, 1)):
        lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
        (tmp_path / "val.txt").write_text("".join(lines))
        source = open_source(str(tmp_path), "val")
        classes = [source.classes[label] for label in source.labels]
        found = {os.path.basename(n): c for n, c in zip(source.names, classes, strict=True)}
        assert found == {n: str(label) for n, label in zip(names, labels, strict=True)}


def test_another_kind_of_list_is_noticed(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg 0\n")
    assert list(open_source(str(tmp_path), "train").names) == [f"{tmp_path}/a.jpg"]
    (tmp_path / "train.csv").write_text("b.jpg,0\n")  # which goes first
    assert list(open_source(str(tmp_path), "train").names) == [f"{tmp_path}/b.jpg"]


def turns(rank: int, log: str) -> None:
    def call() -> int:
        with open(log, "a") as file:
            file.write(f"{rank}\n")
        return rank

    assert first_on_each_node(call) == rank
    assert all_gather_objects(rank) == [0, 1, 2]
    with pytest.raises(UserError, match="process 0"):
        first_on_each_node(fail_on_first)


def fail_on_first() -> None:
    import torch.distributed as dist

    raise UserError(f"process {dist.get_rank()}")


def test_the_first_of_a_node_lists_before_the_others(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    spawn(local_turns, 3, str(tmp_path / "log"))
    order = (tmp_path / "log").read_text().split()
    assert order[0] == "0" and sorted(order) == ["0", "1", "2"]


def local_turns(rank: int, log: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    turns(rank, log)


def test_an_order_is_drawn_in_little_memory():
    """As one tensor; a list of Python's numbers took 40 bytes and more an image."""
    import tracemalloc

    batches = EpochBatches(1_000_000, 64)
    batches.start_at(3, images_seen=999_936)
    tracemalloc.start()
    (batch,) = list(batches)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batch) == 64 and peak < 1e6
    assert {epoch for epoch, _ in batch} == {3}


@pytest.mark.slow
def test_processes_of_a_run_share_the_list(root, tmp_path):
    """On folders that have settled; each process has the list that the first kept."""
    for folder in ("class0", "class1"):
        for number in range(5000):
            os.link(root / "train" / folder / "0.jpg", root / "train" / folder / f"l{number}.jpg")
    old = time.time() - 10
    for folder in (root / "train", root / "train/class0", root / "train/class1"):
        os.utime(folder, (old, old))
    done = run_forked(
        "main_pretrain.py",
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", root, "--output", tmp_path),
        *("--throughput", "--opts", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4"),
        *("MODEL.ENCODER", "vit_nano", "MODEL.CONTRAST_NUM_NEGATIVE", "32"),
        *("DATA.NUM_WORKERS", "1"),
        processes=2,
    )
    assert done.returncode == 0, done.stdout
    with safe_open(root / FOLDER / "train.index", "np") as kept:
        assert len(kept.get_tensor("labels")) == 10_024
    assert "10024 images" in done.stdout


def test_labels_are_whole_numbers_of_64_bits(root):
    assert FolderSource(str(root), "train").labels.dtype == np.int64
