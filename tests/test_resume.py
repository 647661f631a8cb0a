"""main_pretrain.py within an epoch: what is saved when, and where a run continues."""

import json
import os
import re

import pytest
import torch
from helpers import arguments, assert_same, run_forked, session_of, weights

import main_pretrain
from data.dataset import TwoViews
from data.loader import EpochBatches
from utils import checkpoint
from utils.errors import UserError
from utils.session import Session
from utils.update import Update


class Killed(Exception):
    """Ends a run of this process in the middle."""


def stop_after(monkeypatch, updates: int) -> None:
    """Let an update raise Killed after so many."""
    make, left = Update.__call__, [updates]

    def counted(*given):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return make(*given)

    monkeypatch.setattr(Update, "__call__", counted)


def write_half(state, file) -> None:
    file.write(b"half")
    raise Killed


def log_of(output) -> str:
    return (output / "run/default/log_rank0.txt").read_text()


def metrics_of(output) -> list[dict]:
    path = output / "run/default/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("accumulation", ["1", "2"])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_within_an_epoch_resuming_changes_nothing(
    run_main, imagenet, tmp_path, monkeypatch, updates, accumulation
):
    """Bit for bit, with one data worker before and none after."""
    opts = ("TRAIN.SAVE_STEPS", 1, "TRAIN.ACCUMULATION_STEPS", accumulation, "TRAIN.EPOCHS", 2)
    run_main(main_pretrain, *arguments("synco", imagenet, tmp_path / "a", *opts))
    given = arguments("synco", imagenet, tmp_path / "b", *opts)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, updates)
        run_main(main_pretrain, *given)
    run_main(main_pretrain, *given, "DATA.NUM_WORKERS", "0")
    assert f"at update {updates}\n" in log_of(tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    steps = [line["step"] for line in metrics_of(tmp_path / "b") if line["kind"] == "train"]
    assert steps == list(range(1, 12 // int(accumulation) + 1))


def test_lines_after_the_checkpoint_are_dropped(run_main, imagenet, tmp_path, monkeypatch):
    given = arguments("moby", imagenet, tmp_path, "TRAIN.SAVE_STEPS", 2, "TRAIN.EPOCHS", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        run_main(main_pretrain, *given)
    path = tmp_path / "run/default/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # cut off by the end of the process
    run_main(main_pretrain, *given)
    assert "at update 4\n" in log_of(tmp_path)
    lines = metrics_of(tmp_path)
    assert [(x["kind"], x["step"]) for x in lines] == [
        *(("train", step) for step in range(1, 5)),
        ("start", 4),
        *(("train", step) for step in range(5, 7)),
        ("epoch", 6),
    ]


def test_a_damaged_latest_costs_only_its_own_updates(run_main, imagenet, tmp_path, monkeypatch):
    """The run goes on from the one before, and that stays until there is another good one."""
    opts = ("TRAIN.SAVE_STEPS", 1, "TRAIN.EPOCHS", 1)
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path / "a", *opts))
    given = arguments("moby", imagenet, tmp_path / "b", *opts)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 4)
        run_main(main_pretrain, *given)
    latest = tmp_path / "b/run/default/checkpoint.pth"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        patch.setattr(checkpoint, "_write", write_half)
        run_main(main_pretrain, *given)
    assert latest.read_bytes() == content
    run_main(main_pretrain, *given)
    log = log_of(tmp_path / "b")
    assert log.count("checkpoint_previous.pth instead") == 2
    assert log.count("checkpoint_previous.pth at update 3\n") == 2
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def seen_images(monkeypatch) -> list[tuple[int, int]]:
    """The (epoch, index) of every image that is read from now on, in this process."""
    seen, get = [], TwoViews.__getitem__
    monkeypatch.setattr(
        TwoViews, "__getitem__", lambda self, key: seen.append(key) or get(self, key)
    )
    return seen


@pytest.mark.parametrize(("before", "after", "updates"), [(4, 8, 3), (4, 6, 4), (6, 5, 1)])
def test_another_number_of_images_goes_on_with_the_next_image(
    run_main, imagenet, tmp_path, monkeypatch, before, after, updates
):
    opts = ("TRAIN.SAVE_STEPS", 1, "TRAIN.EPOCHS", 2, "DATA.NUM_WORKERS", 0)
    given = arguments("moby", imagenet, tmp_path, *opts)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, updates)
        run_main(main_pretrain, *given, "DATA.BATCH_SIZE", before)
    with monkeypatch.context() as patch:
        seen = seen_images(patch)
        run_main(main_pretrain, *given, "DATA.BATCH_SIZE", after)
    order = next(iter(EpochBatches(24, 24, seed=0)))
    position, steps = before * updates, 24 // after
    first = -(-position // after)
    expected = order[position : position + (steps - first) * after]
    assert [key for key in seen if key[0] == 0] == expected
    assert len(seen) == len(expected) + steps * after
    log = log_of(tmp_path)
    assert f"was written with {before} images an update, now there are {after}" in log
    assert f"the base rate is {1e-3 * after / 512:.3g}" in log
    state = weights(tmp_path)
    assert state["step"] == 2 * steps
    assert state["lr_scheduler"]["base_values"][0] == pytest.approx(1e-3 * after / 512)


@pytest.mark.slow
def test_from_two_processes_to_one(run_main, imagenet, tmp_path):
    """An epoch by two, the next by one: the same images in each."""
    given = arguments("moby", imagenet, tmp_path, "DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "3")
    done = run_forked("main_pretrain.py", *given, processes=2)
    assert done.returncode == 0, done.stdout
    run_main(main_pretrain, *given, "TRAIN.EPOCHS", "4")
    assert "update 18 becomes update 36" in log_of(tmp_path)
    assert weights(tmp_path)["step"] == 48


def saving(folder, step=1, size=(1000, 1), **train) -> Session:
    keys = {f"TRAIN__{name}": value for name, value in train.items()}
    session = session_of(folder, step, size, SAVE_FREQ=1, TRAIN__EPOCHS=300, **keys)
    session.update.ddp.weights = torch.ones(100000)
    return session


def test_the_newest_of_the_run_stay(tmp_path):
    (tmp_path / "ckpt_epoch_250.pth").write_text("of a longer run")
    for epoch in range(12):
        saving(tmp_path, 6 * (epoch + 1), (24, 4), KEEP_CHECKPOINTS=2).save()
    assert {p.name for p in tmp_path.iterdir()} == {
        *("checkpoint.pth", "checkpoint_previous.pth"),
        *("ckpt_epoch_10.pth", "ckpt_epoch_11.pth", "ckpt_epoch_250.pth"),
    }


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk(tmp_path, monkeypatch, caplog, policy):
    def full(given, file):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    keeper = saving(tmp_path, ON_SAVE_ERROR=policy)
    keeper.save()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    message = r"checkpoint\.pth: cannot write the checkpoint \(No space left on device\): it takes "
    message += r"0\.4 MB, and \d+\.\d MB are free, make room there: "
    message += r"the last good checkpoint is .*checkpoint\.pth"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        if policy == "stop":
            with pytest.raises(UserError, match=message):
                keeper.save()
        else:
            keeper.save()
            assert re.search(message, caplog.text)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    keeper.progress.step = 3
    keeper.save()
    assert torch.load(tmp_path / "checkpoint.pth")["step"] == 3


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    keeper = saving(tmp_path)
    keeper.save()
    keeper.progress.step = 2
    keeper.update.ddp.weights = torch.tensor([1.0, float("nan")])
    with pytest.raises(UserError, match=r"not finite.*last good checkpoint is .*checkpoint\.pth"):
        keeper.save()
    assert torch.load(tmp_path / "checkpoint.pth")["step"] == 1


def test_what_a_kill_has_left_is_removed(tmp_path):
    for name in ("checkpoint.pth.tmp", "ckpt_epoch_3.pth.tmp"):
        (tmp_path / name).write_text("half")
    saving(tmp_path).files.open()
    assert not list(tmp_path.iterdir())
