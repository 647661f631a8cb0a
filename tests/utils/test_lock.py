"""One writer a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from utils.checkpoint import remove_leftovers, replacing
from utils.errors import UserError
from utils.lock import LOCK, lock_folder

# holds the lock with a forked child beside it, as a data worker is
HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from utils.lock import lock_folder
lock_folder(sys.argv[2], 0)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the folder for some seconds; gives it and its child's number."""
    started = []

    def hold(seconds: float = 60):
        command = [sys.executable, "-c", HOLD, str(ROOT), str(tmp_path), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        started.append((process, child))
        return process, child

    yield hold
    for process, child in started:
        os.kill(child, signal.SIGKILL)  # it holds the pipe that is read to its end below
        process.kill()
        process.communicate()


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(UserError) as raised:
        lock_folder(str(tmp_path), 0)
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    assert str(raised.value) == (
        f"{tmp_path}: process {process.pid} on {socket.gethostname()} has written it since "
        f"{since}: end that run, or choose another --tag"
    )


def test_a_dead_owner_blocks_nobody_though_its_child_lives(tmp_path, holder):
    process, child = holder()
    process.kill()
    process.wait()
    os.kill(child, 0)  # it lives
    lock_folder(str(tmp_path), 0)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock_folder(str(tmp_path), 0)  # its own
    child = os.fork()
    if not child:
        with contextlib.suppress(UserError):
            lock_folder(str(tmp_path), 0)
            os._exit(0)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7  # still held


def test_a_second_start_waits(tmp_path, holder, capsys):
    holder(1)
    started = time.monotonic()
    lock_folder(str(tmp_path), 30)
    assert 0.2 < time.monotonic() - started < 20
    assert "waiting at most 30 s" in capsys.readouterr().err


def test_a_child_does_not_have_its_parents_lock(tmp_path):
    lock_folder(str(tmp_path), 0)
    child = os.fork()
    if not child:
        try:
            lock_folder(str(tmp_path), 0)
        except UserError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, code):
    def lockf(*_):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_folder(str(tmp_path), 0)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{tmp_path}: its file system has no locks" in said[0]


def test_a_lock_that_cannot_be_had_is_an_error(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="Input/output"):
        lock_folder(str(tmp_path), 0)


@pytest.mark.parametrize("said", ["", "null", "7", "[]", "{}", "\udcff"])
def test_a_holder_that_has_not_said_who_it_is_still_holds(tmp_path, holder, said):
    """As within its start; or a file of another program."""
    holder()
    (tmp_path / LOCK).write_bytes(said.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="another process writes it: end that run"):
        lock_folder(str(tmp_path), 0)


WRITE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from utils.checkpoint import replacing
with replacing(sys.argv[2]) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    time.sleep(60)
"""


def test_temporary_files_of_living_writers_stay(tmp_path):
    (tmp_path / "checkpoint.pth.tmp").write_text("v0.1 left it")
    (tmp_path / "checkpoint.pth").write_text("whole")
    command = [sys.executable, "-c", WRITE, str(ROOT), str(tmp_path / "checkpoint.pth")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        remove_leftovers(str(tmp_path))
        (temporary,) = tmp_path.glob("*.tmp")
        assert temporary.read_text() == "half"
    finally:
        process.kill()
        process.communicate()
    remove_leftovers(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_text() == "whole"


def test_two_writers_of_a_file_leave_one_whole(tmp_path):
    path = str(tmp_path / "file")
    with replacing(path) as one, replacing(path) as other:
        one.write(b"1" * 1000)
        other.write(b"2" * 10)
    assert (tmp_path / "file").read_bytes() == b"1" * 1000
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ZeroDivisionError), replacing(path) as one:
        one.write(b"3")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_bytes() == b"1" * 1000 and os.listdir(tmp_path) == ["file"]
