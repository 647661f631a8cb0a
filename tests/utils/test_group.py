"""Groups that cannot form end in one line; processes wait for each other as long as they live."""

import datetime
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from forked import Script
from helpers import ROOT, arguments, free_port, spawn, wait_for, zip_folder

import data.opening
import data.transfer
from data.zips import ZipSource
from tools.make_tiny_transfer import write_tiny
from utils.config import load_config
from utils.distributed import all_gather_objects, on_first_process, rank, wait_for_all
from utils.errors import LostPeer, UserError
from utils.group import _agree_on_name, form_group
from utils.launchers import Place

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Set the launcher's variables: ``environment(RANK="1", ...)``."""

    def set_all(**values: str) -> None:
        for name, value in (PLACE | values).items():
            monkeypatch.setenv(name, value)

    return set_all


def test_a_port_in_use_is_named(environment):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment(RANK="0", MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT {port} .another program uses"):
            form_group("gloo", 2)


@pytest.mark.parametrize(
    ("listening", "message"), [(False, "nothing listens"), (True, "is not torch's store")]
)
def test_a_first_process_that_is_not_there(environment, listening, message):
    """Also if some other program listens there, and says nothing."""
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        if listening:
            other.listen()
        environment(MASTER_PORT=str(port))
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            form_group("gloo", 1)
    assert time.monotonic() - started < 5
    assert f"RANK is 1, WORLD_SIZE 2, MASTER_ADDR localhost, MASTER_PORT {port}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_script_ends_in_one_line(imagenet, tmp_path):
    given = [*arguments("moby", imagenet, tmp_path), "DIST_TIMEOUT", 2]
    for changed, message in (
        ({"RANK": "7"}, "RANK is 7, WORLD_SIZE 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is no number"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR no.such.host.invalid"),
        ({"MASTER_PORT": 70000}, "MASTER_PORT 70000"),
        ({}, "nothing listens there for 2 s)"),
    ):
        environment = PLACE | {"MASTER_PORT": free_port()} | changed
        process = Script("main_pretrain.py", *given, environment=environment)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert text.count("\n") == 1 and message in text, text


def test_a_dead_groups_name_is_passed_over():
    """The launcher's store outlives a restart. The second process comes before the first."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for key, value in (("asks/1", "old"), ("asks/2", "older"), ("old", "dead"), ("dead/1", "")):
        store.set(key, value)

    def join(rank: int) -> str:
        time.sleep(0 if rank else 1)
        place = Place(rank, 3, "localhost", store.port)
        return _agree_on_name(store.clone(), place, time.monotonic() + 20)

    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(join, (2, 1, 0)))
    assert len(names) == 1 and names.isdisjoint({"old", "dead"})


def test_one_that_does_not_come_is_named():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(LostPeer, match="process 1 of 2 did not come"):
        _agree_on_name(store, Place(0, 2, "localhost", store.port), time.monotonic() + 0.3)


def late(_, folder: str) -> None:
    def slow() -> int:
        time.sleep(5)
        return 7

    assert on_first_process(slow) == 7
    if rank() == 1:
        time.sleep(5)
    assert all_gather_objects(rank()) == [0, 1, 2]
    started = time.monotonic()
    wait_for_all()
    assert time.monotonic() - started < 2


@pytest.mark.slow
def test_a_slow_process_is_waited_for_longer_than_the_timeout(tmp_path):
    spawn(late, 3, str(tmp_path), timeout=3)


def reads_slowly(number: int, folder: str, step: str) -> None:
    """Opens a data set of which one process downloads, lists or caches longer than the timeout."""
    os.environ["LOCAL_RANK"] = str(number)
    opts = ["DATA.DATA_PATH", folder, "DATA.CACHE_MODE", "full"]
    opts += ["DATA.ZIP_MODE", str(step == "cache"), "DATA.DATASET"]
    opts.append("cifar10" if step == "download" else "imagenet")
    config = load_config(str(ROOT / "configs/moby_vit_tiny.yaml"), opts)
    module, name = {
        "download": (data.transfer, "open_transfer_set"),
        "list": (data.opening, "open_source"),
        "cache": (ZipSource, "fill_cache"),
    }[step]
    real = getattr(module, name)

    def slow(*given, **more):
        if number == (step == "cache"):
            time.sleep(5)
        return real(*given, **{k: v for k, v in more.items() if k != "download"})

    setattr(module, name, slow)
    assert len(data.opening.open_train(data.opening.DataPath.of(config), download=True).names) > 4
    all_reduced = torch.ones(1)
    dist.all_reduce(all_reduced)  # the first collective, which has the timeout
    assert all_reduced == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", ["download", "list", "cache"])
def test_a_data_set_may_take_longer_than_the_timeout(imagenet, tmp_path, step):
    folder = imagenet
    if step == "download":
        write_tiny("cifar10", str(tmp_path))
        folder = tmp_path
    elif step == "cache":
        zip_folder(imagenet, "train", tmp_path / "zips")
        folder = tmp_path / "zips"
    spawn(reads_slowly, 2, str(folder), step, timeout=3)


PROGRAM = """
import sys, time
from utils.distributed import all_gather_objects, init_process_group, on_first_process, rank
from utils.run import run_script
def slow():
    print("working", flush=True)
    time.sleep(100)
def main():
    init_process_group(0, timeout=4)
    if sys.argv[1] == "first":
        on_first_process(slow)
    elif rank():
        slow()
    all_gather_objects(1)
run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
@pytest.mark.parametrize("launcher", [True, False], ids=["store elsewhere", "own store"])
@pytest.mark.parametrize("busy", ["first", "second"])
def test_the_others_end_in_one_line_when_the_busy_one_dies(tmp_path, busy, launcher, number):
    """With the store in the launcher, and in the first process."""
    wait = datetime.timedelta(seconds=10)
    port = free_port()
    environment = PLACE | {"MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    if launcher:
        store = dist.TCPStore("localhost", port, None, True, wait, wait_for_workers=False)
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    processes = [
        Script(program, busy, environment=environment | {"RANK": number}) for number in range(2)
    ]
    victim = 0 if busy == "first" else 1
    try:
        wait_for(lambda: processes[victim].text() == "working\n")
        time.sleep(1)
        processes[victim].send_signal(number)
        error, _ = processes[1 - victim].communicate(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[1 - victim].returncode == 1
    lines = [x for x in error.splitlines() if x.startswith("program.py: error: ")]
    assert len(lines) == 1 and "another process of the group died" in lines[0], error
    assert "Traceback" not in error
    if launcher:  # torch prints when a store of its own ends or hangs
        assert error.count("\n") == 1, error
        del store
