"""Which checkpoint a run continues from, and what is said of changes; see also test_resume.py."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch

from utils.checkpoint import save_checkpoint
from utils.config import DEFAULTS
from utils.progress import (
    Checkpoints,
    EpochSize,
    Progress,
    all_finite,
    checkpoint_to_resume,
    epoch_checkpoints,
    state_bytes,
    warn_of_changes,
)

LOGGER = logging.getLogger("progress")
STATE = {"model": {"w": torch.arange(6.0)}, "step": 1}


@pytest.mark.parametrize(
    ("named", "restarts", "auto", "own", "expected"),
    [
        ("", "0", True, False, None),
        ("", "0", True, True, "own"),
        ("", "0", False, True, None),
        ("named", "0", True, True, "named"),
        ("named", "0", False, False, "named"),
        ("named", "1", True, True, "own"),
        ("named", "1", True, False, "named"),
        ("named", "2", False, True, "named"),
    ],
)
def test_which_checkpoint_is_continued(tmp_path, monkeypatch, named, restarts, auto, own, expected):
    config = DEFAULTS.clone()
    config.MODEL.RESUME, config.TRAIN.AUTO_RESUME = named, auto
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    path = str(tmp_path / "checkpoint.pth")
    if own:
        save_checkpoint(STATE, path)
    found = checkpoint_to_resume(config, str(tmp_path), LOGGER)
    assert found == {"own": path, "named": "named", None: None}[expected]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    if restarts == "0":
        assert checkpoint_to_resume(config, str(tmp_path), LOGGER) == found


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


def test_what_changed_is_said(caplog):
    progress = Progress(EpochSize(100, 8), 1, 17, 40)
    state = {"images_per_update": 8, "training_images": 100, "step": 9}
    warn_of_changes(state, "c.pth", progress, 0.5, LOGGER)
    warn_of_changes({}, "c.pth", progress, 0.5, LOGGER)  # an older one says nothing of it
    assert not caplog.text
    warn_of_changes(state | {"images_per_update": 4}, "c.pth", progress, 0.5, LOGGER)
    warn_of_changes(state | {"training_images": 90}, "c.pth", progress, 0.5, LOGGER)
    assert [r.getMessage() for r in caplog.records] == [
        "c.pth was written with 4 images an update, now there are 8: update 9 becomes update 17, "
        "and the base rate is 0.5",
        "c.pth was written with 90 images in the data set, now there are 100: the order of epoch 1 "
        "is another, images may come twice",
    ]


def keeper(folder, epochs=9, epoch=0, step=0, resumed=None, freq=2, **more) -> Checkpoints:
    config = DEFAULTS.clone()
    config.SAVE_FREQ, config.TRAIN.EPOCHS = freq, epochs
    run = SimpleNamespace(folder=str(folder), logger=LOGGER)
    progress = Progress(EpochSize(8, 4), epoch, step)
    return Checkpoints(config, run, progress, lambda: STATE | {"step": step}, resumed, **more)


@pytest.mark.parametrize(
    ("epoch", "step", "kept"),
    [
        (0, 2, False),  # the end of epoch 0
        (1, 4, True),
        (1, 3, False),  # within
        (2, 6, False),
        (8, 18, True),  # the last
        (8, 17, False),
    ],
)
def test_which_epochs_are_kept(tmp_path, epoch, step, kept):
    keeper(tmp_path, epoch=epoch, step=step).save()
    names = sorted(os.listdir(tmp_path))
    assert names == ["checkpoint.pth"] + [f"ckpt_epoch_{epoch}.pth"] * kept
    keeper(tmp_path, epoch=epoch, step=step, keep_epochs=False).save()
    assert "checkpoint_previous.pth" in os.listdir(tmp_path)


def test_evaluations_keep_no_epochs_and_weights_as_they_are(tmp_path):
    own = keeper(tmp_path, epoch=1, step=4, keep_epochs=False, check_weights=False)
    own.state = lambda: {"model": {"w": torch.tensor([torch.nan])}}
    own.save()
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert own.advice().endswith(f"last good checkpoint, {tmp_path / 'checkpoint.pth'}")
    assert keeper(tmp_path / "x").advice().endswith("last good checkpoint, none so far")
    assert keeper(tmp_path, resumed="r.pth").advice().endswith("last good checkpoint, r.pth")


def test_a_fallback_is_not_overwritten_by_what_was_damaged(tmp_path):
    previous = str(tmp_path / "checkpoint_previous.pth")
    save_checkpoint(STATE | {"step": 1}, previous)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    own = keeper(tmp_path, step=2, resumed=previous)
    own.save()  # the damaged one goes, the one before stays
    assert torch.load(previous)["step"] == 1
    own.save()
    assert torch.load(previous)["step"] == 2


@pytest.mark.parametrize(
    ("values", "finite"), [([1.0], True), ([torch.inf], False), ([1.0, -torch.inf, 0], False)]
)
def test_finite(values, finite):
    tensors = {"a": torch.ones(2), "b": torch.tensor(values), "n": torch.tensor(3)}
    assert all_finite(tensors) == finite


def test_bytes_of_a_state():
    state = {"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.float64), 7], "c": {"d": (1, "x")}}
    assert state_bytes(state) == 12 + 16
    assert state_bytes({"e": (torch.ones(5, dtype=torch.uint8),)}) == 5
