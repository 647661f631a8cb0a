"""--profile: a trace of some updates, a table of operations, and an unchanged run."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import arguments, assert_same, weights

import main_pretrain
from utils import profiling
from utils.errors import UserError
from utils.profiling import TRACE, WARM_UP, Profile

LOGGER = logging.getLogger("profiled")


def run_in(folder):
    return SimpleNamespace(folder=str(folder), device=torch.device("cpu"), logger=LOGGER)


def make(profile: Profile, epochs: int, updates: int, operation=torch.mm) -> None:
    """Epochs of updates, each one product of its number's size."""
    for made in range(1, 1 + epochs * updates):
        operation(torch.ones(made, made), torch.ones(made, made))
        profile.step()


def events(folder) -> list[str]:
    trace = json.loads((folder / TRACE).read_text())
    return [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_so_many_updates_are_traced_over_epochs(tmp_path, caplog, updates):
    caplog.set_level("INFO")
    make(Profile(updates, 12, run_in(tmp_path)), epochs=4, updates=3)
    assert events(tmp_path).count("aten::mm") == updates
    table = caplog.messages[0]
    assert table.startswith(f"{updates} updates by operation:\n") and "aten::mm" in table
    assert "Self CPU" in table and caplog.messages[1].startswith(f"{tmp_path}/{TRACE} saved")
    assert [path.name for path in tmp_path.iterdir()] == [TRACE]


@pytest.mark.parametrize("left", [0, WARM_UP, WARM_UP + 3])
def test_a_run_that_is_too_short_says_so(tmp_path, left):
    with pytest.raises(UserError, match=f"needs {WARM_UP + 4} updates, .* has only {left} left"):
        Profile(4, left, run_in(tmp_path))
    Profile(4, WARM_UP + 4, run_in(tmp_path))


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    make(Profile(1, 12, run_in(tmp_path / "away")), 1, WARM_UP + 3)
    assert f"{TRACE}: cannot write the trace (No such file" in caplog.text


def test_only_the_first_process_profiles(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "rank", lambda: 1)
    make(Profile(1, 12, run_in(tmp_path)), 1, WARM_UP + 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_profiled_is_the_same_run(run_main, imagenet, tmp_path):
    for name, flags in (("plain", []), ("profiled", ["--profile", "4"])):
        run_main(main_pretrain, *flags, *arguments("synco", imagenet, tmp_path / name))
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "profiled"))
    folder = tmp_path / "profiled/run/default"
    names = events(folder)
    # of two directions each, forward
    assert names.count("aten::cross_entropy_loss") == 4 * 2
    assert any("AdamW" in name for name in names)
    log = (folder / "log_rank0.txt").read_text()
    assert "4 updates by operation:" in log and f"{TRACE} saved" in log
