"""What a training run writes down, and when."""

import json
import logging
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from logger import create_logger
from utils.config import DEFAULTS, with_values
from utils.progress import EpochSize, Progress
from utils.run import Run
from utils.training_log import MetricsFile, TrainingLog, duration, measure_throughput, memory
from utils.update import Averages, Precision, Result

CPU = torch.device("cpu")


class Logged:
    """A log and its averages, which takes updates as a session does."""

    def __init__(self, folder, names=("",), print_freq=3, model=None) -> None:
        config = with_values(DEFAULTS, {"TRAIN.EPOCHS": 2})
        run = Run(str(folder), CPU, Precision("O0", CPU), logging.getLogger("training log"), config)
        optimizers = [
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5 + i)
            for i in range(len(names))
        ]
        update = SimpleNamespace(optimizers=optimizers, ddp=SimpleNamespace(module=model))
        self.progress = Progress(EpochSize(42, 8))  # 5 updates an epoch
        self.every, self.averages = print_freq, Averages(names)
        self.log = TrainingLog(run, self.progress, update, names)
        self.log.open()

    def record(self, result, also=None, stopping=False) -> list | None:
        self.averages.add(result.figures, result.finite)
        place = self.progress
        if stopping or place.epoch_ended or place.steps_of_epoch % self.every == 0:
            return self.log.line(self.averages, result, also or {})
        return None


def log_of(tmp_path, names=("",), print_freq=3, queues=None):
    model = queues and SimpleNamespace(dim=1, queues=lambda: queues)
    logged = Logged(tmp_path, names, print_freq, model)
    return logged.progress, logged


def result_of(loss, finite=True) -> Result:
    loss = torch.tensor(loss)
    return Result({"loss": loss}, torch.as_tensor(finite).expand(loss.shape), [])


def lines(tmp_path) -> list[dict]:
    return [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_every_so_many_updates_and_at_the_ends(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.training_log.time.monotonic", lambda: now[0])
    progress, log = log_of(tmp_path)
    said = []
    for step in range(1, 9):
        if step in (1, 6):
            list(log.log.bar([]))  # a new epoch begins
        now[0] += 2
        progress.advance()
        given = {"momentum": 0.1 * step}
        said.append(log.record(result_of(float(step)), given, stopping=step == 7) is not None)
        if progress.epoch_ended:
            now[0] += 50  # the evaluation
            log.log.end_epoch({"knn": 0.25, "other": None})
            progress.next_epoch()
    assert said == [False, False, True, False, True, False, True, True]
    written = lines(tmp_path)
    train = [x for x in written if x["kind"] == "train"]
    assert [x["step"] for x in train] == [3, 5, 7, 8]
    assert [x["loss"] for x in train] == [2.0, 4.5, 6.5, 8.0]
    assert [x["epoch"] for x in train] == [0, 0, 1, 1]
    assert [x["epochs"] for x in train] == [24 / 42, 1.0, 1 + 16 / 42, 1 + 24 / 42]
    assert [round(x["momentum"], 3) for x in train] == [0.3, 0.5, 0.7, 0.8]
    assert {x["seconds"] for x in train} == {2.0} and {x["images_per_s"] for x in train} == {4.0}
    assert [x["eta_s"] for x in train] == [14.0, 10.0, 6.0, 4.0]
    assert {x["lr"] for x in train} == {0.5} and {x["skipped"] for x in train} == {0}
    (epoch,) = [x for x in written if x["kind"] == "epoch"]
    assert epoch == {
        **{"kind": "epoch", "epoch": 0, "step": 5, "epochs": 1.0},
        **{"seconds": 10.0, "knn": 0.25, "other": None},
    }


def test_the_text_of_a_line(tmp_path, caplog, monkeypatch):
    progress, log = log_of(tmp_path, print_freq=1)
    progress.advance()
    ends = datetime(2026, 11, 26, 3, 12, 30)
    # 9 updates are left, of 1000 s each
    monkeypatch.setattr("utils.training_log.time.time", lambda: ends.timestamp() - 9000)
    log.log._epoch_started = log.log._line_started = 5.0  # to which 1000 adds without rounding
    monkeypatch.setattr("utils.training_log.time.monotonic", lambda: 1005.0)
    with caplog.at_level(logging.INFO):
        log.record(result_of(1.5), {})
        log.log.end_epoch({"knn": 0.5})
    first, last = (record.getMessage() for record in caplog.records)
    said = "Train: [0/2][1/5] eta 2:30:00 ends 2026-11-26 03:12 time 1000.0000 images/s 0.0"
    assert first.startswith(said)
    assert first.endswith("lr 0.5 loss 1.5 skipped 0")
    assert last == "EPOCH 0 training takes 0:16:40 knn 0.5000"


def test_figures_of_several_optimizers_are_named(tmp_path, caplog):
    progress, log = log_of(tmp_path, names=("0.1", "3"), print_freq=2)
    for finite in ([True, True], [True, False]):
        progress.advance()
        log.record(result_of([1.0, 2.0], torch.tensor(finite)), {})
    (line,) = lines(tmp_path)
    assert line["loss@0.1"] == 1.0 and line["loss@3"] == 2.0
    assert (line["skipped@0.1"], line["skipped@3"]) == (0, 1)
    assert (line["lr@0.1"], line["lr@3"]) == (0.5, 1.5)
    assert "updates skipped of rate 3, as loss or gradient was not finite: 1" in caplog.text
    assert "of rate 0.1" not in caplog.text


def test_means_of_each_optimizer_leave_out_its_own_skipped_updates(process_group):
    averages = Averages(("a", "b"))
    for loss, finite in (([1.0, math.nan], [1, 0]), ([3.0, 5.0], [1, 1]), ([8.0, 7.0], [0, 1])):
        averages.add({"loss": torch.tensor(loss)}, torch.tensor(finite, dtype=torch.bool))
    assert averages.updates == 3
    expected = {"loss@a": 2.0, "skipped@a": 1, "loss@b": 6.0, "skipped@b": 1}
    assert averages.read() == expected and averages.updates == 0


def test_a_queues_spread_is_reported(tmp_path):
    queue = torch.nn.functional.normalize(torch.randn(4, 50), dim=0)
    progress, log = log_of(tmp_path, print_freq=1, queues=(queue, queue))
    progress.advance()
    log.record(result_of(1.0), {})
    assert lines(tmp_path)[0]["queue_spread"] == pytest.approx(float(queue.std(1).mean()))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (61, "0:01:01"), (7325, "2:02:05")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_console_of_ascii_shows_every_name(tmp_path):
    folder = tmp_path / "größe"
    folder.mkdir()
    code = f"from logger import create_logger; create_logger({str(folder)!r}, 0).info('größe')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"gr\\xf6\\xdfe" in done.stdout and not done.stderr
    assert "größe" in (folder / "log_rank0.txt").read_text(encoding="utf-8")


def test_memory_is_in_megabytes():
    before = memory(torch.device("cpu"))
    assert 50 < before < 100_000
    kept = bytearray(300 * 2**20)
    assert memory(torch.device("cpu")) >= min(before, 350) and kept[-1] == 0


def test_speed_of_loader_and_update(monkeypatch, caplog):
    now, made = [0.0], []
    monkeypatch.setattr("utils.training_log.time.monotonic", lambda: now[0])
    monkeypatch.setattr("utils.training_log.THROUGHPUT_STEPS", 5)

    class Loader:
        def __init__(self, images, ahead):
            self.size, self.ahead = EpochSize(images, 8), ahead

        def __iter__(self):
            for number in range(10):
                now[0] += 0.5 if number > 3 else 0.01  # which were there
                yield [number]

    def update(micro_batches):
        made.append(micro_batches)
        now[0] += 4

    run = SimpleNamespace(logger=logging.getLogger("speed"), device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        measure_throughput(Loader(100, 3), update, run)
    assert made == [[0]] * 8  # three of them to warm up
    assert [r.getMessage() for r in caplog.records] == [
        "loader: 16.0 images/s",
        "update: 2.0 images/s, 4.0000 s an update",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        measure_throughput(Loader(80, 9), update, run)
    assert caplog.messages[0].startswith("loader: not measured, since the 10 updates of an epoch")


def test_metrics_go_on_after_a_full_disk_with_whole_lines(tmp_path, caplog):
    """The limit of a file's size stands in for a disk that has room for half a line."""
    progress, log = log_of(tmp_path, print_freq=1)
    path = tmp_path / "metrics.jsonl"

    def one_more():
        progress.advance()
        log.record(result_of(1.0), {})

    one_more()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 1, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
            one_more()
            assert [x["step"] for x in lines(tmp_path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("cannot write") == 1
    one_more()
    assert [x["step"] for x in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_metrics_wait_for_a_folder_that_is_away(tmp_path, caplog):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    progress, log = log_of(folder, print_freq=1)
    for step in range(1, 4):
        if step == 2:
            folder.rename(away)
        if step == 3:
            away.rename(folder)
        progress.advance()
        log.record(result_of(1.0), {})
        assert folder.exists() == (step != 2)  # it is not made anew
    assert [x["step"] for x in lines(folder)] == [1, 2, 3]


KEPT = [{"kind": "train", "epochs": 0.5, "epoch": 0}, {"kind": "epoch", "epochs": 1.0, "epoch": 0}]


def written(tmp_path, *lines) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '[]\n{"epochs": "1"}\n{"kind": "tr')


@pytest.mark.parametrize("step", [1, 900], ids=["fewer updates", "more updates"])
def test_lines_of_later_places_and_half_lines_are_dropped(tmp_path, step):
    """Whatever number their update had."""
    early = [line | {"step": 100} for line in KEPT]
    written(tmp_path, *early, {"kind": "train", "epochs": 1.25, "epoch": 1, "step": step})
    metrics = MetricsFile(str(tmp_path), 1.0, logging.getLogger("metrics"))
    assert lines(tmp_path) == early and metrics.epochs() == [0]


def test_a_line_of_an_earlier_version_is_at_the_same_place(tmp_path):
    """It divided updates, which may be another number in its last digit."""
    line = {"kind": "train", "epochs": (7 * 49 + 3) / 49, "epoch": 7}
    place = 7 + 3 * 8 / (49 * 8)
    written(tmp_path, line, {"kind": "train", "epochs": (7 * 49 + 4) / 49, "epoch": 7})
    MetricsFile(str(tmp_path), place - 1e-12, logging.getLogger("metrics"))
    assert lines(tmp_path) == [line]


def test_a_run_that_begins_anew_leaves_no_line(tmp_path):
    written(tmp_path, {"kind": "start", "epochs": 0.0, "epoch": 0}, *KEPT)
    assert MetricsFile(str(tmp_path), None, logging.getLogger("metrics")).epochs() == []
    assert lines(tmp_path) == []


def test_a_clock_that_stands_still_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training_log.time.monotonic", lambda: 5.0)
    progress, log = log_of(tmp_path, print_freq=1)
    progress.advance()
    assert log.record(result_of(1.0), {}) is not None
    assert lines(tmp_path)[0]["seconds"] > 0


def test_the_log_goes_on_when_its_folder_comes_back(tmp_path, capsys):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    logger = create_logger(str(folder), 0)
    logger.info("first")
    folder.rename(away)
    logger.info("second")
    assert not folder.exists()
    away.rename(folder)
    logger.info("third")
    text = (folder / "log_rank0.txt").read_text()
    assert "first" in text and "third" in text and "second" not in text
    told = capsys.readouterr()
    assert "second" in told.out and not told.err  # no traceback of the logging


def test_what_a_line_reads_besides_its_means_is_as_it_is_now(process_group):
    averages = Averages(("a", "b"))
    for loss in ([1.0, 2.0], [3.0, 6.0]):
        averages.add({"loss": torch.tensor(loss)}, torch.tensor([True, True]))
    now = {"row": torch.tensor([4, 5]), "spread": torch.tensor(0.5)}
    read = averages.read(now)
    assert read == {
        **{"loss@a": 2.0, "skipped@a": 0, "row@a": 4.0, "spread@a": 0.5},
        **{"loss@b": 4.0, "skipped@b": 0, "row@b": 5.0, "spread@b": 0.5},
    }


def test_a_line_tells_the_longest_rows_and_reads_once(tmp_path, process_group, monkeypatch):
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)
        counted = lambda self, real=real, name=name: reads.append(name) or real(self)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    queues = (torch.randn(4, 6), torch.randn(4, 6))
    progress, log = log_of(tmp_path, print_freq=2, queues=queues)
    for row in (3, 7):
        progress.advance()
        rows = log.record(replace(result_of(1.0), longest_row=torch.tensor(row)), {})
        assert rows == (None if row == 3 else [7])
    assert reads == ["tolist"]
    (line,) = lines(tmp_path)
    assert "longest_row" not in line
    expected = torch.stack([q.std(1).mean() for q in queues]).mean()
    assert line["queue_spread"] == expected.item()


@pytest.mark.parametrize(
    ("terminal", "number", "shown"), [(True, 0, True), (True, 1, False), (False, 0, False)]
)
def test_the_bar_is_for_the_first_process_on_a_terminal(
    tmp_path, monkeypatch, terminal, number, shown
):
    seen = {}
    monkeypatch.setattr("utils.distributed.rank", lambda: number)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("utils.training_log.tqdm", lambda updates, **o: seen.update(o) or updates)
    progress, log = log_of(tmp_path)
    progress.advance()
    assert list(log.log.bar(iter("abc"))) == ["a", "b", "c"]
    assert seen["disable"] is not shown
    assert (seen["total"], seen["initial"], seen["desc"]) == (5, 1, "epoch 0")


def test_the_bar_shows_the_figures_of_the_last_lines(tmp_path, monkeypatch):
    """Those of the epoch before are there from the first update on; several heads show the best."""
    now, said = [0.0], []

    class Bar(list):
        def __init__(self, updates, postfix, **_):
            super().__init__(updates)
            said.append(dict(postfix))

        def set_postfix(self, **figures):
            said.append(figures)

    monkeypatch.setattr("utils.training_log.time.monotonic", lambda: now[0])
    monkeypatch.setattr("utils.training_log.tqdm", Bar)
    progress, log = log_of(tmp_path, names=("0.1", "3"), print_freq=2)
    for number in log.log.bar(range(5)):
        now[0] += 4
        progress.advance()
        log.record(result_of([7.0, 1.0 + number]), {})
    assert said == [
        {},
        {"images/s": "2.0", "loss": "1.5", "left": "0:00:32"},
        {"images/s": "2.0", "loss": "3.5", "left": "0:00:24"},
        {"images/s": "2.0", "loss": "5", "left": "0:00:20"},
    ]
    log.log.end_epoch({"knn": 0.25, "probe": None})
    list(log.log.bar([]))
    assert said[-1] == {**said[-2], "knn": "0.2500"}
