"""What happens between two updates: checkpoints, faults, and what is said of changes."""

import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import session_of

from utils import session as session_module
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.config import with_values
from utils.errors import Diverged, UserError
from utils.progress import EpochSize, Progress
from utils.run import Run
from utils.session import PAUSE, Kind, Session, all_finite
from utils.signals import NOT_SAVED, RESUMABLE

LOGGER = logging.getLogger("session")
CPU = torch.device("cpu")


class Lines:
    """Stands for the log."""

    def bar(self, updates):
        return updates

    def line(self, *figures) -> list:
        return [0]


def changes(tmp_path, caplog, state, size=(100, 8), provenance=None, **keys) -> list[str]:
    """What is said of a checkpoint that the run goes on from."""
    session = session_of(tmp_path, 17, size, **keys)
    run = Run("", CPU, session.run.precision, LOGGER, session.config, {"TRAIN.BASE_LR": 0.5},
              provenance or {})  # fmt: skip
    caplog.clear()
    place = Progress(EpochSize(*size), 1, 17, 40)
    session_module.warn_of_changes(Checkpoint("c.pth", state), place, run, Kind().uses)
    return caplog.messages


def test_what_changed_is_said(tmp_path, caplog):
    state = {"images_per_update": 8, "training_images": 100, "step": 9}
    assert not changes(tmp_path, caplog, state)
    assert not changes(tmp_path, caplog, {})  # an older one says nothing of it
    assert changes(tmp_path, caplog, state | {"images_per_update": 4}) == [
        "c.pth was written with 4 images an update, now there are 8: update 9 becomes update 17, "
        "and the base rate is 0.5"
    ]
    assert changes(tmp_path, caplog, state | {"training_images": 90}) == [
        "c.pth was written with 90 images in the data set, now there are 100: the order of epoch 1 "
        "is another, images may come twice"
    ]


def test_every_setting_of_a_training_is_compared_and_no_other(tmp_path, caplog):
    """As each key says what it matters to; one of an older version had the default."""
    before = session_of(tmp_path).run.effective
    written = before.dump()
    for key, other, said in (
        ("MODEL__CONTRAST_TEMPERATURE", 0.07, True),
        ("TRAIN__OPTIMIZER__BETAS", (0.9, 0.95), True),
        ("DATA__BACKEND", "pil", True),
        ("SEED", 1, True),
        ("TRAIN__KNN_FREQ", 3, False),
        ("DATA__NUM_WORKERS", 3, False),
        ("AMP_OPT_LEVEL", "bfloat16", False),  # keep_precision says it
        ("AUG__MIXUP", 0.1, False),
    ):
        derived = {"config": written.replace("BASE_LR: 0.0005", "BASE_LR: 0.5")}
        lines = changes(tmp_path, caplog, derived, **{key: other})
        name = key.replace("__", ".")
        assert bool(lines) == said, (name, lines)
        if said:
            now = list(other) if isinstance(other, tuple) else other
            assert len(lines) == 1 and f"{name} " in lines[0] and f", now {now}" in lines[0]


def test_arguments_of_a_method_that_come_or_go_are_said(tmp_path, caplog):
    without = session_of(tmp_path).run.effective.dump().replace("BASE_LR: 0.0005", "BASE_LR: 0.5")
    given = without.replace("OPTIONS: {}", "OPTIONS:\n    margin: 1")
    for config, keys, said in (
        (given, {}, "MODEL.OPTIONS.margin 1, now None"),
        (without, {"MODEL__OPTIONS__margin": 2}, "MODEL.OPTIONS.margin None, now 2"),
        (given, {"MODEL__OPTIONS__margin": 2}, "MODEL.OPTIONS.margin 1, now 2"),
    ):
        (line,) = changes(tmp_path, caplog, {"config": config}, **keys)
        assert line.endswith(f"other settings: {said}")
    assert not changes(tmp_path, caplog, {"config": given}, MODEL__OPTIONS__margin=1)


@pytest.mark.parametrize("state", [{}, {"config": b"\0"}, {"config": 3, "provenance": "x"},
                                   {"config": "[" * 9999}])  # fmt: skip
def test_a_state_of_another_program_says_nothing_of_settings(tmp_path, caplog, state):
    assert not changes(tmp_path, caplog, state, provenance={"data": {"digest": "d"}})


def test_other_images_are_noticed(tmp_path, caplog):
    state = {"provenance": {"data": {"digest": "one"}}}
    assert not changes(tmp_path, caplog, state, provenance={"data": {"digest": "one"}})
    (line,) = changes(tmp_path, caplog, state, provenance={"data": {"digest": "two"}})
    assert "other images: their names or labels differ" in line


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (2, None),  # the end of epoch 0
        (4, 1),
        (3, None),  # within
        (6, None),
        (18, 8),  # the last
        (17, None),
    ],
)
def test_which_epochs_are_kept(tmp_path, step, kept):
    session_of(tmp_path, step).save()
    names = sorted(os.listdir(tmp_path))
    own = [] if kept is None else [f"ckpt_epoch_{kept}.pth"]
    assert names == ["checkpoint.pth", *own]
    session_of(tmp_path, step, kind=Kind(keep_epochs=False)).save()
    assert "checkpoint_previous.pth" in os.listdir(tmp_path)


def test_evaluations_keep_no_epochs_and_weights_as_they_are(tmp_path):
    own = session_of(tmp_path, 4, kind=Kind(keep_epochs=False, check_weights=False, rate="--lr 1"))
    own.update.ddp.weights = torch.tensor([torch.nan])
    own.save()
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert own.files.advice() == "lower --lr 1"


def test_what_to_do_names_the_last_good_checkpoint(tmp_path):
    own = session_of(tmp_path, 4)
    assert own.files.advice().endswith("last good checkpoint, none so far")
    own.files.resumed_from("r.pth")
    assert own.files.advice().endswith("last good checkpoint, r.pth")
    own.save()
    assert own.files.advice().endswith(f"last good checkpoint, {tmp_path / 'checkpoint.pth'}")


def test_a_fallback_is_not_overwritten_by_what_was_damaged(tmp_path):
    previous = str(tmp_path / "checkpoint_previous.pth")
    save_checkpoint({"step": 1}, previous)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    own = session_of(tmp_path, 1)
    own.files.resumed_from(previous)
    own.save()  # the damaged one goes, the one before stays
    assert torch.load(previous)["step"] == 1
    own.progress.advance()
    own.save()
    assert torch.load(previous)["step"] == 1 and torch.load(own.files.latest)["step"] == 2
    own.save()
    assert torch.load(previous)["step"] == 2


@pytest.mark.parametrize(
    ("values", "finite"), [([1.0], True), ([torch.inf], False), ([1.0, -torch.inf, 0], False)]
)
def test_finite(values, finite):
    tensors = {"a": torch.ones(2), "b": torch.tensor(values), "n": torch.tensor(3)}
    assert all_finite(tensors) == finite


def failing(monkeypatch, times: float):
    """Let the first ``times`` checkpoints fail; gives the list of tries."""
    tries = []

    def save(*given):
        tries.append(given)
        if len(tries) <= times:
            raise OSError(28, "No space left on device")
        save_checkpoint(*given)

    monkeypatch.setattr(session_module, "save_checkpoint", save)
    monkeypatch.setattr(session_module.time, "sleep", lambda seconds: None)
    return tries


def test_the_last_checkpoint_is_tried_again(tmp_path, monkeypatch, caplog):
    tries = failing(monkeypatch, 3)
    own = session_of(tmp_path, 18)
    own.save()
    assert len(tries) == 4 and own.files.last_good == str(tmp_path / "checkpoint.pth")
    assert caplog.text.count("make room there: the last good checkpoint is none so far") == 3


def test_another_checkpoint_is_not(tmp_path, monkeypatch):
    tries = failing(monkeypatch, 3)
    own = session_of(tmp_path, 17)
    own.save()
    assert len(tries) == 1 and own.files.last_good is None and not own.saved


@pytest.mark.parametrize(("patience", "count"), [(0.0, 1), (1.0, 60 / PAUSE)])
def test_a_run_without_its_last_checkpoint_ends_badly(tmp_path, monkeypatch, patience, count):
    tries = failing(monkeypatch, math.inf)
    with pytest.raises(SystemExit) as ended:
        session_of(tmp_path, 18, TRAIN__SAVE_PATIENCE=patience).save()
    assert ended.value.code == NOT_SAVED == 74
    assert len(tries) == count


def test_a_signal_ends_the_tries(tmp_path, monkeypatch):
    tries = failing(monkeypatch, math.inf)
    stop = SimpleNamespace(agree=lambda over: (len(tries) == 2, over))
    with pytest.raises(SystemExit) as ended:
        session_of(tmp_path, 18, signals=stop).save()
    assert ended.value.code == NOT_SAVED and len(tries) == 2


def entered(session: Session):
    """The session as it is once training has begun."""
    session.log = Lines()
    session.averages = SimpleNamespace(add=lambda *figures: None)
    session.update.check_skipped = lambda *given: [False]
    return session


RESULT = SimpleNamespace(figures={}, finite=torch.tensor(True))
FAULTS = [
    (OSError(122, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded"),
    (UserError("x.jpg: cannot read"), "x.jpg: cannot read"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a data worker died"),
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
]


def ended_by(session: Session, error: Exception, updates: int, within: bool) -> str:
    """What is said of a fault after so many updates, or within the next one."""
    entered(session)
    with pytest.raises(UserError) as raised:
        try:
            for number, _ in enumerate(session.updates()):
                if within and number == updates:
                    raise error
                session.made(RESULT)
                if not within and number == updates - 1:
                    raise error
        except Exception as fault:
            session.__exit__(type(fault), fault, None)
            raise
    return str(raised.value)


@pytest.mark.parametrize(("error", "said"), FAULTS, ids=lambda x: type(x).__name__)
def test_a_fault_between_two_updates_saves_first(tmp_path, error, said):
    own = session_of(tmp_path, 3, (80, 4))
    own.loader.extend([["batch"]] * 9)
    text = ended_by(own, error, 1, within=False)
    assert text.startswith(said) and text.endswith("saved after update 4, start again")
    assert torch.load(tmp_path / "checkpoint.pth")["step"] == 4


@pytest.mark.parametrize(("error", "said"), FAULTS, ids=lambda x: type(x).__name__)
def test_a_fault_within_an_update_saves_nothing(tmp_path, error, said):
    own = session_of(tmp_path, 3, (80, 4))
    own.loader.extend([["batch"]] * 9)
    own.save()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    text = ended_by(own, error, 6, within=True)
    assert text.startswith(said)
    assert text.endswith(
        "6 updates since the last checkpoint are lost, the last good checkpoint is "
        f"{tmp_path}/checkpoint.pth"
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_fault_saves_no_weights_that_are_not_finite(tmp_path):
    own = session_of(tmp_path, 3)
    own.save()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    own.progress.step = 4
    own.update.ddp.weights = torch.tensor([1.0, math.nan])
    fault = OSError(122, "Disk quota exceeded")
    with pytest.raises(UserError, match="1 updates since the last checkpoint are lost"):
        own.__exit__(OSError, fault, None)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_what_has_diverged_is_not_saved_and_a_bug_is_shown(tmp_path, caplog):
    own = session_of(tmp_path)
    own.progress.step = 2
    own.__exit__(Diverged, Diverged("as it is"), None)
    assert not os.listdir(tmp_path)
    own.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert "ZeroDivisionError: saved after update 2, start again" in caplog.text


def test_saving_by_steps_by_time_and_at_a_signal(tmp_path, monkeypatch):
    """The end of an epoch is left to the script."""
    now, stop = [1000.0], [False]
    monkeypatch.setattr(session_module.time, "monotonic", lambda: now[0])
    signals = SimpleNamespace(agree=lambda up: (stop[0], up))
    keys = {"TRAIN__SAVE_STEPS": 3, "TRAIN__SAVE_MINUTES": 2.0}
    own = entered(session_of(tmp_path, 0, (1000, 100), signals=signals, **keys))
    own.loader.extend([["batch"]] * 10)
    saved = []
    monkeypatch.setattr(Session, "save", lambda self: saved.append(self.step))
    for _ in own.updates():
        own.made(RESULT)
    assert saved == [3, 6, 9]
    own.progress.next_epoch()
    own.config = with_values(own.config, {"TRAIN.SAVE_STEPS": 0})
    for _ in own.updates():
        now[0] += 50
        own.made(RESULT)
    assert saved[3:] == [13, 16, 19]
    own.progress.next_epoch()
    own.config = with_values(own.config, {"TRAIN.SAVE_MINUTES": 0.0})
    with pytest.raises(SystemExit) as ended:  # also after the last update of an epoch
        for number, _ in enumerate(own.updates(), 1):
            now[0] += 1e9
            stop[0] = number == 10
            own.made(RESULT)
    assert ended.value.code == RESUMABLE and saved[6:] == [30]
