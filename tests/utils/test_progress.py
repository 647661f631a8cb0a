"""Which checkpoint a run continues from, and what is said of changes; see also test_resume.py."""

import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import NO_SIGNALS

from utils import progress as progress_module
from utils.checkpoint import checkpoint_to_resume, epoch_checkpoints, save_checkpoint
from utils.config import DEFAULTS
from utils.errors import Diverged, UserError
from utils.progress import (
    PAUSE,
    Checkpoints,
    EpochSize,
    Progress,
    all_finite,
    state_bytes,
    warn_of_changes,
    warn_of_settings,
)
from utils.signals import NOT_SAVED

LOGGER = logging.getLogger("progress")
STATE = {"model": {"w": torch.arange(6.0)}, "step": 1}


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
    found = checkpoint_to_resume(config, str(tmp_path), LOGGER)
    assert found == {"own": path, "named": named, None: None}[expected]
    said = f"continuing from the run's own {path}, not from --resume {named}"
    assert (said in caplog.text) == bool(named and expected == "own")
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


@pytest.mark.parametrize("state", [{}, {"config": b"\0"}, {"config": 3, "provenance": "x"}])
def test_a_state_of_another_program_says_nothing_of_settings(caplog, state):
    warn_of_settings(state, "c.pth", DEFAULTS, "digest", LOGGER)
    assert not caplog.text


def keeper(folder, epochs=9, epoch=0, step=0, resumed=None, freq=2, **more) -> Checkpoints:
    config = DEFAULTS.clone()
    config.TRAIN.SAVE_PATIENCE = more.pop("SAVE_PATIENCE", 10.0)
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
    keeper(tmp_path, epoch=epoch, step=step).save(NO_SIGNALS)
    names = sorted(os.listdir(tmp_path))
    assert names == ["checkpoint.pth"] + [f"ckpt_epoch_{epoch}.pth"] * kept
    keeper(tmp_path, epoch=epoch, step=step, keep_epochs=False).save(NO_SIGNALS)
    assert "checkpoint_previous.pth" in os.listdir(tmp_path)


def test_evaluations_keep_no_epochs_and_weights_as_they_are(tmp_path):
    own = keeper(tmp_path, epoch=1, step=4, keep_epochs=False, check_weights=False)
    own.state = lambda: {"model": {"w": torch.tensor([torch.nan])}}
    own.save(NO_SIGNALS)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert own.advice().endswith(f"last good checkpoint, {tmp_path / 'checkpoint.pth'}")
    assert keeper(tmp_path / "x").advice().endswith("last good checkpoint, none so far")
    assert keeper(tmp_path, resumed="r.pth").advice().endswith("last good checkpoint, r.pth")


def test_a_fallback_is_not_overwritten_by_what_was_damaged(tmp_path):
    previous = str(tmp_path / "checkpoint_previous.pth")
    save_checkpoint(STATE | {"step": 1}, previous)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    own = keeper(tmp_path, step=2, resumed=previous)
    own.save(NO_SIGNALS)  # the damaged one goes, the one before stays
    assert torch.load(previous)["step"] == 1
    own.save(NO_SIGNALS)
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


def failing(monkeypatch, times: float):
    """Let the first ``times`` checkpoints fail; gives the list of tries."""
    tries = []

    def save(*given):
        tries.append(given)
        if len(tries) <= times:
            raise OSError(28, "No space left on device")
        save_checkpoint(*given)

    monkeypatch.setattr(progress_module, "save_checkpoint", save)
    monkeypatch.setattr(progress_module.time, "sleep", lambda seconds: None)
    return tries


LAST = {"epoch": 8, "step": 18}


def test_the_last_checkpoint_is_tried_again(tmp_path, monkeypatch, caplog):
    tries = failing(monkeypatch, 3)
    own = keeper(tmp_path, **LAST)
    own.save(NO_SIGNALS)
    assert len(tries) == 4 and own.last_good == str(tmp_path / "checkpoint.pth")
    assert caplog.text.count("make room there: the last good checkpoint is none so far") == 3


def test_another_checkpoint_is_not(tmp_path, monkeypatch):
    tries = failing(monkeypatch, 3)
    own = keeper(tmp_path, epoch=8, step=17)
    own.save(NO_SIGNALS)
    assert len(tries) == 1 and own.last_good is None


@pytest.mark.parametrize(("patience", "count"), [(0.0, 1), (1.0, 60 / PAUSE)])
def test_a_run_without_its_last_checkpoint_ends_badly(tmp_path, monkeypatch, patience, count):
    tries = failing(monkeypatch, math.inf)
    with pytest.raises(SystemExit) as ended:
        keeper(tmp_path, **LAST, SAVE_PATIENCE=patience).save(NO_SIGNALS)
    assert ended.value.code == NOT_SAVED == 74
    assert len(tries) == count


def test_a_signal_ends_the_tries(tmp_path, monkeypatch):
    tries = failing(monkeypatch, math.inf)
    stop = SimpleNamespace(agree=lambda over: (len(tries) == 2, over))
    with pytest.raises(SystemExit) as ended:
        keeper(tmp_path, **LAST).save(stop)
    assert ended.value.code == NOT_SAVED and len(tries) == 2


FAULTS = [
    (OSError(122, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded"),
    (UserError("x.jpg: cannot read"), "x.jpg: cannot read"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a data worker died"),
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
]


@pytest.mark.parametrize(("error", "said"), FAULTS, ids=lambda x: type(x).__name__)
def test_a_fault_between_two_updates_saves_first(tmp_path, error, said):
    own = keeper(tmp_path, step=3)
    with pytest.raises(UserError) as raised, own.saved_on_fault():
        with own.update_under_way():
            own.progress.step = 4
        raise error
    assert str(raised.value).startswith(said)
    assert str(raised.value).endswith("saved after update 4, start again")
    assert (tmp_path / "checkpoint.pth").exists()


@pytest.mark.parametrize(("error", "said"), FAULTS, ids=lambda x: type(x).__name__)
def test_a_fault_within_an_update_saves_nothing(tmp_path, error, said):
    own = keeper(tmp_path, step=3)
    own.save(NO_SIGNALS)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    own.progress.step = 9
    with pytest.raises(UserError) as raised, own.saved_on_fault(), own.update_under_way():
        raise error
    assert str(raised.value).startswith(said)
    assert str(raised.value).endswith(
        "6 updates since the last checkpoint are lost, the last good checkpoint is "
        f"{tmp_path}/checkpoint.pth"
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_fault_saves_no_weights_that_are_not_finite(tmp_path):
    own = keeper(tmp_path, step=3)
    own.save(NO_SIGNALS)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    own.progress.step = 4
    own.state = lambda: {"model": {"w": torch.tensor([1.0, math.nan])}, "step": 4}
    lost = "1 updates since the last checkpoint are lost"
    with pytest.raises(UserError, match=lost), own.saved_on_fault():
        raise OSError(122, "Disk quota exceeded")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_what_has_diverged_is_not_saved_and_a_bug_is_shown(tmp_path, caplog):
    own = keeper(tmp_path)
    own.progress.step = 2
    with pytest.raises(Diverged, match=r"^as it is$"), own.saved_on_fault():
        raise Diverged("as it is")
    assert not os.listdir(tmp_path)
    with pytest.raises(ZeroDivisionError), own.saved_on_fault():
        1 / 0  # noqa: B018
    assert "ZeroDivisionError: saved after update 2, start again" in caplog.text


def test_a_link_to_a_disk_that_is_not_there_stops(tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to(tmp_path / "disk" / "checkpoint.pth")
    save_checkpoint(STATE, str(tmp_path / "checkpoint_previous.pth"))
    with pytest.raises(UserError, match=r"a link to .*/disk/checkpoint\.pth, which is not there"):
        checkpoint_to_resume(DEFAULTS.clone(), str(tmp_path), LOGGER)
