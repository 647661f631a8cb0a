"""What a cluster's bad day does to a run: nothing is lost, doubled or mistaken."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, arguments, assert_same, wait_for, weights
from test_kill import FULL, children, folder, lines, metrics, run, start, trained
from test_resume import Killed

import main_pretrain
from evaluation.knn_monitor import KnnMonitor
from utils.checkpoint import read_checkpoint
from utils.errors import UserError
from utils.lock import LOCK
from utils.signals import NOT_SAVED, RESUMABLE

FULL_SECONDS = 10 if FULL else 1


@pytest.mark.parametrize("epoch", [0, 1])
def test_killed_within_the_knn_accuracy(run_main, imagenet, tmp_path, monkeypatch, epoch):
    opts = ("TRAIN.KNN_FREQ", 1, "DATA.NUM_WORKERS", 0)
    run_main(main_pretrain, *arguments("moby", imagenet, tmp_path / "a", *opts))
    given = arguments("moby", imagenet, tmp_path / "b", *opts)
    measure = KnnMonitor.after

    def after(self, at, encoder):
        if at == epoch:
            raise Killed
        return measure(self, at, encoder)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(KnnMonitor, "after", after)
        run_main(main_pretrain, *given)
    run_main(main_pretrain, *given)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert [x["knn"] for x in metrics(tmp_path / "b") if x["kind"] == "epoch"][epoch] is not None
    run_main(main_pretrain, *given)  # once more, after its end
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_resumed_run_goes_on_from_its_own_checkpoint(run_main, imagenet, tmp_path):
    """The same command again, though it begins with --resume; going back is done on purpose."""
    run_main(main_pretrain, *arguments("byol", imagenet, tmp_path / "old", "SAVE_FREQ", 1))
    first = folder(tmp_path / "old") / "ckpt_epoch_0.pth"
    given = arguments("byol", imagenet, tmp_path, "TRAIN.EPOCHS", 3, "MODEL.RESUME", first)
    run_main(main_pretrain, *given)
    log = folder(tmp_path) / "log_rank0.txt"
    assert f"resumed from {first} at update 6" in log.read_text()
    run_main(main_pretrain, *given)
    own = folder(tmp_path) / "checkpoint.pth"
    assert f"continuing from the run's own {own}, not from --resume {first}" in log.read_text()
    assert f"resumed from {own} at update 18" in log.read_text()
    run_main(main_pretrain, *given, "TRAIN.AUTO_RESUME", "False")
    assert log.read_text().count(f"resumed from {first} at update 6") == 2


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (("MODEL.WARMUP_EPOCHS", 1), "synthetic negatives from epoch 1 to epoch 1"),
        (("MODEL.WARMUP_EPOCHS", 0), "synthetic negatives from epoch 0 to epoch 1"),
        (("MODEL.WARMUP_EPOCHS", 2), "no epoch has synthetic negatives, so this is MoBY"),
        (("MODEL.COOLDOWN_EPOCHS", 0), "no epoch has synthetic negatives, so this is MoBY"),
        ([x for i in range(1, 7) for x in (f"MODEL.N{i}", 0)], "so this is MoBY"),
    ],
)
def test_a_synco_run_says_when_it_is_one(run_main, imagenet, tmp_path, opts, said):
    given = arguments("synco", imagenet, tmp_path, *opts, "DATA.NUM_WORKERS", 0)
    run_main(main_pretrain, *given, "MODEL.PROJ_NUM_LAYERS", 1)
    assert said in (folder(tmp_path) / "log_rank0.txt").read_text()


@pytest.fixture(scope="module")
def saved(imagenet, tmp_path_factory) -> Path:
    """A run of one epoch."""
    output = tmp_path_factory.mktemp("saved")
    run(arguments("moby", imagenet, output, "TRAIN.EPOCHS", 1))
    return output


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("optimizer", None),
        ("optimizer", {"state": None, "param_groups": []}),
        ("optimizer", {"state": {}, "param_groups": None}),
        ("optimizer", "shapes"),
        ("scaler", [1]),
        ("model", [1]),
        ("model", {"encoder": 1}),
        *[
            (name, v)
            for name in ("epoch", "step", "images", "images_per_update")
            for v in ("x", -1)
        ],
        ("epoch", None),
        ("rng_state", None),
        ("rng_state", torch.zeros(3)),
    ],
)
def test_entries_of_the_wrong_kind_are_named(saved, run_main, imagenet, tmp_path, entry, value):
    state = read_checkpoint(str(folder(saved) / "checkpoint.pth"))
    if value == "shapes":
        value = state["optimizer"]
        value["state"][0]["exp_avg"] = torch.zeros(3, 5)
    path = tmp_path / "x.pth"
    torch.save(state | {entry: value}, path)
    opts = ("MODEL.RESUME", path, "DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 2)
    with pytest.raises(UserError, match=rf"^{path}: ") as raised:
        run_main(main_pretrain, *arguments("moby", imagenet, tmp_path, *opts))
    assert len(str(raised.value)) < 500


def test_an_evaluation_of_a_run_that_trains_is_not_refused(saved, run_main, imagenet, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from utils.lock import lock_folder; "
         "lock_folder(sys.argv[1], 0); print('held', flush=True); time.sleep(60)",
         str(folder(saved))],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        before = (folder(saved) / "config.json").read_text()
        given = arguments("moby", imagenet, saved, "TRAIN.WAIT_FOR_LOCK", 0)
        run_main(main_pretrain, "--eval", *given)
        assert "Eval: loss" in (folder(saved) / "eval" / "log_rank0.txt").read_text()
        assert (folder(saved) / "config.json").read_text() == before
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            run_main(main_pretrain, *given)
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("nohup", [False, True], ids=["closed terminal", "nohup"])
def test_a_closed_terminal(imagenet, tmp_path, nohup):
    """SIGHUP saves like SIGTERM, unless it was ignored at the start."""
    given = arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", 400)
    process = start(given, ignored=[signal.SIGHUP] if nohup else [])
    try:
        wait_for(lambda: trained(tmp_path, 2))
        process.send_signal(signal.SIGHUP)
        if nohup:
            reached = lines(tmp_path)[-1]["step"]
            wait_for(lambda: trained(tmp_path, reached + 20))
            process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == RESUMABLE, text
    assert weights(tmp_path)["step"] == lines(tmp_path)[-1]["step"]


@pytest.mark.slow
def test_a_killed_data_worker_costs_no_update(imagenet, tmp_path):
    process = start(arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", 4000))
    try:
        wait_for(lambda: trained(tmp_path, 3))
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in text, text
    step = lines(tmp_path)[-1]["step"]
    assert weights(tmp_path)["step"] == step
    last = text.splitlines()[-1]
    assert last.startswith("main_pretrain.py: error: a data worker died")
    assert last.endswith(f"saved after update {step}, start again")


@pytest.mark.slow
def test_the_second_of_two_starts_goes_on_where_the_first_ended(imagenet, tmp_path):
    """A requeued job while the old one still ends; and a third one that does not wait."""
    opts = ("TRAIN.EPOCHS", 12, "TRAIN.SAVE_STEPS", 1)
    given = arguments("moby", imagenet, tmp_path, *opts)
    first = start(given)
    wait_for(lambda: trained(tmp_path, 3))
    second = start(given)
    third = start([*given, "TRAIN.WAIT_FOR_LOCK", 0])
    text = third.communicate(timeout=60)[0]
    assert third.returncode == 1, text
    assert f"process {first.pid} on " in text.splitlines()[-1] and "Traceback" not in text
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    ended = first.communicate(timeout=60)[0]
    assert first.returncode in (0, RESUMABLE), ended
    text = second.communicate(timeout=120)[0]
    assert second.returncode == 0, text
    steps = [x["step"] for x in lines(tmp_path) if x["kind"] == "train"]
    assert steps == list(range(1, 73))
    assert json.loads((folder(tmp_path) / LOCK).read_text())["pid"] == second.pid


@pytest.mark.slow
def test_of_ten_starts_at_once_one_trains(saved, imagenet, tmp_path):
    opts = ("TRAIN.EPOCHS", 2, "TRAIN.WAIT_FOR_LOCK", 0, "DATA.NUM_WORKERS", 0)
    given = arguments("moby", imagenet, tmp_path, *opts)
    processes = [start(given) for _ in range(10)]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    # one that starts late may find the run ended, and then has nothing left to do
    assert 0 in [process.returncode for process in processes], texts
    for process, text in zip(processes, texts, strict=True):
        assert "Traceback" not in text
        if process.returncode:
            assert process.returncode == 1 and "has written it since" in text.splitlines()[-1]
    steps = [x["step"] for x in lines(tmp_path) if x["kind"] == "train"]
    assert steps == list(range(1, 13))
    alone = arguments("moby", imagenet, tmp_path / "alone", *opts)
    run(alone)
    assert_same(weights(tmp_path / "alone"), weights(tmp_path))
    assert metrics(tmp_path / "alone") == metrics(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 300 MB, where the machine lets the test mount it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(disk: Path) -> None:
    for size in (2**20, 512):
        with contextlib.suppress(OSError), open(disk / f"fill{size}", "wb", 0) as file:
            while file.write(bytes(size)) == size:
                pass


def empty(disk: Path) -> None:
    for path in disk.glob("fill*"):
        path.unlink()


@pytest.mark.slow
def test_a_disk_that_is_full_three_times_changes_nothing(small_disk, imagenet, tmp_path_factory):
    epochs, save_every = (150, 5) if FULL else (5, 1)
    opts = ("TRAIN.EPOCHS", epochs, "TRAIN.SAVE_STEPS", save_every, "TRAIN.KNN_FREQ", 5)
    process = start(arguments("synco", imagenet, small_disk, *opts))
    try:
        for step in (3, 9, 15):
            wait_for(lambda step=step: trained(small_disk, step))
            fill(small_disk)
            time.sleep(FULL_SECONDS)
            assert process.poll() is None
            empty(small_disk)
            time.sleep(0.5)
        text = process.communicate(timeout=800)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0 and "Traceback" not in text, text
    assert "cannot write the checkpoint (No space left on device)" in text
    other = tmp_path_factory.mktemp("undisturbed")
    run(arguments("synco", imagenet, other, *opts))
    assert_same(weights(other), weights(small_disk))
    assert metrics(other) == metrics(small_disk)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_its_own_code(small_disk, imagenet):
    given = arguments("moby", imagenet, small_disk, "TRAIN.EPOCHS", 3, "TRAIN.SAVE_PATIENCE", 0.1)
    process = start(given)
    wait_for(lambda: trained(small_disk, 8))
    fill(small_disk)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == NOT_SAVED, text
    assert "Traceback" not in text and "make room there: the last good checkpoint is" in text
    assert text.splitlines()[-1].endswith("its last checkpoint: make room, start again")
    empty(small_disk)
    run(given)
    steps = [x["step"] for x in lines(small_disk) if x["kind"] == "train"]
    assert steps == list(range(1, 19))
