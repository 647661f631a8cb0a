"""TensorBoard is read back, Weights & Biases is a stand-in, and both may be missing."""

import json
import logging
import math
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from helpers import arguments, spawn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from utils.config import load_config
from utils.errors import UserError
from utils.trackers import open_trackers


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag, without those that a later start has hidden."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


def metrics(folder, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def opened(folder, step: int, *opts) -> list:
    config = load_config("configs/demo.yaml", list(opts))
    run = SimpleNamespace(folder=str(folder), logger=logging.getLogger("trackers"))
    return open_trackers(config, run, step)


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is given."""
    module = ModuleType("wandb")
    module.runs = []

    def init(**settings):
        logged = []
        module.runs.append((settings, logged))
        return SimpleNamespace(log=lambda figures, step: logged.append((step, figures)))

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
        expected = [(line["step"], pytest.approx(line[name])) for line in lines]
        assert found[f"train/{name}"] == expected
    assert found["epoch/knn"] == [(6, pytest.approx(metrics(folder, "epoch")[0]["knn"]))]


def test_a_resumed_run_continues_at_its_step(tmp_path):
    (first,) = opened(tmp_path, 0, "TENSORBOARD", "True")
    for step in range(1, 6):
        first.write("train", step, {"loss": step})
    (second,) = opened(tmp_path, 3, "TENSORBOARD", "True")
    for step in (4, 5, 6):
        second.write("train", step, {"loss": 10 * step})
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [
        *((1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60))
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
    assert [s for s, f in logged if "train/loss" in f] == [*range(1, 13)]
    assert [s for s, f in later if "train/loss" in f] == [*range(7, 13)]
    assert later[-1][1].keys() == {"epoch/seconds"}


def test_a_new_run_in_an_old_folder_is_a_new_one_in_wandb(tmp_path, wandb):
    for step in (0, 5, 0):
        opened(tmp_path, step, "WANDB", "True")
    first, resumed, new = (settings["id"] for settings, _ in wandb.runs)
    assert first == resumed != new


def test_a_tracker_that_fails_stops_nothing(tmp_path, wandb, caplog):
    def fail(figures, step):
        raise ConnectionError("no network")

    wandb.init = lambda **settings: SimpleNamespace(log=fail)
    (tracker,) = opened(tmp_path, 0, "WANDB", "True")
    tracker.write("train", 1, {"loss": math.nan})
    tracker.write("train", 2, {"loss": 1.0})
    assert caplog.text.count("Weights & Biases fails (no network), given up") == 1


def test_a_tracker_that_does_not_start_says_why(tmp_path, wandb):
    def refuse(**settings):
        raise RuntimeError("not logged in")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"WANDB: .* does not start \(not logged in\)"):
        opened(tmp_path, 0, "WANDB", "True")


def of_two(rank: int, folder: str) -> None:
    assert len(opened(folder, 0, "TENSORBOARD", "True")) == (1 if rank == 0 else 0)


@pytest.mark.slow
def test_only_the_first_process_writes(tmp_path):
    spawn(of_two, 2, str(tmp_path))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
