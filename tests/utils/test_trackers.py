"""TensorBoard is read back, Weights & Biases is a stand-in, and both may be missing."""

import json
import logging
import math
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import arguments, spawn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from utils.config import load_config
from utils.errors import UserError
from utils.run import Run
from utils.trackers import open_trackers
from utils.update import Precision


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag, without those that a later start has hidden."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


def metrics(folder, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def opened(folder, resumed_at: float | None, *opts) -> list:
    config = load_config("configs/demo.yaml", list(opts))
    device = torch.device("cpu")
    logger = logging.getLogger("trackers")
    return open_trackers(
        Run(str(folder), device, Precision("O0", device), logger, config), resumed_at
    )


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is given, with the axis; what was sent cannot be taken back."""
    module = ModuleType("wandb")
    module.runs, module.axes, summaries = [], [], {}

    def init(**settings):
        logged, summary = [], summaries.setdefault(settings["id"], {})
        module.runs.append((settings, logged))

        def log(figures):
            logged.append(figures)
            summary.update(figures)

        def define_metric(name, step_metric=None):
            module.axes.append((name, step_metric))

        return SimpleNamespace(log=log, define_metric=define_metric, summary=summary)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_is_in_tensorboard(run_main, imagenet, tmp_path):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.KNN_FREQ", "1", "TRAIN.EPOCHS", "1")
    run_main(main_pretrain, "--tensorboard", *opts)
    folder = tmp_path / "run/default"
    found = scalars(folder / "tensorboard")
    lines = metrics(folder, "train")
    assert len(lines) == 6
    for name in ("loss", "lr", "positive", "feature_std", "images_per_s"):
        expected = [(round(1000 * x["epochs"]), pytest.approx(x[name])) for x in lines]
        assert found[f"train/{name}"] == expected
    assert found["epoch/knn"] == [(1000, pytest.approx(metrics(folder, "epoch")[0]["knn"]))]


@pytest.mark.parametrize("resumed_at", [0.3, 0.0, None])
def test_a_resumed_run_continues_at_its_place_and_a_new_one_hides_the_old(tmp_path, resumed_at):
    (first,) = opened(tmp_path, None, "TENSORBOARD", "True")
    for number in range(0, 6):
        first.write("train", number / 10, {"loss": number})
    (second,) = opened(tmp_path, resumed_at, "TENSORBOARD", "True")
    begun = -1 if resumed_at is None else round(10 * resumed_at)
    for number in range(begun + 1, 4):
        second.write("train", number / 10, {"loss": 10 * number})
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [
        *((100 * number, number) for number in range(begun + 1)),
        *((100 * number, 10 * number) for number in range(begun + 1, 4)),
    ]


def test_nothing_is_opened_unasked(run_main, imagenet, tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    run_main(main_pretrain, *arguments("byol", imagenet, tmp_path, "TRAIN.EPOCHS", "1"))
    assert not (tmp_path / "run/default/tensorboard").exists()


@pytest.mark.parametrize(
    ("flag", "module", "package"),
    [
        ("--tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("--wandb", "wandb", r"wandb \(extra \[wandb\]\)"),
    ],
)
def test_a_missing_package_is_named(
    run_main, imagenet, tmp_path, monkeypatch, flag, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"is missing: pip install {package}$"):
        run_main(main_pretrain, flag, *arguments("byol", imagenet, tmp_path))


def test_a_run_is_in_wandb(run_main, imagenet, tmp_path, wandb):
    opts = arguments("moby", imagenet, tmp_path, "TRAIN.EPOCHS", "2", "SAVE_FREQ", "1")
    run_main(main_pretrain, "--wandb", *opts)
    folder = tmp_path / "run/default"
    shutil.copy(folder / "ckpt_epoch_0.pth", folder / "checkpoint.pth")
    run_main(main_pretrain, "--wandb", *opts)
    (settings, logged), (again, later) = wandb.runs
    assert settings["name"] == "run/default" and settings["config"]["TRAIN"]["EPOCHS"] == 2
    assert again["id"] == settings["id"] and again["resume"] == "allow"
    assert wandb.axes[:2] == [("epochs", None), ("*", "epochs")]
    told = [f["epochs"] for f in logged if "train/loss" in f]
    assert told == [pytest.approx(step / 6) for step in range(1, 13)]
    assert logged[-1].keys() == {"epoch/seconds", "epochs", "epoch/epochs"}
    assert not later  # what is there cannot be taken back


def test_a_new_run_in_an_old_folder_is_a_new_one_in_wandb(tmp_path, wandb):
    for resumed_at in (None, 0.5, None):
        opened(tmp_path, resumed_at, "WANDB", "True")
    first, resumed, new = (settings["id"] for settings, _ in wandb.runs)
    assert first == resumed != new


def test_a_tracker_that_fails_stops_nothing(tmp_path, wandb, caplog):
    def fail(figures):
        raise ConnectionError("no network")

    remote = SimpleNamespace(log=fail, define_metric=lambda *given, **named: None)
    wandb.init = lambda **settings: remote
    (tracker,) = opened(tmp_path, None, "WANDB", "True")
    tracker.write("train", 1, {"loss": math.nan})
    tracker.write("train", 2, {"loss": 1.0})
    assert caplog.text.count("Weights & Biases fails (no network), given up") == 1


def test_a_tracker_that_does_not_start_says_why(tmp_path, wandb):
    def refuse(**settings):
        raise RuntimeError("not logged in")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"WANDB: .* does not start \(not logged in\)"):
        opened(tmp_path, None, "WANDB", "True")


def of_two(rank: int, folder: str) -> None:
    assert len(opened(folder, None, "TENSORBOARD", "True")) == (1 if rank == 0 else 0)


@pytest.mark.slow
def test_only_the_first_process_writes(tmp_path):
    spawn(of_two, 2, str(tmp_path))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
