"""Official archives in miniature, unpacked by the commands of docs/data.md and evaluated."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, figures
from scipy.io import savemat

import eval_knn
import eval_linear
import eval_retrieval
import eval_video_seg
from data.retrieval import DATASETS
from data.transfer import TRANSFER_SETS, open_transfer_set
from tools import sort_val
from tools.make_tiny_davis import write_davis
from tools.make_tiny_retrieval import write_retrieval
from tools.make_tiny_transfer import write_tiny
from utils.errors import UserError

COMMANDS = dict(
    re.findall(
        r"^\*\*(\w+)\*\*.*?\n\n```bash\n(.*?)```",
        (ROOT / "docs/data.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


def is_test(path: Path) -> bool:
    """Of the files of VOC 2007."""
    return "test" in path.name or (path.stem >= "001" and path.suffix == ".jpg")


# the archives of a data set: {name: {path inside: path in the miniature, or (path, which files)}};
# an archive can hold one that was made before it
ARCHIVES: dict[str, dict[str, dict]] = {
    "cifar10": {"cifar-10-python.tar.gz": {"cifar-10-batches-py": "cifar-10-batches-py"}},
    "cifar100": {"cifar-100-python.tar.gz": {"cifar-100-python": "cifar-100-python"}},
    "stl10": {"stl10_binary.tar.gz": {"stl10_binary": "stl10_binary"}},
    "flowers102": {
        "102flowers.tgz": {"jpg": "flowers-102/jpg"},
        "imagelabels.mat": {"": "flowers-102/imagelabels.mat"},
        "setid.mat": {"": "flowers-102/setid.mat"},
    },
    "pets": {
        "images.tar.gz": {"images": "oxford-iiit-pet/images"},
        "annotations.tar.gz": {"annotations": "oxford-iiit-pet/annotations"},
    },
    "food101": {"food-101.tar.gz": {"food-101": "food-101"}},
    "cars": {
        "cars_train.tgz": {"cars_train": "stanford_cars/cars_train"},
        "cars_test.tgz": {"cars_test": "stanford_cars/cars_test"},
        "car_devkit.tgz": {"devkit": "stanford_cars/devkit"},
        "cars_test_annos_withlabels.mat": {"": "stanford_cars/cars_test_annos_withlabels.mat"},
    },
    "caltech101": {
        "101_ObjectCategories.tar.gz": {"101_ObjectCategories": "caltech101/101_ObjectCategories"},
        "caltech-101.zip": {
            "caltech-101/101_ObjectCategories.tar.gz": "101_ObjectCategories.tar.gz",
            "__MACOSX/caltech-101/._101_ObjectCategories.tar.gz": "101_ObjectCategories.tar.gz",
        },
    },
    "dtd": {"dtd-r1.0.1.tar.gz": {"dtd": "dtd/dtd"}},
    "aircraft": {"fgvc-aircraft-2013b.tar.gz": {"fgvc-aircraft-2013b": "fgvc-aircraft-2013b"}},
    "sun397": {
        "SUN397.tar.gz": {"SUN397/a": "SUN397/a", "SUN397/ClassName.txt": "SUN397/ClassName.txt"},
        "Partitions.zip": {
            name: f"SUN397/{name}"
            for name in ("ClassName.txt", "Training_01.txt", "Testing_01.txt")
        },
    },
    "voc2007": {
        "VOCtrainval_06-Nov-2007.tar": {"VOCdevkit": ("VOCdevkit", lambda p: not is_test(p))},
        "VOCtest_06-Nov-2007.tar": {"VOCdevkit": ("VOCdevkit", is_test)},
    },
    "places365": {
        "filelist_places365-standard.tar": {
            name: name
            for name in (
                *("categories_places365.txt", "places365_train_standard.txt"),
                "places365_val.txt",
            )
        },
        "train_256_places365standard.tar": {"data_256": "data_256_standard"},
        "val_256.tar": {"val_256": "val_256"},
    },
    "roxford5k": {
        "oxbuild_images-v1.tgz": {"": "roxford5k/jpg"},
        "gnd_roxford5k.pkl": {"": "roxford5k/gnd_roxford5k.pkl"},
    },
    "rparis6k": {
        "paris_1-v1.tgz": {"paris/defense": ("rparis6k/jpg", lambda p: "_00_" in p.name)},
        "paris_2-v1.tgz": {"paris/louvre": ("rparis6k/jpg", lambda p: "_00_" not in p.name)},
        "gnd_rparis6k.pkl": {"": "rparis6k/gnd_rparis6k.pkl"},
    },
    "davis": {"DAVIS-2017-trainval-480p.zip": {"DAVIS": "davis"}},
}
EVERY = ["imagenet", *ARCHIVES]


def write_archives(made: Path, name: str) -> None:
    """Write the miniature of a data set into ``made``, and its archives beside it."""
    if name == "davis":
        write_davis(str(made / "davis"), ["one", "late"], 4, 64, 96)
    elif name in DATASETS:
        write_retrieval(str(made), name, landmarks=3, size=48)
    else:
        write_tiny(name, str(made))
    if name == "imagenet":
        write_imagenets(made)
    for archive, members in ARCHIVES.get(name, {}).items():
        files = [
            (file, os.path.join(inside, file.relative_to(top)) if file != top else inside)
            for inside, (place, chosen) in (
                (key, value if isinstance(value, tuple) else (value, lambda p: True))
                for key, value in members.items()
            )
            for top in [made / place if (made / place).exists() else made.parent / place]
            for file in sorted(top.rglob("*") if top.is_dir() else [top])
            if file.is_file() and chosen(file)
        ]
        pack(made.parent / archive, files)


def pack(archive: Path, files: list[tuple[Path, str]]) -> None:
    """Write files, each with its name inside; a file that is no archive is copied."""
    assert files, archive
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path, inside in files:
                zipped.write(path, inside)
    elif {".tar", ".tgz"} & set(archive.suffixes):
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for path, inside in files:
                packed.add(path, inside)
    else:
        shutil.copy(files[0][0], archive)


def write_imagenets(made: Path) -> None:
    """A tar of a tar for each class, a tar of validation images, and the development kit."""
    classes = sorted(path.name for path in (made / "train").iterdir())
    tars = []
    for name in classes:
        tar = made / f"{name}.tar"
        pack(tar, [(path, path.name) for path in sorted((made / "train" / name).iterdir())])
        tars.append((tar, tar.name))
    pack(made.parent / "ILSVRC2012_img_train.tar", tars)
    truth = [(i * 7) % len(classes) for i in range(len(classes))]  # not in order
    images = []
    for number, label in enumerate(truth, 1):
        (path,) = (made / "val" / classes[label]).iterdir()
        path = path.rename(path.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
        images.append((path, path.name))
    pack(made.parent / "ILSVRC2012_img_val.tar", images)
    kit = made / "kit"
    kit.mkdir()
    write_kit(kit, [len(classes) - label for label in truth], classes)
    inside = "ILSVRC2012_devkit_t12/data"
    files = [(path, f"{inside}/{path.name}") for path in kit.iterdir()]
    pack(made.parent / "ILSVRC2012_devkit_t12.tar.gz", files)


def write_kit(folder: Path, truth: list[int], classes: list[str]) -> None:
    """Classes are numbered against the order of their names, from 1; a superclass comes last."""
    lines = "".join(f"{number}\n" for number in truth)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children"]
    synsets = np.zeros(len(classes) + 1, [(field, object) for field in fields])
    for i, name in enumerate(reversed(classes)):
        synsets[i] = (i + 1, name, "word", 0)
    synsets[-1] = (len(classes) + 1, "n99999999", "everything", 2)
    savemat(folder / "meta.mat", {"synsets": synsets})


@pytest.fixture
def unpack(tmp_path) -> Callable[[str], tuple[Path, Path]]:
    """The data path that the commands leave, and the folder of the miniature."""

    def run(name: str) -> tuple[Path, Path]:
        made = tmp_path / "made"
        write_archives(made, name)
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", COMMANDS[name]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return tmp_path / "DATA", made

    return run


def evaluate(run_main, name: str, data: Path, output: Path) -> dict:
    """The figures of a data set."""
    module, flags = eval_knn, ["--dataset", name, "--nb-knn", "1", "5"]
    options = ["DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "64"]
    if name == "voc2007":
        module, flags = eval_linear, ["--dataset", name, "--lr", "1.0"]
        options += ["DATA.BATCH_SIZE", "8", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    elif name == "davis":
        module, flags = eval_video_seg, ["--short-side", "64"]
    elif name in DATASETS:
        module, flags = eval_retrieval, ["--dataset", name, "--imsize", "48"]
    run_main(
        *(module, "--cfg", ROOT / "configs/demo.yaml", "--data-path", data, "--output", output),
        *("--random-weights", *flags, "--opts", *options),
    )
    (path,) = output.glob("*/*/*/results.json")
    return figures(path)


def test_every_data_set_has_its_commands():
    assert list(COMMANDS) == EVERY
    assert set(EVERY) == {*TRANSFER_SETS, *DATASETS, "davis"}


@pytest.mark.parametrize("name", TRANSFER_SETS)
def test_unpacked_archives_hold_what_was_packed(unpack, name):
    data, made = unpack(name)
    for split in ("train", "test"):
        found, packed = (open_transfer_set(name, str(root), split) for root in (data, made))
        assert found.classes == packed.classes
        assert np.array_equal(found.labels, packed.labels)
        assert list(map(os.path.basename, found.names)) == list(map(os.path.basename, packed.names))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_unpacked_archives_give_figures(unpack, run_main, tmp_path, name):
    data, made = unpack(name)
    found = evaluate(run_main, name, data, tmp_path / "a")
    if name in TRANSFER_SETS:  # whose images and labels the test above compares
        assert found["dataset"] == name
    else:
        made = made / "davis" if name == "davis" else made
        assert found == evaluate(run_main, name, made, tmp_path / "b")


@pytest.fixture
def kit(tmp_path) -> Path:
    """Three validation images and a kit of two classes."""
    (tmp_path / "kit/data").mkdir(parents=True)
    write_kit(tmp_path / "kit/data", [2, 1, 2], ["n1", "n2"])
    (tmp_path / "val").mkdir()
    for number in (1, 2, 3):
        (tmp_path / f"val/ILSVRC2012_val_{number:08}.JPEG").touch()
    return tmp_path


def sort(monkeypatch, root: Path) -> None:
    arguments = ["sort_val.py", str(root / "val"), str(root / "kit")]
    monkeypatch.setattr(sys, "argv", arguments)
    sort_val.main()


def test_validation_images_go_to_their_classes(kit, monkeypatch, capsys):
    sort(monkeypatch, kit)
    found = sorted(f"{path.parent.name} {path.stem[-1]}" for path in kit.glob("val/*/*"))
    assert found == ["n1 1", "n1 3", "n2 2"]
    assert capsys.readouterr().out == f"3 images sorted into {kit / 'val'}\n"
    with pytest.raises(UserError, match=r"val: holds no ILSVRC2012_val_\*\.JPEG; are they sorted"):
        sort(monkeypatch, kit)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda kit: (kit / "kit/data/meta.mat").unlink(), r"meta\.mat: no such file"),
        (lambda kit: shutil.rmtree(kit / "kit"), r"ground_truth\.txt: no such file"),
        (lambda kit: (kit / "kit/data/meta.mat").write_bytes(b"no"), r"meta\.mat: not the classes"),
        (
            lambda kit: write_kit(kit / "kit/data", [2, 3, 1], ["n1", "n2"]),
            r"ground_truth\.txt: names a class that meta\.mat has not \(3\)",
        ),
        (
            lambda kit: (kit / "val/ILSVRC2012_val_00000004.JPEG").touch(),
            r"val: ILSVRC2012_val_00000004\.JPEG is not among the 3 of the kit",
        ),
    ],
)
def test_a_kit_that_does_not_fit(kit, monkeypatch, spoil, message):
    spoil(kit)
    with pytest.raises(UserError, match=message):
        sort(monkeypatch, kit)
    assert len(list(kit.glob("val/*.JPEG"))) >= 3  # none was moved
