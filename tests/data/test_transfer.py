"""Every transfer data set is read from a miniature in the format of its original."""

import collections
import contextlib
import inspect
import os
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from data import transfer
from data.transfer import TRANSFER_SETS, markdown_table, open_transfer_set
from evaluation.classification_metrics import METRICS
from tools.make_tiny_transfer import CALTECH_TRAIN, TEST, TRAIN, WRITERS, colour, write_tiny
from utils.errors import UserError

ARRAYS = ("cifar10", "cifar100", "stl10")
# the class of torchvision that reads a set, and its arguments for a split
TORCHVISION = {
    "cifar10": (datasets.CIFAR10, lambda split: {"train": split == "train"}),
    "cifar100": (datasets.CIFAR100, lambda split: {"train": split == "train"}),
    "stl10": (datasets.STL10, lambda split: {"split": split}),
    "flowers102": (datasets.Flowers102, lambda split: {"split": split}),
    "pets": (datasets.OxfordIIITPet, lambda split: {"split": split}),
    "food101": (datasets.Food101, lambda split: {"split": split}),
    "cars": (datasets.StanfordCars, lambda split: {"split": split}),
    "dtd": (datasets.DTD, lambda split: {"split": split}),
    "aircraft": (datasets.FGVCAircraft, lambda split: {"split": split}),
    "places365": (datasets.Places365, lambda split: {"split": split, "small": True}),
    # these it reads otherwise, but fetches
    "caltech101": (datasets.Caltech101, lambda split: {}),
    "sun397": (datasets.SUN397, lambda split: {}),
    "voc2007": (datasets.VOCDetection, lambda split: {"year": "2007", "image_set": split}),
}
LISTED = [name for name in TORCHVISION if name not in ARRAYS][:7]


every_set = pytest.mark.parametrize("name", TRANSFER_SETS)
downloaded_set = pytest.mark.parametrize(
    "name", [row.name for row in TRANSFER_SETS.values() if row.fetch]
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a miniature, written once."""
    roots = {}

    def root(name):
        if name not in roots:
            roots[name] = str(tmp_path_factory.mktemp(name))
            write_tiny(name, roots[name])
        return roots[name]

    return root


@pytest.fixture
def replaced():
    """Replaces the content of files until the test ends."""
    before = {}

    def replace(path, content):
        before[path] = Path(path).read_bytes()
        Path(path).write_bytes(content)

    yield replace
    for path, content in before.items():
        Path(path).write_bytes(content)


def shown_class(image):
    """The class whose colour the image has."""
    digits = np.asarray(image).mean((0, 1)) // 32
    return int(digits @ [64, 8, 1])


@contextlib.contextmanager
def renamed(path):
    """A file or folder under another name for a while."""
    away = os.path.dirname(path) + ".away"
    os.rename(path, away)
    try:
        yield
    finally:
        os.rename(away, path)


def lists(root):
    """The files that are no images."""
    files = [path for path in Path(root).rglob("*") if path.is_file() and path.name != "tmp"]
    return [path for path in files if path.suffix not in (".jpg", ".JPEG")]


def one_line(error):
    return "\n" not in str(error.value)


def test_the_table_has_the_splits_and_metrics_of_the_protocol():
    assert set(TRANSFER_SETS) == set(WRITERS)
    metrics = collections.defaultdict(set)
    for row in TRANSFER_SETS.values():
        metrics[row.metric].add(row.name)
    assert set(metrics) == set(METRICS)
    assert metrics["mAP"] == {"voc2007"}
    assert metrics["mean_per_class"] == {"flowers102", "pets", "caltech101", "aircraft"}


@every_set
def test_images_labels_and_classes(tiny, name):
    row = TRANSFER_SETS[name]
    seen = set()
    for split, count in (
        ("train", CALTECH_TRAIN if name == "caltech101" else TRAIN),
        ("test", TEST),
    ):
        source = open_transfer_set(name, tiny(name), split)
        classes = 10 if name == "imagenet" else row.classes
        assert len(source.classes) == len(set(source.classes)) == classes
        assert len(source.names) == len(source.labels) == classes * count
        labels = source.labels
        if name == "voc2007":
            expected = np.zeros((len(labels), classes), int)
            own = np.array([shown_class(source.read_image(i)) for i in range(len(labels))])
            expected[range(len(labels)), own] = 1
            expected[range(len(labels)), (own + 1) % classes] = -1  # difficult
            np.testing.assert_array_equal(labels, expected)
            labels = own
        assert labels.dtype == np.int64
        assert collections.Counter(labels.tolist()) == dict.fromkeys(range(classes), count)
        for index in range(0, len(labels), 1 + len(labels) // 400):
            image = source.read_image(index)
            assert image.mode == "RGB"
            assert shown_class(image) == labels[index]
        assert len(set(source.names)) == len(source.names)
        assert not seen & set(source.names)
        seen |= set(source.names)


@every_set
def test_a_source_can_be_sent_to_a_worker(tiny, name):
    source = open_transfer_set(name, tiny(name), "test")
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.names) == list(source.names)
    assert copy.read_image(3).tobytes() == source.read_image(3).tobytes()


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_arrays_are_read_as_torchvision_reads_them(tiny, name, split, monkeypatch):
    dataset, arguments = TORCHVISION[name]
    # a miniature has other checksums
    monkeypatch.setattr(f"{dataset.__module__}.check_integrity", lambda *_: True)
    expected = dataset(tiny(name), **arguments(split))
    source = open_transfer_set(name, tiny(name), split)
    assert source.classes == expected.classes
    assert len(source.names) == len(expected)
    for index, label in enumerate(source.labels):
        image, expected_label = expected[index]
        assert label == expected_label
        np.testing.assert_array_equal(source.read_image(index), image)


def paths(source, root):
    """Names of images as paths below ``root``."""
    return [os.path.relpath(name, root) for name in source.names]


def same(source, root, other, other_root):
    """Whether two sources hold the same images in the same order."""
    return (
        paths(source, root) == paths(other, other_root)
        and np.array_equal(source.labels, other.labels)
        and source.classes == other.classes
    )


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_lists_are_read_as_torchvision_reads_them(tiny, name, split):
    row = TRANSFER_SETS[name]
    source = open_transfer_set(name, tiny(name), split)
    dataset, arguments = TORCHVISION[name]
    unchecked = type("Unchecked", (dataset,), {"_check_integrity": lambda *_: True})
    unchecked.__name__ = dataset.__name__  # which names DTD's folder
    names, labels = [], []
    for part in getattr(row, split).split("+"):
        expected = unchecked(tiny(name), **arguments(part))
        images = next(
            vars(expected)[a]
            for a in ("_image_files", "_samples", "_images", "imgs")
            if a in vars(expected)
        )
        names += [str(image[0] if isinstance(image, tuple) else image) for image in images]
        labels += [expected[index][1] for index in range(len(expected))]
    assert source.names == names
    assert source.labels.tolist() == labels
    assert source.classes == expected.classes


@every_set
def test_lists_from_windows(tiny, name, replaced):
    """With a byte order mark, other ends of lines, and blank lines."""
    root = tiny(name)
    clean = [open_transfer_set(name, root, split) for split in ("train", "test")]
    texts = [path for path in lists(root) if path.suffix in (".txt", ".json")]
    for path in texts:
        text = path.read_text().replace("\n", "\n\n  \n")
        replaced(path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    for split, before in zip(("train", "test"), clean, strict=True):
        assert same(open_transfer_set(name, root, split), root, before, root)
    for path in texts:
        replaced(path, path.read_bytes() + b"\0 \0 \0 \0\n")
        with pytest.raises(UserError) as error:
            for split in ("train", "test"):
                open_transfer_set(name, root, split)
        assert f"{path}:" in str(error.value)
        assert one_line(error)
        path.write_bytes(path.read_bytes()[:-8])


@every_set
def test_hidden_files_change_nothing(tmp_path, name):
    """A double of each file, as macOS makes them, and what else a system leaves in each folder."""
    root = str(tmp_path)
    write_tiny(name, root)
    before = [open_transfer_set(name, root, split) for split in ("train", "test")]
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        for path in [path for path in folder.iterdir() if path.is_file()][:2]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").touch()
        (folder / "Thumbs.db").touch()
        (folder / "@eaDir").mkdir()
    for split, clean in zip(("train", "test"), before, strict=True):
        assert same(open_transfer_set(name, root, split), root, clean, root)


@every_set
def test_the_data_path_may_be_the_sets_own_folder(tiny, name):
    root, row = tiny(name), TRANSFER_SETS[name]
    for place in row.places:
        own = os.path.join(root, place)
        if os.path.exists(own):
            for split in ("train", "test"):
                before, after = (open_transfer_set(name, path, split) for path in (root, own))
                assert same(before, root, after, root)


@every_set
@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_missing_files(tmp_path, name, folder):
    row = TRANSFER_SETS[name]
    (tmp_path / "empty").mkdir()
    root = str(tmp_path / folder)
    with pytest.raises(UserError, match=f"{root}: {name} is not there") as error:
        # nobody can fetch the others
        open_transfer_set(name, root, "train", download=row.fetch is None)
    assert one_line(error)
    assert row.layout in str(error.value)
    assert row.origin in str(error.value)
    how = "--download fetches it" if row.fetch else "fetched by hand"
    assert how in str(error.value)


@every_set
def test_no_data_path(name):
    with pytest.raises(UserError, match="set --data-path") as error:
        open_transfer_set(name, "", "train")
    assert TRANSFER_SETS[name].layout in str(error.value)


@pytest.mark.parametrize("name", [*LISTED, "sun397", "voc2007"])
def test_lists_without_their_images(tiny, name):
    path = open_transfer_set(name, tiny(name), "test").names[0]
    with renamed(path), pytest.raises(UserError, match="is not there") as error:
        open_transfer_set(name, tiny(name), "test")
    assert one_line(error)
    assert path in str(error.value)


@every_set
def test_each_file_is_missed(tiny, name):
    root = tiny(name)
    for path in lists(root):
        with renamed(path), pytest.raises(UserError) as error:
            for split in ("train", "test"):
                open_transfer_set(name, root, split)
        assert one_line(error)
        assert root in str(error.value)


@every_set
def test_an_unreadable_image_names_its_file(tiny, name, replaced):
    for split in ("train", "test"):
        source = open_transfer_set(name, tiny(name), split)
        if not os.path.isfile(source.names[0]):
            # in one array with the others, which the damaged lists below are about
            assert os.path.isfile(source.names[0].split(": ")[0])
            continue
        replaced(source.names[-1], b"\xff\xd8\xff no image")
        with pytest.raises(UserError, match="not a readable image") as error:
            source.read_image(len(source.names) - 1)
        assert one_line(error)
        assert source.names[-1] in str(error.value)


@every_set
@pytest.mark.parametrize("content", [b"", b"\xff\x00 damaged\n", b"a b c d e\n1\n"])
def test_damaged_lists(tiny, name, content, replaced):
    root = tiny(name)
    for path in lists(root):
        original = path.read_bytes()
        replaced(path, content)
        with pytest.raises(UserError) as error:
            for split in ("train", "test"):
                open_transfer_set(name, root, split)
        assert one_line(error), path
        assert root in str(error.value)
        path.write_bytes(original)
    assert lists(root) or name in ("imagenet", "caltech101")


@downloaded_set
def test_download(tmp_path, name, monkeypatch):
    calls = stub_torchvision(monkeypatch, name, lambda root: write_tiny(name, root))
    archives = []
    monkeypatch.setattr(transfer, "download_and_extract_archive", lambda *a: archives.append(a))
    root = str(tmp_path / "new")
    source = open_transfer_set(name, root, "train", download=True)
    assert len(source.names) >= 2 * len(source.classes)
    parts = TRANSFER_SETS[name].train.split("+")
    arguments = TORCHVISION[name][1]
    expected = [arguments(part) for part in parts]
    if name.startswith("cifar"):  # all lies in one archive, which the default split unpacks
        expected = [{}]
    assert calls == expected
    assert len(archives) == (name == "sun397")
    open_transfer_set(name, root, "test", download=True)
    assert len(calls) == len(parts)  # all is there: nothing is fetched


@downloaded_set
def test_a_failed_download(tmp_path, name, monkeypatch):
    def fail(root):
        raise urllib.error.URLError("no\nroute")

    stub_torchvision(monkeypatch, name, fail)
    with pytest.raises(UserError, match=f"the download of {name} failed.*no route") as error:
        open_transfer_set(name, str(tmp_path), "train", download=True)
    assert one_line(error)
    assert TRANSFER_SETS[name].origin in str(error.value)


def stub_torchvision(monkeypatch, name, fetch):
    """Let torchvision's class call ``fetch`` to download; returns its arguments by call."""
    dataset, calls = TORCHVISION[name][0], []
    signature = inspect.signature(dataset.__init__)

    def init(self, root, *given, download=False, **named):
        bound = signature.bind(self, root, *given, download=download, **named).arguments
        assert download
        calls.append({k: v for k, v in bound.items() if k not in ("self", "root", "download")})
        fetch(root)

    monkeypatch.setattr(dataset, "__init__", init)
    return calls


def test_caltech_draws_the_same_thirty_images_every_time(tiny):
    source = open_transfer_set("caltech101", tiny("caltech101"), "test")
    left = [os.path.basename(name) for name in source.names[:4]]
    assert left == ["image_0013.jpg", "image_0006.jpg", "image_0009.jpg", "image_0011.jpg"]
    assert source.classes[0] == "BACKGROUND_Google"


def test_caltech_needs_its_background_class(tiny):
    folder = os.path.join(tiny("caltech101"), "caltech101", "101_ObjectCategories")
    background = os.path.join(folder, "BACKGROUND_Google")
    with renamed(background), pytest.raises(UserError, match=r"has 102 classes .* 101 classes"):
        open_transfer_set("caltech101", tiny("caltech101"), "train")


def test_images_of_other_formats_than_their_names_say(tiny, replaced):
    source = open_transfer_set("pets", tiny("pets"), "train")
    path = Path(tiny("pets")) / "image.gif"
    Image.new("P", (8, 6), 3).save(path)
    replaced(source.names[0], path.read_bytes())
    assert source.read_image(0).mode == "RGB"
    assert source.read_image(0).size == (8, 6)


class Touch:
    """Pickles as a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name, file",
    [("cifar10", "cifar-10-batches-py/data_batch_3"), ("cifar100", "cifar-100-python/meta")],
)
def test_a_hostile_batch_is_not_run(tiny, tmp_path, name, file, replaced):
    victim = tmp_path / "victim"
    path = os.path.join(tiny(name), file)
    replaced(path, pickle.dumps({"data": Touch(victim)}))
    with pytest.raises(UserError, match="not a pickle of plain data") as error:
        open_transfer_set(name, tiny(name), "train")
    assert path in str(error.value)
    assert not victim.exists()


def test_a_label_outside_the_classes(tiny, replaced):
    labels = os.path.join(tiny("stl10"), "stl10_binary", "train_y.bin")
    replaced(labels, bytes([11] + [1] * 19))
    with pytest.raises(UserError, match="labels, from 0 to 10"):
        open_transfer_set("stl10", tiny("stl10"), "train")


def test_parts_of_a_split_must_agree_on_the_classes(tmp_path):
    write_tiny("dtd", str(tmp_path))
    listing = tmp_path / "dtd" / "dtd" / "labels" / "train1.txt"
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"classes of the parts of train\+val differ"):
        open_transfer_set("dtd", str(tmp_path), "train")


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown data set 'cifar': choose one of imagenet, cifar"):
        open_transfer_set("cifar", "data", "train")
    with pytest.raises(ValueError, match="train or test"):
        open_transfer_set("cifar10", "data", "val")


def test_the_table_in_markdown():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(TRANSFER_SETS)
    assert len({line.count(" | ") for line in lines}) == 1
    for line, row in zip(lines[2:], TRANSFER_SETS.values(), strict=True):
        for cell in (row.name, row.origin, row.train, row.test, str(row.classes), row.metric):
            assert cell in line


def test_the_tool_that_writes_miniatures(tmp_path):
    command = [sys.executable, "-m", "tools.make_tiny_transfer", "stl10", tmp_path]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert len(open_transfer_set("stl10", str(tmp_path), "train").names) == 10 * TRAIN


def test_every_class_has_a_colour():
    colours = {tuple(colour(label)) for label in range(400)}
    assert len(colours) == 400
