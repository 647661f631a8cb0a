"""A data path that is wrong: one line, with what was meant."""

import pytest
from helpers import write_images

from data.davis import read_videos
from data.loader import build_pretraining_loader
from data.opening import DataPath, open_source, open_splits
from data.retrieval import read_ground_truth
from utils.config import DEFAULTS, with_values
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "imagenet/train", images=2)
    write_images(tmp_path / "imagenet/val", images=2)
    return tmp_path


def said(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "open_it",
    [
        lambda path: open_source(path, "train"),
        lambda path: read_ground_truth(path, "roxford5k"),
        read_videos,
    ],
)
def test_the_nearest_path_is_named(root, open_it):
    wrong = f"{root}/imagnet"
    line = f"{wrong}: the data path does not exist or is no folder, did you mean {root}/imagenet?"
    assert said(open_it, wrong) == line
    wrong += "/deeper/"
    assert said(open_it, wrong).endswith(f"or is no folder, did you mean {root}/imagenet?")
    assert said(open_it, f"{root}/zzz").endswith("does not exist or is no folder")


def test_a_relative_path_and_a_file(root, monkeypatch):
    monkeypatch.chdir(root)
    assert said(open_source, "imgenet", "train").endswith(", did you mean imagenet?")
    (root / "imagenet/all.tar").write_bytes(b"")
    line = said(open_source, "imagenet/all.tar", "train")
    assert line.endswith("is no folder, did you mean imagenet?")


@pytest.mark.parametrize(
    ("given", "split", "hint"),
    [
        ("imagenet/train", "train", ", did you mean {root}/imagenet?"),
        ("imagenet/val", "val", ", did you mean {root}/imagenet?"),
        (".", "train", ", did you mean {root}/./imagenet?"),
    ],
)
def test_one_folder_too_deep_or_too_high(root, given, split, hint):
    line = said(open_source, f"{root}/{given}", split)
    assert line.endswith(f"no folder {split}/ in the data path{hint.format(root=root)}")


@pytest.mark.parametrize("labelled", [True, False])
def test_val_without_train(root, labelled):
    (root / "imagenet/train").rename(root / "elsewhere")
    line = said(open_source, f"{root}/imagenet", "train", False, labelled)
    assert ", only val/; `python -m tools.split_images` makes both" in line


def test_one_class_is_enough_to_train_on_but_not_to_judge_by(tmp_path, process_group):
    for split in ("train", "val"):
        write_images(tmp_path / split, classes=1, images=4)
    values = {"DATA.DATA_PATH": str(tmp_path), "DATA.BATCH_SIZE": 2, "AUG.SSL_AUG": True}
    config = with_values(DEFAULTS, values | {"DATA.NUM_WORKERS": 0})
    assert len(build_pretraining_loader(config)) == 2
    line = said(open_splits, DataPath.of(config))
    assert line == (
        f"{tmp_path}: the training images are of one class alone, class0: lay them out as "
        "train/<class>/<image>"
    )
