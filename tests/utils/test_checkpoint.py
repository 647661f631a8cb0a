"""Checkpoints: written whole, read without running what they hold."""

import builtins
import errno
import logging
import os
import pickle
import random
import shutil
import subprocess

import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.checkpoint import (
    LATEST,
    PREVIOUS,
    checkpoint_to_resume,
    epoch_checkpoints,
    link_file,
    load_model,
    read_checkpoint,
    read_tensor,
    save_checkpoint,
)
from utils.config import DEFAULTS
from utils.errors import UserError

STATE = {"model": {"w": torch.arange(6000.0), "b": torch.ones(3)}, "config": "A: 1"}


def test_what_is_saved_is_read(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    save_checkpoint({"model": {"w": torch.arange(3.0)}, "step": 7, "config": "A: 1"}, path)
    state = read_checkpoint(path)
    assert state["step"] == 7 and state["config"] == "A: 1"
    assert state["model"]["w"].equal(torch.arange(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


class FullDisk:
    """A file that takes ``room`` bytes, and then says that the disk is full."""

    def __init__(self, path: str, room: int) -> None:
        self.file, self.room = open(path, "xb"), room  # noqa: SIM115
        self.name = path

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content) -> int:
        taken = self.file.write(memoryview(content)[: self.room])
        self.room -= taken
        if taken < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def fill_after(monkeypatch, room: int) -> None:
    def open_full(path, mode="r", *args, **options):
        if mode == "xb" and str(path).endswith(".tmp"):
            return FullDisk(path, room)
        return builtins.open(path, mode, *args, **options)

    monkeypatch.setattr(checkpoint, "open", open_full, raising=False)


def folder_to_resume(folder) -> str | None:
    return checkpoint_to_resume(DEFAULTS.clone(), str(folder), logging.getLogger("synco"))


def test_an_error_after_any_byte_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path, previous = str(tmp_path / LATEST), str(tmp_path / PREVIOUS)
    save_checkpoint(STATE | {"step": 1}, path, previous)
    save_checkpoint(STATE | {"step": 2}, path, previous)
    size = os.path.getsize(path)
    rooms = {0, 1, size - 1, *range(0, size, 211), *range(size - 200, size, 7)}
    for room in sorted(rooms):
        with monkeypatch.context() as patch:
            fill_after(patch, room)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(STATE | {"step": 3}, path, previous)
        assert sorted(os.listdir(tmp_path)) == [LATEST, PREVIOUS], room
        assert read_checkpoint(path)["step"] == 2 and read_checkpoint(previous)["step"] == 1
    assert len(rooms) > 140
    save_checkpoint(STATE | {"step": 3}, path, previous)
    assert [read_checkpoint(p)["step"] for p in (path, previous)] == [3, 2]


def test_a_full_file_system_leaves_the_checkpoint_before(tmp_path):
    """A real one, where the machine lets the test mount it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        path, previous = str(tmp_path / LATEST), str(tmp_path / PREVIOUS)
        for step in (1, 2):
            save_checkpoint(STATE | {"step": step}, path, previous)
        large = STATE | {"step": 3, "more": torch.zeros(40000)}
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(large, path, previous)
        assert sorted(os.listdir(tmp_path)) == [LATEST, PREVIOUS]
        assert read_checkpoint(folder_to_resume(tmp_path))["step"] == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_end_between_any_two_renames_leaves_a_checkpoint(tmp_path, monkeypatch):
    path, previous, also = (str(tmp_path / n) for n in (LATEST, PREVIOUS, "ckpt_epoch_0.pth"))
    save_checkpoint(STATE | {"step": 1}, path, previous)
    replace, seen = os.replace, []

    def replace_and_look(*names):
        seen.append(read_checkpoint(folder_to_resume(tmp_path))["step"])
        replace(*names)
        seen.append(read_checkpoint(folder_to_resume(tmp_path))["step"])

    monkeypatch.setattr(os, "replace", replace_and_look)
    save_checkpoint(STATE | {"step": 2}, path, previous, also)
    assert seen == [1, 1, 1, 1, 1, 2]
    assert [read_checkpoint(p)["step"] for p in (path, previous, also)] == [2, 1, 2]
    save_checkpoint(STATE | {"step": 3}, path, previous)
    assert read_checkpoint(also)["step"] == 2  # a second name of a file that was replaced


def test_without_links_a_copy_is_made(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path, previous = str(tmp_path / LATEST), str(tmp_path / PREVIOUS)
    for step in (1, 2):
        save_checkpoint(STATE | {"step": step}, path, previous)
    link_file(path, str(tmp_path / "ckpt_epoch_0.pth"))
    assert read_checkpoint(previous)["step"] == 1
    assert read_checkpoint(str(tmp_path / "ckpt_epoch_0.pth"))["step"] == 2


def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path):
    """torch alone reads such a file without a word."""
    path = tmp_path / LATEST
    save_checkpoint(STATE, str(path))
    whole = path.read_bytes()
    start = whole.index(STATE["model"]["w"].numpy().tobytes()[:64])
    draw = random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[start + draw.randrange(24000)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert not torch.load(path)["model"]["w"].equal(STATE["model"]["w"])
        with pytest.raises(UserError, match="wrong checksum"):
            read_checkpoint(str(path))


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "zeros", "gone"])
def test_resuming_falls_back_and_says_so(tmp_path, damage, logged):
    save_checkpoint(STATE | {"step": 1}, str(tmp_path / "ckpt_epoch_9.pth"))
    save_checkpoint(STATE | {"step": 2}, str(tmp_path / "ckpt_epoch_10.pth"))
    for step in (3, 4):
        save_checkpoint(STATE | {"step": step}, str(tmp_path / LATEST), str(tmp_path / PREVIOUS))
    names = [LATEST, PREVIOUS, "ckpt_epoch_10.pth", "ckpt_epoch_9.pth"]
    for number, expected in enumerate((4, 3, 2, 1)):
        found = folder_to_resume(tmp_path)
        assert read_checkpoint(found)["step"] == expected
        if number and damage != "gone":
            said = "".join(logged)
            assert names[0] in said and names[number] in said
        path = tmp_path / names[number]
        content = bytearray(path.read_bytes())
        if damage == "bit":
            content[len(content) // 2] ^= 1
        path.unlink()
        if damage != "gone":
            path.write_bytes(
                {"truncated": content[:-500], "empty": b"", "zeros": bytes(len(content))}.get(
                    damage, content
                )
            )
    if damage == "gone":
        assert folder_to_resume(tmp_path) is None
    else:
        with pytest.raises(UserError, match=LATEST):  # rather than to begin anew in silence
            folder_to_resume(tmp_path)


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


@pytest.mark.parametrize(
    ("named", "restarts", "auto", "own", "expected"),
    [
        ("", "0", True, False, None),
        ("", "0", True, True, "own"),
        ("", "0", False, True, None),
        ("named", "0", True, True, "own"),
        ("named", "0", True, False, "named"),
        ("named", "0", False, True, "named"),  # goes back on purpose
        ("named", "1", True, True, "own"),
        ("named", "1", True, False, "named"),
        ("named", "2", False, True, "own"),  # a launcher's restart does not go back again
        ("named", "2", False, False, "named"),
    ],
)
def test_which_checkpoint_is_continued(
    tmp_path, monkeypatch, caplog, named, restarts, auto, own, expected
):
    config = DEFAULTS.clone()
    named = named and str(tmp_path / "named.pth")
    config.MODEL.RESUME, config.TRAIN.AUTO_RESUME = named, auto
    if named:
        save_checkpoint(STATE, named)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    path = str(tmp_path / "checkpoint.pth")
    if own:
        save_checkpoint(STATE, path)
    found = checkpoint_to_resume(config, str(tmp_path), logging.getLogger("synco"))
    assert found == {"own": path, "named": named, None: None}[expected]
    said = f"continuing from the run's own {path}, not from --resume {named}"
    assert (said in caplog.text) == bool(named and expected == "own")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    if restarts == "0":
        assert checkpoint_to_resume(config, str(tmp_path), logging.getLogger("synco")) == found


def test_epochs_come_last_first(tmp_path):
    for name in (
        "ckpt_epoch_9.pth",
        "ckpt_epoch_10.pth",
        "ckpt_epoch_x.pth",
        "ckpt_epoch_3.pth.tmp",
    ):
        (tmp_path / name).touch()
    found = epoch_checkpoints(str(tmp_path))
    assert list(found) == [10, 9] and found[9] == str(tmp_path / "ckpt_epoch_9.pth")


def test_a_link_to_a_disk_that_is_not_there_stops(tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to(tmp_path / "disk" / "checkpoint.pth")
    save_checkpoint(STATE, str(tmp_path / "checkpoint_previous.pth"))
    with pytest.raises(UserError, match=r"a link to .*/disk/checkpoint\.pth, which is not there"):
        checkpoint_to_resume(DEFAULTS.clone(), str(tmp_path), logging.getLogger("synco"))
