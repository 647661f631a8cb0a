"""Features on disk: never of two encoders, and only of kinds that can be used."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

import evaluation.feature_files
from evaluation.feature_files import MANIFEST, dump_features, load_features
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

NAMES = ("trainfeat.pth", "trainlabels.pth")
LOGGER = logging.getLogger("features")


def about(weights="w", key="encoder"):
    provenance = {"weights": weights, "key": key, "epoch": 3, "step": 40}
    return {"protocol": {"image_size": 32}, "provenance": provenance}


def tensors(seed=0):
    torch.manual_seed(seed)
    return dict(zip(NAMES, (torch.randn(6, 4), torch.arange(6) % 2), strict=True))


def load(folder):
    return load_features(str(folder), NAMES, LOGGER)


def test_what_is_dumped_is_loaded_with_what_is_said_of_it(tmp_path, caplog):
    dump_features(str(tmp_path / "a/b"), tensors(), about(key="encoder_k"))
    with caplog.at_level(logging.INFO):
        found, said = load(tmp_path / "a/b")
    for one, other in zip(found, tensors().values(), strict=True):
        assert one.equal(other)
    assert said == about(key="encoder_k")
    assert "features of encoder_k of epoch 3, after update 40" in caplog.text
    assert {p.name for p in (tmp_path / "a/b").iterdir()} == {*NAMES, MANIFEST}
    manifest = json.loads((tmp_path / "a/b" / MANIFEST).read_text())
    assert set(manifest["files"]) == set(NAMES)
    assert manifest["provenance"]["weights"] == "w"


def test_files_without_a_manifest_load_with_a_warning(tmp_path, caplog):
    for name, tensor in tensors().items():
        torch.save(tensor, tmp_path / name)
    found, said = load(tmp_path)
    assert found[0].equal(tensors()[NAMES[0]])
    assert said == {"protocol": {}, "provenance": {}}
    assert "the encoder of these features is unknown" in caplog.text


@pytest.mark.parametrize("moment", range(6))
def test_an_end_at_any_moment_leaves_no_mixture(tmp_path, monkeypatch, moment):
    """Before each rename or removal: the old features whole, the new ones whole, or refused."""
    dump_features(str(tmp_path), tensors(), about("old"))
    left = [moment]

    class Killed(BaseException):
        pass

    def killing(function):
        def call(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*given, **named)

        return call

    with monkeypatch.context() as patch:
        # the mark, the old manifest, two files, the manifest, the mark
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(Path, "unlink", killing(Path.unlink))
        with pytest.raises(Killed):
            dump_features(str(tmp_path), tensors(1), about("new"))
    try:
        found, said = load(tmp_path)
    except UserError as error:
        assert "not finished" in str(error) and moment in (2, 3, 4)
        return
    seed = {"old": 0, "new": 1}[said["provenance"]["weights"]]
    assert all(a.equal(b) for a, b in zip(found, tensors(seed).values(), strict=True))
    assert seed == (moment == 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_encoder_is_refused(tmp_path, name):
    dump_features(str(tmp_path / "a"), tensors(0), about("a"))
    dump_features(str(tmp_path / "b"), tensors(1) | {NAMES[1]: torch.ones(6).long()}, about("b"))
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(UserError, match=rf"{name}: not the \w+ that manifest\.json tells of"):
        load(tmp_path / "a")


def test_two_writers_at_once_leave_no_mixture(tmp_path, monkeypatch):
    """The second replaces a file of the first before the first has written its manifest."""
    saved = []

    def save(tensor, path):
        save_checkpoint(tensor, path)
        if not saved:
            saved.append(path)
            dump_features(str(tmp_path), tensors(1), about("second"))

    monkeypatch.setattr(evaluation.feature_files, "save_checkpoint", save)
    dump_features(str(tmp_path), tensors(0) | {NAMES[1]: torch.zeros(6).long()}, about("first"))
    with pytest.raises(UserError, match="not the features"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', '{"files": {}, "protocol": {}, "provenance": 1}']
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    dump_features(str(tmp_path), tensors(), about())
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of features"):
        load(tmp_path)


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.feature_files, "save_checkpoint", fail)
    with pytest.raises(UserError, match=r"cannot write the features \(No space left"):
        dump_features(str(tmp_path), tensors(), about())
    with pytest.raises(UserError, match="not finished"):
        load(tmp_path)


KINDS = {
    "labels of float": (1, lambda t: t.float()),
    "labels of bool": (1, lambda t: t.bool()),
    "labels of complex": (1, lambda t: t.to(torch.complex64)),
    "negative labels": (1, lambda t: t - 1),
    "huge labels": (1, lambda t: t * 10**12),
    "labels beyond int64": (1, lambda t: t.to(torch.uint64)),
    "sparse labels": (1, lambda t: t.to_sparse()),
    "sparse features": (0, lambda t: t.to_sparse()),
    "integer features": (0, lambda t: t.long()),
    "complex features": (0, lambda t: t.to(torch.complex64)),
    "float8": (0, lambda t: t.to(torch.float8_e4m3fn)),
    "meta": (0, lambda t: t.to("meta")),
    "one stored row": (0, lambda t: t[:1].expand(10**9, 4)),
    "one stored label": (1, lambda t: t[:1].expand(10**9)),
    "nested": (0, lambda t: torch.nested.nested_tensor([t, t[:2]])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_end_in_one_line(tmp_path, kind):
    number, change = KINDS[kind]
    changed = tensors()
    changed[NAMES[number]] = change(changed[NAMES[number]])
    for name, tensor in changed.items():
        torch.save(tensor, tmp_path / name)
    with pytest.raises(UserError, match=NAMES[number]) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_other_precision_become_float32(tmp_path, kind):
    changed = tensors()
    changed[NAMES[0]] = changed[NAMES[0]].to(kind)
    changed[NAMES[1]] = changed[NAMES[1]].to(torch.int8)
    dump_features(str(tmp_path), changed, about())
    features, labels = load(tmp_path)[0]
    assert features.equal(changed[NAMES[0]].float()) and features.dtype == torch.float32
    assert labels.equal(tensors()[NAMES[1]]) and labels.dtype == torch.int64
