"""--subset: a balanced draw, a published list, and what the scripts make of either."""

import argparse
import collections
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

import eval_knn
import eval_linear
from data.folders import FolderSource
from data.subset import add_subset_argument, subset_suffix, take_subset
from utils.errors import UserError


def source_of(labels):
    labels = np.asarray(labels)
    names = [f"/data/{i}.jpg" for i in range(len(labels))]
    return SimpleNamespace(names=names, labels=labels, classes=list("abcdefgh"))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.floats(0.001, 1),
    seed=st.integers(0, 5),
)
def test_a_share_is_drawn_equally_from_each_class(counts, share, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(range(len(counts)), counts))
    part = take_subset(source_of(labels), share, seed)
    each = max(1, round(share * len(labels) / len(counts)))
    found = collections.Counter(part.labels.tolist())
    assert found == {label: min(count, each) for label, count in enumerate(counts)}
    numbers = [int(name[6:-4]) for name in part.names]
    assert numbers == sorted(set(numbers))
    assert part.labels.tolist() == labels[numbers].tolist()


def test_the_seed_alone_decides_and_shares_are_nested():
    source = source_of(np.arange(4000) % 8)
    one, same, other = (list(take_subset(source, 0.1, seed).names) for seed in (0, 0, 1))
    assert one == same != other
    assert set(take_subset(source, 0.01, 0).names) < set(one)
    # drawn, and not the first of each class
    assert np.mean([int(name[6:-4]) for name in one]) == pytest.approx(2000, rel=0.15)


def test_one_per_cent_of_imagenet_has_13_images_a_class():
    """As SimCLR's list: 12.8 on average."""
    labels = np.repeat(range(1000), 1281)
    assert len(take_subset(source_of(labels), 0.01, 0).names) == 13_000


def test_images_with_several_labels_are_drawn_without_classes():
    part = take_subset(source_of(np.eye(40, 8, dtype=np.int64)), 0.25, 0)
    assert part.labels.shape == (10, 8)


def test_a_list_names_the_images(imagenet, tmp_path):
    """The numbers of the fixture's images are those of both classes, so links have other names."""
    for label in ("0", "1"):
        folder = tmp_path / f"data/train/n{label}"
        folder.mkdir(parents=True)
        for number in range(4):
            target = imagenet / f"train/class{label}/{number}.jpg"
            (folder / f"n{label}_{number}.JPEG").symlink_to(target)
    (tmp_path / "1percent.txt").write_text("n1_3.JPEG\r\nn0_2.JPEG\n\n")
    source = FolderSource(str(tmp_path / "data"), "train")
    part = take_subset(source, str(tmp_path / "1percent.txt"), 0)
    assert [name.split("/")[-1] for name in part.names] == ["n0_2.JPEG", "n1_3.JPEG"]
    assert part.labels.tolist() == [0, 1]
    assert part.read_image(1).tobytes() == source.read_image(7).tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.jpg\n99.jpg\n", "99.jpg is none of the training images"),
        ("", "names no images"),
        (None, r"no such file"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        take_subset(source_of([0, 1]), str(path), 0)


def test_a_name_of_two_images_is_refused(tmp_path, imagenet):
    (tmp_path / "list.txt").write_text("0.jpg\n")  # of either class
    with pytest.raises(UserError, match="1 names fit 2 training images"):
        take_subset(FolderSource(str(imagenet), "train"), str(tmp_path / "list.txt"), 0)


@pytest.mark.parametrize(
    ("given", "value", "suffix"),
    [
        ("0.01", 0.01, "_subset_0.01"),
        ("1", 1.0, "_subset_1"),
        ("a/1percent.txt", "a/1percent.txt", "_subset_1percent"),
    ],
)
def test_the_flag(given, value, suffix):
    parser = argparse.ArgumentParser()
    add_subset_argument(parser)
    assert parser.parse_args(["--subset", given]).subset == value
    assert subset_suffix(value) == suffix
    for wrong in ("0", "-1", "1.5", "nan"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--subset", wrong])


OPTS = ["DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "2", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "1"]
OPTS += ["MODEL.ENCODER", "vit_nano", "MODEL.NAME", "run", "TRAIN.WARMUP_EPOCHS", "0"]
SCRIPTS = {
    "knn": (eval_knn, ["--nb-knn", 1], [], "knn_imagenet"),
    "probe": (eval_linear, ["--lr", 1], [], "linear_imagenet_linprob"),
    "finetune": (eval_linear, [], ["LINEAR_EVAL.WEIGHTS", "finetune"], "linear_imagenet_ft"),
}


@pytest.mark.parametrize(("module", "flags", "opts", "name"), SCRIPTS.values(), ids=SCRIPTS)
def test_the_scripts_train_on_the_subset(
    run_main, imagenet, tmp_path, module, flags, opts, name, logged
):
    run_main(
        module,
        *("--cfg", ROOT / "configs/moby_vit_tiny.yaml", "--data-path", imagenet),
        *("--output", tmp_path, "--random-weights", "--subset", "0.25", *flags),
        *("--opts", *OPTS, *opts),
    )
    results = tmp_path / f"run/default/{name}_subset_0.25/results.json"
    images = json.loads(results.read_text())["provenance"]["data"]["images"]
    assert images == {"train": 6, "test": 7}
