"""Train names the classes, whatever the forms of train and val: every pair, and odd names."""

import ast
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, SOURCES
from image_forms import add
from PIL import Image

from data.opening import DataPath, open_splits
from tools import pack_images
from utils.errors import UserError

# the classes of train, and those of val, in the order of their names
CLASSES = {
    "alike": (["ant", "bee", "cat"], ["ant", "bee", "cat"]),
    "fewer": (["ant", "bee", "cat"], ["bee", "cat"]),
    "the first alone": (["ant", "bee", "cat"], ["ant"]),
    "unicode": (["a b", "Ünï", "日本"], ["Ünï", "日本"]),
    "numbers": (["10", "9"], ["9"]),
    "numbers from 0": (["0", "1", "2"], ["0", "2"]),
    "numbers with zeros": (["00", "01", "02"], ["00", "02"]),
    "years": (["1999", "2001", "2024"], ["2001", "2024"]),
}
EACH = 2  # images of a class


def content(name: str, number: int, split: str) -> bytes:
    """An image whose colour is its class's."""
    colour = (sum(name.encode()) % 251, len(name.encode()), 100 * (split == "val") + number)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


Files = list[tuple[str, int, int, bytes]]  # class, its number in train, number in the class


def files(train: list[str], names: list[str], split: str) -> Files:
    return [
        (name, train.index(name), number, content(name, number, split))
        for name in names
        for number in range(EACH)
    ]


def write_folders(root: Path, split: str, images: Files) -> None:
    for name, _, number, png in images:
        path = root / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    for odd in ("empty", ".hidden"):
        (root / split / odd).mkdir()
    (root / split / ".hidden/0.png").write_bytes(images[0][3])


def write_tar(root: Path, split: str, images: Files) -> None:
    with tarfile.open(root / f"{split}.tar", "w") as archive:
        for name, _, number, png in images:
            add(archive, f"./{split}/{name}/{number}.png", png)


def write_shards(root: Path, split: str, images: Files) -> None:
    with tarfile.open(root / f"{split}-000000.tar", "w") as archive:
        for _, label, number, png in images:
            add(archive, f"{label}_{number}.png", png)
            add(archive, f"{label}_{number}.cls", str(label).encode())


def write_parquet(root: Path, split: str, images: Files) -> None:
    rows = [{"image": {"bytes": png, "path": None}, "label": label} for _, label, _, png in images]
    pq.write_table(pa.Table.from_pylist(rows), root / f"{split}-00000-of-00001.parquet")


def write_named_parquet(root: Path, split: str, images: Files) -> None:
    """With the names of its own split alone."""
    names = sorted({name for name, *_ in images})
    label = {"names": names, "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": label}}}).encode()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    rows = [
        {"image": {"bytes": png, "path": None}, "label": names.index(name)}
        for name, _, _, png in images
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), root / f"{split}-00000-of-00001.parquet")


def write_list(root: Path, split: str, images: Files, numbered: bool = False) -> None:
    """As Windows and a spreadsheet write it, with a mark, quotes and a line of titles."""
    lines = ["file,species"]
    for name, label, number, png in images:
        path = root / "all" / f"{split}, {label} {number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        lines.append(f'"all/{path.name}","{label if numbered else name}"')
    (root / f"{split}.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())


def write_numbers(root: Path, split: str, images: Files) -> None:
    write_list(root, split, images, numbered=True)


def write_text(root: Path, split: str, images: Files) -> None:
    """With tabs, and spaces in paths and labels."""
    lines = []
    for name, label, number, png in images:
        path = root / "all" / f"{split} {label} {number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        lines.append(f"/all/{path.name}\t{name}\n")
    (root / f"{split}.txt").write_text("".join(lines))


def write_zip(root: Path, split: str, images: Files) -> None:
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for name, _, number, png in images:
            archive.writestr(f"{name}/{number}.png", png)
    lines = [f"{name}/{number}.png\t{label}\n" for name, label, number, _ in images]
    (root / f"{split}_map.txt").write_text("".join(lines))


NAMED = (write_folders, write_tar, write_named_parquet, write_list, write_text)
NUMBERED = (write_shards, write_parquet, write_numbers, write_zip)
WRITERS = {write.__name__: write for write in (*NAMED, *NUMBERED)}


def colours(source) -> list[tuple[int, ...]]:
    pixels = [source.read_image(i).getpixel((0, 0)) for i in range(len(source.names))]
    return [pixel[:2] for pixel in pixels]


def check(train, val, train_names, val_names) -> None:
    """Whether a class has one number in both splits, and every image is there."""
    number = dict(zip(colours(train), train.labels.tolist(), strict=True))
    assert len(train.labels) == EACH * len(train_names) == EACH * len(number)
    assert len(set(number.values())) == len(train_names)
    assert len(val.labels) == EACH * len(val_names)
    assert [number[colour] for colour in colours(val)] == val.labels.tolist()
    assert train.classes == val.classes
    assert val.labels.dtype == np.int64


# numbers that are names, beside numbers that count: both readings fit, or neither
UNDECIDED = {"the class numbers", "no image of val has the class number 0"}


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("of_val", WRITERS)
@pytest.mark.parametrize("of_train", WRITERS)
def test_every_pair_of_forms_numbers_the_classes_alike(tmp_path, of_train, of_val, classes):
    train_names, val_names = classes
    WRITERS[of_train](tmp_path, "train", files(train_names, train_names, "train"))
    WRITERS[of_val](tmp_path, "val", files(train_names, val_names, "val"))
    mixed = (WRITERS[of_train] in NAMED) != (WRITERS[of_val] in NAMED)
    try:
        train, val = open_splits(DataPath(str(tmp_path)))
    except UserError as error:
        # val's numbers without 0 could count from 1; numbers need all names of val to name train
        assert mixed or val_names[0].isdecimal(), error
        assert any(words in str(error) for words in UNDECIDED | {"has no training image"})
        assert val_names != train_names or val_names[0].isdecimal()
        return
    check(train, val, train_names, val_names)


@pytest.mark.parametrize("to_zip", [False, True])
@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("write", WRITERS)
def test_a_pack_keeps_the_numbers(tmp_path, write, classes, to_zip, monkeypatch):
    train_names, val_names = classes
    (tmp_path / "data").mkdir()
    WRITERS[write](tmp_path / "data", "train", files(train_names, train_names, "train"))
    WRITERS[write](tmp_path / "data", "val", files(train_names, val_names, "val"))
    arguments = [str(tmp_path / "data"), str(tmp_path / "out"), *(["--zip"] if to_zip else [])]
    monkeypatch.setattr("sys.argv", ["pack_images", *arguments])
    pack_images.main()
    before = open_splits(DataPath(str(tmp_path / "data")))
    after = open_splits(DataPath(str(tmp_path / "out"), zipped=to_zip))
    check(*after, train_names, val_names)
    for one, other in zip(before, after, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert colours(one) == colours(other)


def test_what_may_open_a_split():
    """Outside data/, nobody says which split to open: there, val is numbered by train."""
    doors = {"DataPath", "open_train", "open_splits", "open_present", "add_dataset_arguments"}
    closed = {"data.folders", "data.lists", "data.shards", "data.parquet", "data.zips"}
    found = 0
    for path in SOURCES:
        if path.is_relative_to(ROOT / "data"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                found += node.module == "data.opening"
                assert node.module != "data.opening" or names <= doors, path
                assert node.module not in closed, path
                assert not names & {"open_transfer_set", "open_source"}, path
                assert node.module != "data.tars" or "TarSource" not in names, path
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {*closed, "data.opening"}, path
    assert found > 4
