"""Checkpoints: written whole, read without running what they hold."""

import pickle

import pytest
import torch
from torch import nn

from utils.checkpoint import (
    latest_checkpoint,
    load_model,
    read_checkpoint,
    read_tensor,
    save_checkpoint,
)
from utils.errors import UserError


def test_what_is_saved_is_read(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    assert latest_checkpoint(str(tmp_path)) is None
    save_checkpoint({"model": {"w": torch.arange(3.0)}, "step": 7, "config": "A: 1"}, path)
    state = read_checkpoint(latest_checkpoint(str(tmp_path)))
    assert state["step"] == 7 and state["config"] == "A: 1"
    assert state["model"]["w"].equal(torch.arange(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_failing_write_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"step": 1}, str(path))

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"step": 2}, str(path))
    assert read_checkpoint(str(path))["step"] == 1


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "kind", ["none", "empty", "text", "truncated", "hostile", "pickle", "list"]
)
def test_what_is_no_checkpoint_is_named(tmp_path, kind, capsys):
    path = tmp_path / "checkpoint.pth"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello " * 100)
    elif kind == "truncated":
        save_checkpoint({"w": torch.randn(1000)}, str(path))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "hostile":
        torch.save({"model": Hostile()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif kind == "list":
        torch.save([1], path)
    with pytest.raises(UserError, match=r"checkpoint\.pth: ") as error:
        read_checkpoint(str(path))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_tensor_file(tmp_path):
    path = str(tmp_path / "features.pth")
    save_checkpoint(torch.eye(2), path)
    assert read_tensor(path).equal(torch.eye(2))
    save_checkpoint({}, path)
    with pytest.raises(UserError, match="expected a Tensor, found a dict"):
        read_tensor(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "Missing.*bias"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)}, "Unexp.*x"),
        ({"weight": torch.zeros(4, 3), "bias": torch.zeros(2)}, "size mismatch for weight"),
    ],
)
def test_another_model_is_named(state, message):
    with pytest.raises(UserError, match=f"c.pth: checkpoint of another model .*{message}"):
        load_model(nn.Linear(3, 2), state, "c.pth")
