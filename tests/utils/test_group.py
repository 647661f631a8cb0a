"""Groups that cannot form end in one line; processes wait for each other as long as they live."""

import datetime
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from forked import Script
from helpers import ROOT, arguments, free_port, spawn, wait_for, zip_folder

import data.source
import data.transfer
from data.archives import ZipSource
from tools.make_tiny_transfer import write_tiny
from utils import group
from utils.config import load_config
from utils.distributed import LostPeer, all_gather_objects, on_first_process, rank, wait_for_all
from utils.errors import UserError
from utils.group import Peers, Place, read_place

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Set the launcher's variables: ``environment(RANK="1", ...)``."""

    def set_all(**values: str) -> None:
        for name, value in (PLACE | values).items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "2", "RANK is 2, but it must lie between 0 and 1"),
        ("RANK", "-1", "RANK is -1, but it must lie between 0 and 1"),
        ("RANK", "one", "RANK is 'one', which is no whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', which is no whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0, but it must lie between 1 and"),
        ("WORLD_SIZE", "", "WORLD_SIZE is not set: start by torchrun"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set: start by torchrun"),
        ("MASTER_ADDR", "no.such.host.invalid", "MASTER_ADDR is no.such.host.invalid: no such"),
        ("MASTER_ADDR", "a" * 70, "no such host"),  # longer than a name may be
        ("MASTER_PORT", "", "MASTER_PORT is not set"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000, but it must lie between 1 and 65535"),
        ("MASTER_PORT", "1e3", "MASTER_PORT is '1e3', which is no whole number"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(environment, name, value, message):
    environment(**{name: value})
    with pytest.raises(UserError, match=message):
        read_place()


def test_what_the_launcher_says(environment):
    environment()
    assert read_place() == Place(1, 2, "localhost", 29500)


def test_a_port_in_use_is_named(environment):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment(RANK="0", MASTER_PORT=str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT is {port}: another program uses"):
            Peers(Place(0, 2, "localhost", port), timeout=2)


@pytest.mark.parametrize(
    ("listening", "message"), [(False, "nothing listens"), (True, "does not answer")]
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
            Peers(Place(1, 2, "localhost", port), timeout=1)
    assert time.monotonic() - started < 5
    assert f"RANK is 1, WORLD_SIZE 2, MASTER_ADDR localhost, MASTER_PORT {port}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_script_ends_in_one_line(imagenet, tmp_path):
    given = [*arguments("moby", imagenet, tmp_path), "DIST_TIMEOUT", 2]
    for changed, message in (
        ({"RANK": "7"}, "RANK is 7, but it must lie between 0 and 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is no whole number"),
        ({}, "nothing listens there for 2 s)"),
    ):
        environment = PLACE | {"MASTER_PORT": free_port()} | changed
        process = Script("main_pretrain.py", *given, environment=environment)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert text.count("\n") == 1 and message in text, text


def test_a_dead_groups_name_is_passed_over(environment):
    """The launcher's store outlives a restart. The second process comes before the first."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("group", "dead")
    store.add("dead/beat/0", 5)
    environment(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    names = []

    def second() -> None:
        names.append(Peers._living_group(store.clone(), timeout=20))

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(1)
    first = Peers(Place(0, 1, "localhost", store.port), timeout=5)
    thread.join(20)
    first.leave()
    assert names == [store.get("group").decode()] and names != ["dead"]


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
        "list": (data.source, "open_source"),
        "cache": (ZipSource, "fill_cache"),
    }[step]
    real = getattr(module, name)

    def slow(*given, **more):
        if number == (step == "cache"):
            time.sleep(5)
        return real(*given, **{k: v for k, v in more.items() if k != "download"})

    setattr(module, name, slow)
    assert len(data.source.build_source(config, "train", download=True).names) > 4
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
        assert error.count("\n") == 1 and f"process {victim} showed no sign of life" in error
        del store


# ---- Peers, played by threads with a store's clients each


@pytest.fixture
def peers(monkeypatch):
    """``peers(processes, timeout)``: the Peers of a group, made at the same time."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def client() -> dist.TCPStore:
        return dist.TCPStore("localhost", server.port, wait_for_workers=False)

    monkeypatch.setattr(group, "BEAT", 0.05)
    monkeypatch.setattr(group, "_connect", lambda place, timeout: (client(), client()))
    made: list[Peers] = []

    def make(processes: int, timeout: float = 20.0) -> list[Peers]:
        def join(rank: int) -> Peers:
            return Peers(Place(rank, processes, "localhost", server.port), timeout)

        made.extend(at_once(join, range(processes)))
        return made

    yield make
    at_once(Peers.leave, made)


def at_once(function, items) -> list:
    """``function`` of each item, in threads; an error of one comes in its place."""

    def guarded(item):
        try:
            return function(item)
        except (UserError, LostPeer) as error:
            return error

    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(guarded, items))


def test_the_first_alone_calls_and_all_get_the_result(peers):
    members, calls = peers(3), []

    def call() -> list:
        calls.append(threading.get_ident())
        return ["a", 1]

    for number in range(1, 4):
        assert at_once(lambda peer: peer.call_on_first(call), members) == [["a", 1]] * 3
        assert len(calls) == number
    store = members[0].store
    left = [f"call/{n}{end}" for n in range(1, 4) for end in ("", "/1", "/2")]
    assert not any(store.check([key]) for key in left)


def test_a_mistake_on_the_first_is_one_on_all(peers):
    def wrong() -> None:
        raise UserError("no such folder")

    errors = at_once(lambda peer: peer.call_on_first(wrong), peers(2))
    assert [(type(e), str(e)) for e in errors] == [(UserError, "no such folder")] * 2


def test_values_are_gathered_by_rank(peers):
    members = peers(3)
    for offset in (0, 10):
        found = at_once(lambda peer, o=offset: peer.gather(peer.place.rank + o), members)
        assert found == [[offset, offset + 1, offset + 2]] * 3
    assert not any(members[0].store.check([f"call/{n}/{r}"]) for n in (1, 2) for r in (1, 2))


def test_who_is_slow_is_waited_for_longer_than_the_timeout(peers):
    """As long as it gives signs of life."""
    members = peers(2, timeout=0.5)

    def slow() -> int:
        time.sleep(1.5)
        return 7

    assert at_once(lambda peer: peer.call_on_first(slow), members) == [7, 7]


def test_who_has_said_goodbye_is_not_waited_for(peers):
    members = peers(2)
    members[1].say_goodbye()
    started = time.monotonic()
    with pytest.raises(LostPeer, match="process 1 has ended"):
        members[0].gather(0)
    assert time.monotonic() - started < 10


def test_what_was_answered_before_the_goodbye_counts(peers):
    first, second = peers(2)
    first._put("key", "value")
    first.say_goodbye()
    second._wait("key", 0)
    with pytest.raises(LostPeer, match="process 0 has ended"):
        second._wait("another key", 0)


def test_who_gives_no_sign_of_life_is_lost(peers):
    members = peers(2, timeout=0.5)
    members[1]._stop.set()  # as if it were killed
    members[1]._thread.join()
    started = time.monotonic()
    with pytest.raises(LostPeer, match=r"process 1 showed no sign of life for 0\.5"):
        members[0].gather(0)
    assert 0.4 < time.monotonic() - started < 10


def test_a_first_process_that_never_comes_is_named(peers, monkeypatch):
    peers(1)[0].leave()  # an earlier group, whose name is still there
    with pytest.raises(UserError, match=r"the first process did not come in 0\.5 s"):
        Peers(Place(1, 2, "localhost", 1), 0.5)
