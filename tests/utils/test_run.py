"""How a script starts and ends."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from utils import run as run_module
from utils.config import load_config, with_values
from utils.errors import UserError
from utils.run import Run, fault, log_table, run_script, start, write_config
from utils.update import Precision

LOGGER = logging.getLogger("run")


@pytest.mark.parametrize(
    ("error", "processes", "said"),
    [
        (UserError("a.jpg: bad"), 1, "a.jpg: bad"),
        (UserError('Caught UserError in worker 0.\n  File "x"\nUserError: a.jpg: bad'), 1, "a.jpg"),
        (OSError(5, "Input/output error", "/data/a.jpg"), 1, "[Errno 5] Input/output error"),
        (MemoryError(), 1, "out of memory, lower --batch-size"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory, lower --batch-size (CUDA"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "out of memory, lower --batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), 1, "out of memory, lower"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 1, "out of memory, lower --batch"),
        # it is no peer that has died
        (dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (RuntimeError("DataLoader worker (pid 3) exited unexpectedly"), 1, "a data worker died"),
        (
            RuntimeError("Caught\n unable to allocate shared memory(shm)"),
            1,
            "shared memory is full",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "a data worker died"),
        (RuntimeError("Connection closed by peer [1]"), 2, "another process of the group died"),
        (RuntimeError("Connection closed by peer [1]"), 1, None),
        (dist.DistNetworkError("x"), 1, "another process of the group died"),
        (RuntimeError("shapes cannot be multiplied"), 2, None),
        (ValueError("DataLoader worker"), 1, None),
        (KeyError("a"), 1, None),
    ],
)
def test_what_is_a_fault_and_what_is_a_bug(monkeypatch, error, processes, said):
    for module in ("utils.distributed", "utils.run"):
        monkeypatch.setattr(f"{module}.world_size", lambda: processes)
    found = fault(error)
    assert found is None if said is None else found.startswith(said) and "\n" not in found


def ends(monkeypatch, error, processes=1) -> list[str]:
    """What ``run_script`` says when ``main`` raises ``error``."""
    said = []

    def main() -> None:
        if error:
            raise error

    def end_with(code: int, message: str, trace: str = "") -> None:
        said.append(message)
        print(trace + message, file=sys.stderr)
        raise SystemExit(code)

    for module in ("utils.distributed", "utils.run"):
        monkeypatch.setattr(f"{module}.world_size", lambda: processes)
    monkeypatch.setattr(run_module, "end_with", end_with)
    monkeypatch.setattr(run_module, "leave_group", lambda: said.append("left the group"))
    run_script(main)
    return said


def test_the_ends_of_a_script(monkeypatch, capsys):
    assert ends(monkeypatch, None) == ["left the group"]
    with pytest.raises(SystemExit) as left:
        ends(monkeypatch, SystemExit(75))
    assert left.value.code == 75
    for error in (UserError("a"), OSError(5, "b")):
        with pytest.raises(SystemExit):
            ends(monkeypatch, error)
    with pytest.raises(SystemExit) as left:
        ends(monkeypatch, KeyboardInterrupt())
    assert left.value.code == 130
    with pytest.raises(ZeroDivisionError):  # a bug shows where it is
        ends(monkeypatch, ZeroDivisionError())
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit):  # but of a group, each process ends by itself
        ends(monkeypatch, ZeroDivisionError(), 2)
    assert "ZeroDivisionError" in capsys.readouterr().err


def tiny(*opts):
    return load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), list(map(str, opts)))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes_what_is_in_effect(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(run_module, "rank", lambda: rank)
    config, device = tiny(), torch.device("cpu")
    read = config.TRAIN.BASE_LR
    precision = Precision("O1", device)
    run = Run(str(tmp_path), device, precision, LOGGER, config, {"TRAIN.BASE_LR": 0.25})
    write_config(run)
    effective = run.effective
    assert effective.TRAIN.BASE_LR == 0.25 and effective.OUTPUT.endswith("/default")
    assert effective.AMP_OPT_LEVEL == "O1" and read == config.TRAIN.BASE_LR
    written = list(tmp_path.iterdir())
    assert [p.name for p in written] == ["config.json"] * (rank == 0)
    if not rank:
        assert json.loads(written[0].read_text())["TRAIN"]["BASE_LR"] == 0.25


@pytest.mark.parametrize(
    ("key", "below"), [("EVAL_MODE", "/eval"), ("THROUGHPUT_MODE", "/throughput"), ("SEED", "")]
)
def test_a_start_makes_its_folder_and_seeds(tmp_path, monkeypatch, key, below):
    monkeypatch.delenv("RANK", raising=False)
    config = with_values(tiny("OUTPUT", tmp_path, "SEED", 7), {key: 7 if key == "SEED" else True})
    try:
        run = start(config)
        drawn = torch.rand(2)
    finally:
        dist.destroy_process_group()
    torch.manual_seed(7)
    assert drawn.equal(torch.rand(2))
    assert run.folder == f"{tmp_path}/{config.MODEL.NAME}/default{below}"
    # config.json would be that of a run that may yet be refused
    made = {p.name for p in (tmp_path / config.MODEL.NAME / f"default{below}").iterdir()}
    assert made == {".lock", "log_rank0.txt"}
    assert run.device.type == "cpu" or torch.cuda.is_available()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    try:
        with pytest.raises(UserError, match=r"file/.*: cannot write the run folder \(Not a dir"):
            start(tiny("OUTPUT", tmp_path / "file"))
    finally:
        dist.destroy_process_group()


def test_columns_of_a_table_stand_in_line(caplog):
    run = SimpleNamespace(logger=logging.getLogger("table"))
    with caplog.at_level(logging.INFO):
        log_table(run, [["k", "top-1 %"], ["10", "9.50"], ["200", "12.25"]])
    assert caplog.messages == ["results:\nk    top-1 %\n10      9.50\n200    12.25"]
