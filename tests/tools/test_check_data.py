"""tools/check_data.py: every data set, what is missing and what is bad."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, zip_folder
from PIL import Image

from data.davis import RESOLUTION
from data.transfer import TRANSFER_SETS
from tools import check_data
from tools.make_tiny_davis import write_davis
from tools.make_tiny_retrieval import write_retrieval
from tools.make_tiny_transfer import write_tiny
from utils.errors import UserError


@pytest.fixture
def check(monkeypatch, capsys):
    """Run the tool; returns its lines, and the error at its end or None."""

    def run(*arguments) -> tuple[list[str], str | None]:
        monkeypatch.setattr("sys.argv", ["check_data.py", *map(str, arguments), "--workers", "0"])
        error = None
        try:
            check_data.main()
        except UserError as raised:
            error = str(raised)
        return capsys.readouterr().out.splitlines(), error

    return run


@pytest.fixture
def data(imagenet, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(imagenet, tmp_path / "data"))


def write_set(name: str, root: Path) -> None:
    if name == "davis":
        write_davis(str(root), ["one", "two"], 2, 64, 96)
    elif name in ("roxford5k", "rparis6k"):
        write_retrieval(str(root), name, landmarks=2, size=48)
    else:
        write_tiny(name, str(root))


def test_every_data_set_is_known():
    assert set(check_data.OFFICIAL) == {*TRANSFER_SETS, "davis", "roxford5k", "rparis6k"}
    for name, counts in check_data.OFFICIAL.items():
        assert len(counts) == len(check_data.SPLITS.get(name, check_data.TRAIN_AND_TEST))


# what can use each whole set
ALL = ("main_pretrain.py", "eval_knn.py", "eval_linear.py")
SCRIPTS = {
    **dict.fromkeys(("roxford5k", "rparis6k"), ("eval_retrieval.py",)),
    **{"voc2007": (ALL[0], ALL[2]), "davis": ("eval_video_seg.py",)},
}


@pytest.mark.parametrize("name", check_data.OFFICIAL)
def test_each_data_set_in_its_layout(tmp_path, check, name):
    write_set(name, tmp_path)
    lines, error = check(name, tmp_path)
    assert error is None
    assert lines[-1] == f"{tmp_path}: ready for {', '.join(SCRIPTS.get(name, ALL))}"
    splits = check_data.SPLITS.get(name, check_data.TRAIN_AND_TEST)
    for split, count in zip(splits, check_data.OFFICIAL[name], strict=True):
        (summary,) = [line for line in lines if line.startswith(f"{split}: ")]
        assert summary.endswith(", 0 bad")
        if name in TRANSFER_SETS and name != "imagenet":
            assert f" of {TRANSFER_SETS[name].classes} classes" in summary
        differs = f"{split}: {count} images" not in summary
        warning = f"warning: {split}: the official {name} has {count} images, here are"
        assert differs == any(line.startswith(warning) for line in lines)


@pytest.mark.parametrize("name", check_data.OFFICIAL)
def test_an_empty_folder_is_missing_everything(tmp_path, check, name):
    lines, error = check(name, tmp_path)
    splits = check_data.SPLITS.get(name, check_data.TRAIN_AND_TEST)
    assert [line.split(": ")[:2] for line in lines] == [["missing", split] for split in splits]
    assert all(str(tmp_path) in line for line in lines)
    assert error == f"{tmp_path}: {len(splits)} missing, 0 bad, see above; ready for no script"


@pytest.mark.parametrize("fast", [(), ("--fast",)])
@pytest.mark.parametrize("zipped", [(), ("--zip",)])
def test_bad_images_are_listed(data, tmp_path, check, monkeypatch, zipped, fast):
    (data / "train/class0/3.jpg").write_bytes(b"")
    (data / "train/class1/5.jpg").write_text("no image")
    Image.new("RGB", (50_000, 1)).save(data / "val/class1/1.jpg")
    cut = data / "val/class0/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    root = data
    if zipped:
        root = tmp_path / "zips"
        for split in ("train", "val"):
            zip_folder(data, split, root)
    lines, error = check("imagenet", root, *zipped, *fast)
    bad = [line for line in lines if line.startswith("bad: ")]
    expected = ["train: class0/3.jpg", "train: class1/5.jpg", "val: class1/1.jpg"]
    if not fast:  # the head of a truncated image is in order
        expected.insert(2, "val: class0/2.jpg")
    assert len(bad) == len(expected)
    for line, image in zip(bad, expected, strict=True):
        split, name = image.split(": ")
        assert line.startswith(f"bad: {split}: ") and f"{name}: not a readable image" in line
    assert "train: 24 images of 2 classes, 2 bad" in lines
    assert error.endswith(f"0 missing, {len(expected)} bad, see above; ready for no script")


def test_a_split_without_folder_does_not_hide_the_other(data, check):
    shutil.rmtree(data / "val")
    (data / "train/class1/5.jpg").write_text("no image")
    lines, error = check("imagenet", data)
    missing = f"missing: val: {data}: no folder val/ in the data path, only train/; "
    assert lines[0].startswith(missing)
    assert lines[1].startswith(f"bad: train: {data}/train/class1/5.jpg")
    assert error.endswith("1 missing, 1 bad, see above; ready for no script")


def test_what_is_enough_to_train_on_is_not_enough_to_judge_by(data, tmp_path, check, monkeypatch):
    (data / "val/class0").rename(tmp_path / "class0")
    (data / "train/class0").rename(tmp_path / "class0_of_train")
    lines, error = check("imagenet", data)
    assert error is None and lines[-1] == f"{data}: ready for main_pretrain.py"  # one class
    (tmp_path / "class0_of_train").rename(data / "train/class0")
    (data / "val/class1/1.jpg").write_text("no image")
    assert check("imagenet", data)[1].endswith("0 missing, 1 bad, see above; ready for " + ALL[0])
    (data / "val/class1/1.jpg").unlink()
    (data / "train/class1/1.jpg").write_text("no image")
    assert check("imagenet", data)[1].endswith("see above; ready for no script")
    monkeypatch.setattr(check_data, "DEFAULTS", check_data.DEFAULTS.clone())
    check_data.DEFAULTS.DATA.MAX_BAD_FRACTION = 1 / 24  # of 24 images, pre-training replaces one
    assert check("imagenet", data)[1].endswith("see above; ready for " + ALL[0])
    shutil.rmtree(data / "val")
    assert check("imagenet", data)[1].endswith("1 missing, 1 bad, see above; ready for " + ALL[0])


def test_images_without_classes_are_for_pretraining(data, check):
    lines, error = check("imagenet", data / "train/class0")
    assert error is None and lines[-1] == f"{data}/train/class0: ready for main_pretrain.py"
    assert lines[0] == "warning: train: images without classes are for pre-training alone"


def test_classes_without_training_images_are_listed(data, check):
    (data / "val/class0").rename(data / "val/a_cat")
    lines, error = check("imagenet", data)
    assert any(
        line.startswith("missing: val: ") and "class a_cat is among the validation" in line
        for line in lines
    )
    assert error.endswith("1 missing, 0 bad, see above; ready for main_pretrain.py")


def test_missing_images_of_a_list_are_listed(tmp_path, check):
    write_set("roxford5k", tmp_path)
    images = sorted((tmp_path / "roxford5k/jpg").iterdir())
    images[0].unlink()
    images[-1].unlink()
    lines, error = check("roxford5k", tmp_path)
    bad = [line for line in lines if line.startswith("bad: ")]
    assert [b.split(": ")[2] for b in bad] == [str(images[0]), str(images[-1])]
    assert error.endswith("0 missing, 2 bad, see above; ready for no script")


def test_an_annotation_of_another_size_is_bad(tmp_path, check):
    write_set("davis", tmp_path)
    path = tmp_path / "Annotations" / RESOLUTION / "two/00001.png"
    Image.new("P", (10, 10)).save(path)
    lines, _ = check("davis", tmp_path)
    (bad,) = [line for line in lines if line.startswith("bad: ")]
    assert bad.startswith(f"bad: val: {path}: the annotation has 10 x 10 pixels")


def test_zip_is_for_imagenet_alone(tmp_path, check):
    assert check("cifar10", tmp_path, "--zip")[1] == "--zip is for imagenet, not for cifar10"


@pytest.mark.slow
def test_workers_and_the_exit_code(data):
    """As a user calls it, with workers in processes of their own."""
    command = [sys.executable, "-m", "tools.check_data", "imagenet", str(data), "--workers", "2"]

    def run():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    (data / "train/class1/5.jpg").write_text("no image")
    done = run()
    assert done.returncode == 1
    assert f"bad: train: {data}/train/class1/5.jpg: not a readable image" in done.stdout
    assert (
        done.stderr
        == f"check_data.py: error: {data}: 0 missing, 1 bad, see above; ready for no script\n"
    )
