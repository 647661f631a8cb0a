"""Files and arguments damaged at random end in one line of error or in a correct result.

The cases are the same in each run, and their number is printed at the end. For others:
``FUZZ_EXAMPLES=10000 FUZZ_RANDOM=1 pytest tests/test_fuzz.py``; a failure prints how to repeat it.
"""

import io
import json
import pickle
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzzing import CASES, IMAGES, damage, fuzz, outcome
from helpers import ROOT, zip_folder
from hypothesis import given
from hypothesis import strategies as st
from image_forms import WRITERS

from data import opencv
from data.augmentation import view_augmentations
from data.dataset import TwoViews
from data.folders import FolderSource
from data.image import decode_rgb
from data.opening import open_source
from data.retrieval import read_ground_truth
from data.transfer import open_transfer_set
from data.zips import ZipSource
from evaluation.features import check_features
from tools.make_tiny_retrieval import write_retrieval
from tools.make_tiny_transfer import write_tiny
from utils.arguments import parse_arguments
from utils.checkpoint import read_checkpoint, read_tensor, save_checkpoint
from utils.config import DEFAULTS, KEYS, load_config, to_json
from utils.errors import UserError
from utils.unpickle import load_plain_pickle

RECIPE = ROOT / "configs/synco_vit_tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def report(request):
    """Say how many cases were tried."""
    yield
    parts = ", ".join(f"{count} {name}" for name, count in CASES.items())
    plugins = request.config.pluginmanager
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        line = f"\nfuzzing tried {CASES.total()} cases: {parts}"
        plugins.get_plugin("terminalreporter").write_line(line)


# ---- configuration

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
NAMES = st.sampled_from([*DEFAULTS, *KEYS])


def complete(config) -> bool:
    """Whether all keys are there with values that ``config.json`` can hold."""
    here = (reduce(getitem, key.split("."), config) for key in KEYS)  # an error, if one is not
    return len(list(here)) == len(KEYS) and bool(json.loads(to_json(config)))


@fuzz(300)
@given(content=damage(RECIPE.read_bytes()))
def test_damaged_configuration_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(content)
    config = outcome("configuration files", load_config, str(path))
    assert config is None or complete(config)


@fuzz(200)
@given(content=st.dictionaries(NAMES, VALUES, max_size=3), nested=st.booleans())
def test_configuration_files_of_any_values(tmp_path_factory, content, nested):
    if nested:
        sections: dict = {}
        for key, value in content.items():
            section, _, name = key.partition(".")
            sections[section] = {name: value} if name else value
        content = sections
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = outcome("configuration files", load_config, str(path))
    assert config is None or complete(config)


def test_a_configuration_of_nested_references_is_quickly_refused(tmp_path):
    """Written out, it would be 10^12 values."""
    levels = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 13))
    path = tmp_path / "c.yaml"
    for value in (f"[&a0 [1], {levels}]", "&a [*a, *a]"):
        for key in ("TRAIN: {EPOCHS: %s}", "TRAIN: %s", "BASE: %s", "MODEL: {OPTIONS: {q: %s}}",
                    "AUG: {AUTO_AUGMENT: %s}", "AUG: {CUTMIX_MINMAX: %s}"):  # fmt: skip
            path.write_text(key % value)
            with pytest.raises(UserError, match="stands for more than 10000 values") as raised:
                load_config(str(path))
            assert len(str(raised.value)) < 300


@fuzz(300)
@given(
    opts=st.lists(
        st.tuples(
            NAMES | st.text(max_size=8),
            st.text(max_size=10) | VALUES.map(repr) | st.sampled_from(["nan", "1e400", "-1", "[["]),
        ),
        max_size=3,
    )
)
def test_any_opts(opts):
    flat = [text for pair in opts for text in pair]
    argv = ["--cfg", str(RECIPE), *(["--opts", *flat] if flat else [])]
    parsed = outcome("command lines", parse_arguments, "fuzz", None, argv)
    assert parsed is None or complete(parsed[1])


# ---- lists and archives


@pytest.fixture(scope="module")
def zips(imagenet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zips")
    zip_folder(imagenet, "train", folder)
    return folder


MAP = b"".join(b"class0/%d.jpg\t%d\n" % (i, i % 3) for i in range(12))


@fuzz(300)
@given(content=damage(MAP) | st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_damaged_map_files(zips, content):
    (zips / "val.zip").exists() or (zips / "val.zip").symlink_to(zips / "train.zip")
    (zips / "val_map.txt").write_bytes(content)
    source = outcome("map files", ZipSource, str(zips), "val")
    if source is not None:
        assert len(source.names) == len(source.labels) > 0
        assert max(source.labels) < len(source.classes) <= 100_000
        assert all(source.read(index) for index in range(len(source.names)))


@fuzz(200)
@given(data=st.data())
def test_damaged_zips(zips, imagenet, data):
    content = (zips / "train.zip").read_bytes()
    broken = zips / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "train_map.txt").write_bytes((zips / "train_map.txt").read_bytes())
    (broken / "train.zip").write_bytes(data.draw(damage(content)))
    source = outcome("zips", ZipSource, str(broken), "train")
    if source is not None:
        originals = FolderSource(str(imagenet), "train")
        for index in range(0, 24, 5):
            read = outcome("members of zips", source.read, index)
            assert read is None or read == originals.read(index)


@pytest.fixture(scope="module")
def forms(imagenet, tmp_path_factory):
    """A file of each form, as the damage starts from it."""
    root = tmp_path_factory.mktemp("forms")
    for name in ("packed", "tar", "shards", "parquet"):
        (root / name).mkdir()
        WRITERS[name][0](imagenet, root / name)
    return root


FORM_FILES = {
    "packed": "train.tar",
    "tar": "train.tar",
    "shards": "train-000001.tar",
    "parquet": "data/train-00000-of-00002-0a1b2c3d4e5f6071.parquet",
}


@pytest.mark.parametrize("form", FORM_FILES)
@fuzz(120)
@given(data=st.data())
def test_damaged_archives(forms, form, data):
    path = forms / form / FORM_FILES[form]
    whole = forms / f"{form}.whole"
    if not whole.exists():
        whole.write_bytes(path.read_bytes())
    path.write_bytes(data.draw(damage(whole.read_bytes())))
    source = outcome("archives", open_source, str(forms / form), "train")
    if source is not None:
        assert len(source.names) == len(source.labels) > 0
        assert source.labels.max() < len(source.classes)
        for index in range(0, len(source.names), 7):
            outcome("members of archives", source.read, index)


CSV = b"path,label\r\n" + b"".join(b'"all/a, %d.jpg",cat%d\r\n' % (i, i % 3) for i in range(9))
TXT = b"".join(b"/all/a %d.jpg %d\n" % (i, i % 3) for i in range(9))


@pytest.mark.parametrize(("name", "text"), [("train.csv", CSV), ("train.txt", TXT)])
@fuzz(200)
@given(data=st.data())
def test_damaged_lists_of_images(tmp_path_factory, name, text, data):
    folder = tmp_path_factory.getbasetemp() / "lists"
    folder.mkdir(exist_ok=True)
    content = data.draw(
        damage(text) | st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
    )
    (folder / name).write_bytes(content)
    source = outcome("lists of images", open_source, str(folder), "train")
    (folder / name).unlink()
    if source is not None:
        assert len(source.names) == len(source.labels) > 0
        assert source.labels.max() < len(source.classes) <= 100_000


# ---- pickles


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    return Path(write_retrieval(str(tmp_path_factory.mktemp("fuzz")), landmarks=2, size=32))


@fuzz(300)
@given(data=st.data())
def test_damaged_ground_truth(truth, tmp_path_factory, data):
    content = (truth / "gnd_roxford5k.pkl").read_bytes()
    folder = tmp_path_factory.getbasetemp() / "damaged" / "roxford5k"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gnd_roxford5k.pkl").write_bytes(data.draw(damage(content)))
    found = outcome("pickles", read_ground_truth, str(folder.parent), "roxford5k")
    if found is not None:
        assert len(found.queries) == len(found.labels) == len(found.boxes)
        for labels in found.labels:
            assert all((v >= 0).all() and (v < len(found.database)).all() for v in labels.values())


def test_a_ground_truth_of_nested_references_is_quickly_refused(tmp_path):
    many: list = [1]
    for _ in range(12):
        many = [many] * 10
    good = {"easy": [0], "hard": [], "junk": [], "bbx": [0, 0, 9, 9]}
    whole = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [good]}
    (tmp_path / "roxford5k").mkdir()
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(whole, 2))
    assert outcome("pickles", read_ground_truth, str(tmp_path), "roxford5k").queries == ["q"]
    changes = [{key: many} for key in whole] + [{"imlist": [many]}, {"gnd": [many]}]
    changes += [{"gnd": [good | {key: many}]} for key in good]
    for change in changes:
        path.write_bytes(pickle.dumps(whole | change, 2))
        assert outcome("pickles", read_ground_truth, str(tmp_path), "roxford5k") is None


@fuzz(200)
@given(content=st.binary(max_size=40), protocol=st.integers(0, 5))
def test_pickles_of_any_bytes(tmp_path_factory, content, protocol):
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(content if protocol < 2 else b"\x80" + bytes([protocol]) + content + b".")
    outcome("pickles", load_plain_pickle, str(path))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    write_tiny("cifar10", str(folder))
    return folder


@fuzz(150)
@given(data=st.data())
def test_damaged_cifar(cifar, data):
    path = cifar / "cifar-10-batches-py" / "test_batch"
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damage(content)))
        source = outcome("pickles", open_transfer_set, "cifar10", str(cifar), "test")
        if source is not None:
            assert source.read_image(0).size == (32, 32)
            assert len(source.names) == len(source.labels) == len(source.pixels)
    finally:
        path.write_bytes(content)


# ---- images


@fuzz(800)
@given(content=st.sampled_from(IMAGES).flatmap(damage) | st.binary(max_size=100))
def test_damaged_images(content):
    for decode in (decode_rgb, opencv.decode_array):
        image = outcome("images", decode, content, "image")
        if image is not None:
            array = np.asarray(image)
            assert array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
            assert array.size


class OneBad:
    """A source whose first of four images is damaged."""

    names = ["bad", "1", "2", "3"]  # noqa: RUF012
    labels = np.arange(4)

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, index: int) -> bytes:
        return IMAGES[index] if index else self.content


@pytest.mark.parametrize("backend", ["opencv", "pil"])
@fuzz(150)
@given(content=st.sampled_from(IMAGES[:4]).flatmap(damage))
def test_views_of_damaged_images(backend, content):
    views = TwoViews(OneBad(content), view_augmentations("byol", 0.08), 16, 0, backend)
    one, two, replaced, *_ = outcome("views", views.__getitem__, (0, 0))
    assert one.shape == two.shape == (16, 16, 3)
    assert replaced in (-1, 0)


# ---- checkpoints and features


def checkpoint() -> bytes:
    generator = torch.Generator().manual_seed(0)
    state = {
        "model": {f"layer{i}": torch.randn(7, 5, generator=generator) for i in range(3)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "config": "TRAIN: {EPOCHS: 3}",
        "step": 17,
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


CHECKPOINT = checkpoint()


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@fuzz(400)
@given(content=damage(CHECKPOINT))
def test_damaged_checkpoints(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "checkpoint.pth"
    path.write_bytes(content)
    state = outcome("checkpoints", read_checkpoint, str(path))
    if state is not None:
        assert equal(state, torch.load(io.BytesIO(CHECKPOINT), weights_only=True))
    assert path.read_bytes() == content


def test_checkpoints_survive_their_own_fuzz(tmp_path):
    """What was not damaged is read, so that the test above can fail."""
    state = torch.load(io.BytesIO(CHECKPOINT), weights_only=True)
    save_checkpoint(state, str(tmp_path / "c.pth"))
    assert equal(read_checkpoint(str(tmp_path / "c.pth")), state)
    state["step"] += 1
    assert not equal(read_checkpoint(str(tmp_path / "c.pth")), state)


@fuzz(200)
@given(data=st.data())
def test_damaged_features(tmp_path_factory, data):
    features = torch.arange(60.0).reshape(12, 5)
    file = io.BytesIO()
    torch.save(features, file)
    path = tmp_path_factory.getbasetemp() / "trainfeat.pth"
    path.write_bytes(data.draw(damage(file.getvalue())))
    read = outcome("feature files", read_tensor, str(path))
    assert read is None or equal(read, features)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@fuzz(150)
@given(
    value=st.lists(st.integers(0, 4), max_size=3).map(torch.zeros)
    | st.sampled_from([torch.tensor([[1.0, float("nan")]]), torch.zeros(2, 3).to_sparse()])
    | st.sampled_from([torch.zeros(2, 3, dtype=d) for d in (torch.complex64, torch.bool)])
    | VALUES
)
def test_feature_files_of_other_things(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "other.pth"
    try:
        torch.save(value, path)
    except (pickle.PicklingError, OverflowError):
        return
    read = outcome("feature files", read_tensor, str(path))
    if read is not None:
        outcome("feature files", check_features, read, torch.zeros(2), "training")
